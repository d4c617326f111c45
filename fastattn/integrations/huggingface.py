"""``attn_implementation="fastattn"`` for the models of Hugging Face transformers, 5.23 and later.

It registers two functions: without a mask function of the same name, a model gives attention no mask at all, not even
for padding and windows. Both follow the meaning of transformers' eager code:

- A mask is complete. It includes causality, the sliding window, padding and packing, and `mask` returns one whenever
  something is forbidden.
- No mask forbids nothing. A layer's attribute ``module.is_causal`` has no effect, because models that were not written
  for this interface lack it or set it wrongly. A caller's own ``is_causal=True`` applies.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastattn.functional import attention, attention_varlen, divided
from fastattn.integrations.huggingface_eager import attention_with_weights, weights_are_collected
from fastattn.integrations.huggingface_mask import (
    PatternMask,
    documents_of,
    hands_masks_on,
    of_tensors,
    pattern_mask,
    without_packing,
)
from fastattn.integrations.huggingface_paged import admit, paged_attention

NAME = "fastattn"

# Arguments that models pass on to attention and that do not change the result, beside "output_...". fmt: off
_NOT_FOR_ATTENTION = frozenset(
    {
        "cache_position",
        "deterministic",
        "grid_thw",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "position_ids",
        "return_dict",
        "seq_idx",
        "shift_labels",
        "use_cache",
    }
)
# fmt: on
# Arguments of continuous batching, passed with a paged cache.
_OF_PAGES = frozenset({"logits_indices", "logits_processor_args", "max_length_k", "read_index", "write_index"})

_replaced: dict[Any, Callable[..., Any] | None] = {}
_undo: list[Callable[[], None]] = []


def register() -> None:
    """Register ``attn_implementation="fastattn"`` for every model of transformers. A second call changes nothing.

    Then call ``from_pretrained(..., attn_implementation="fastattn")``, or ``model.set_attn_implementation("fastattn")``
    on an existing model.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    for interface, function in _interfaces():
        present = interface._global_mapping.get(NAME)
        if present is not function:
            _replaced[interface] = None if present is _unregistered else present
            interface.register(NAME, function)
    if not _undo:
        _undo.append(admit(NAME))


def unregister() -> None:
    """Undo `register`: restore what had the name before. Later registrations of others stay.

    If nothing had the name, a model that still uses "fastattn" raises an error that explains this.
    """
    while _undo:
        _undo.pop()()
    if not _replaced:
        return
    for interface, function in _interfaces():
        before = _replaced.pop(interface, None)
        if interface._global_mapping.get(NAME) is not function:
            continue
        if before is not None:
            interface.register(NAME, before)
        elif function is attention_forward:
            interface.register(NAME, _unregistered)
        else:
            del interface._global_mapping[NAME]  # transformers has no function for this


def _unregistered(*args: Any, **kwargs: Any) -> NoReturn:
    """The attention function of models that still use "fastattn" after `unregister`: it raises."""
    raise RuntimeError(
        "attn_implementation: expected a registered one, got 'fastattn' after unregister(); call "
        "fastattn.integrations.huggingface.register() again or model.set_attn_implementation('sdpa')"
    )


def _require_transformers() -> None:
    """Raise ImportError unless a tested version of transformers, or a newer one, is installed."""
    expected = "transformers: expected 5.23 or later (pip install 'transformers>=5.23')"
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(f"{expected}, found none") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
        raise ImportError(f"{expected}, found {transformers.__version__}")


def _interfaces() -> tuple[tuple[Any, Callable[..., Any]], ...]:
    _require_transformers()
    from transformers import AttentionInterface, AttentionMaskInterface

    return (AttentionInterface, attention_forward), (AttentionMaskInterface, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function for transformers: the mask of one kind of layer.

    Args:
        batch_size, q_length, kv_length: B, Lq, Lk.
        q_offset, kv_offset: absolute positions of query 0 and of key 0; a static cache gives a tensor.
        mask_function: the pattern; default causal.
        attention_mask: bool (B, seen), False where there is padding.
        allow_is_causal_skip: not needed: a causal mask costs nothing.
        allow_is_bidirectional_skip: whether to return None if nothing is forbidden.
        use_vmap: the pattern is a function of single indices, as a caller's or Gemma 3's own may be.
        device: of the mask.
        kwargs: ``config`` of the model, ``dtype`` and the other arguments of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        (B, 1, Lq, Lk), True takes part: a `PatternMask`, or a dense bool mask under tracing. Models that do not declare
        that they pass masks on unchanged get the float mask of their eager code. None: nothing is forbidden.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    config = kwargs.get("config")
    declared = config is None or hands_masks_on(config)
    function: Any = masking_utils.causal_mask_function if mask_function is None else mask_function
    if (division := divided.current()) is not None:
        function = without_packing(function)
    if declared and not is_tracing(q_offset if isinstance(q_offset, Tensor) else attention_mask):
        pattern = of_tensors(function) if use_vmap else function
        found = pattern_mask(batch_size, q_length, kv_length, int(q_offset), kv_offset, pattern, attention_mask, device)
        if not allow_is_bidirectional_skip:
            return found
        length = kv_length if division is None else division.whole(kv_length)
        return None if _forbids_nothing(attention_mask, kwargs, length) else found
    make: Any = masking_utils.sdpa_mask if declared else masking_utils.eager_mask
    return make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _forbids_nothing(padding: Tensor | None, pattern: dict[str, Any], kv_length: int) -> bool:
    """Whether a bidirectional pattern has no padding and no window shorter than the keys."""
    local = pattern.get("local_size")
    return (local is None or kv_length < local) and (padding is None or bool(padding.all()))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function for the layers of transformers, on `fastattn.attention`.

    Args:
        module: the layer; its ``training`` switches dropout.
        query: (B, Hq, Lq, D).
        key: (B, Hk, Lk, D), Hq a multiple of Hk. Not repeated.
        value: (B, Hk, Lk, Dv).
        attention_mask: 4-D, broadcastable to (B, Hq, Lq, Lk): bool (True takes part) or float (added). None forbids
            nothing, unless ``is_causal`` is True and there is more than one query.
        dropout: of the weights; 0 unless the layer is training.
        scaling: default ``1 / sqrt(D)``.
        is_causal: query i sees keys 0 .. i. It only applies without a mask. False: every query sees all keys.
        sliding_window: a query sees itself and the ``sliding_window - 1`` keys before it. It only applies without a
            mask and with ``is_causal``, which is required if the window is shorter than the sequence.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (Hq,) sinks, one more logit per head.
        position_bias: float, broadcastable to (B, Hq, Lq, Lk), added to the scores.
        cu_seq_lens_q: integer (sequences + 1,): where packed sequences begin, and the end. Queries see the keys of
            their own sequence, as far as the mask allows. B is 1.
        cu_seq_lens_k: the same for the keys; None means ``cu_seq_lens_q``.
        output_attentions: also return the weights, computed in full.
        cache: the paged cache of continuous batching; the call first appends k and v to it. Causal order within each
            request, and the window, replace a mask.
        kwargs: further arguments that the model passes on.

    Returns:
        (B, Lq, Hq, Dv), and the weights (B, Hq, Lq, Lk) where they are asked for, otherwise None.

    Raises:
        TypeError, ValueError: the text names the argument, the expected and the given value. Unknown arguments that may
            change the result also raise.
    """
    _refuse({name: x for name, x in kwargs.items() if cache is None or name not in _OF_PAGES})
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise ValueError(
            f"s_aux.shape: expected ({query.shape[1]},), one for each query head, got {tuple(s_aux.shape)}"
        )
    if cache is not None:
        if output_attentions or position_bias is not None:
            raise ValueError("output_attentions, position_bias: expected None with a paged cache, got one")
        passed = {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k, **kwargs}
        window = None if sliding_window is None else (sliding_window - 1, 0)
        options = {"window": window, "softcap": softcap, "sinks": s_aux, "scale": scaling}
        return paged_attention(cache, module, query, key, value, passed, options), None
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, shared by the batch
    division, mask = divided.current(), attention_mask
    if cu_seq_lens_q is not None and division is None:
        mask = _within(mask, is_causal, sliding_window, cu_seq_lens_q, cu_seq_lens_k, query, key)
    if mask is None:
        options = _implied(query.shape[2], key.shape[2], is_causal, sliding_window)
    else:
        options = _given(mask)
    divided_ends = division is not None and cu_seq_lens_q is not None
    if divided_ends and (not {*options} <= {"causal", "window", "q_offset"} or query.shape[0] != 1):
        divided.refuse("attention_mask", "padding, or another pattern than causal order and a window")
    if position_bias is not None:
        options["bias"] = position_bias + options["bias"] if "bias" in options else position_bias
    options |= {"softcap": softcap, "sinks": s_aux, "scale": scaling, "dropout_p": dropout if module.training else 0.0}
    weights = None
    if output_attentions or weights_are_collected():
        out, weights = attention_with_weights(query, key, value, options)
    elif division is not None and cu_seq_lens_q is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options.pop("q_offset", None)
        return attention_varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_k, **options)[None].contiguous(), None
    else:
        out = attention(query, key, value, **options)
    return out.transpose(1, 2).contiguous(), weights


def _given(attention_mask: Tensor) -> dict[str, Any]:
    """The arguments of `fastattn.attention` that mean the same as a mask."""
    if isinstance(attention_mask, PatternMask):
        return dict(attention_mask.operands())
    if attention_mask.ndim != 4:
        raise ValueError(
            "attention_mask.shape: expected 4 dimensions, broadcastable to (B, Hq, Lq, Lk), "
            f"got {tuple(attention_mask.shape)}"
        )
    if attention_mask.dtype == torch.bool:
        return {"mask": attention_mask}
    if attention_mask.is_floating_point():
        return {"bias": attention_mask}
    raise TypeError(
        f"attention_mask.dtype: expected bool (True takes part) or a floating-point dtype, got {attention_mask.dtype}"
    )


def _implied(q_len: int, kv_len: int, is_causal: bool | None, sliding_window: int | None) -> dict[str, Any]:
    """The arguments of `fastattn.attention` for a call without a mask."""
    if is_causal:
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return {"causal": True, "window": window, "q_offset": 0 if q_len > 1 else kv_len - 1}  # one query: the newest
    if is_causal is False:
        return {}  # such a layer sees all keys; a window to both sides comes as a mask
    division, longest = divided.current(), max(q_len, kv_len)
    if sliding_window is not None and (longest if division is None else division.whole(longest)) > sliding_window:
        # models differ in the meaning of a window to both sides; only the mask is clear
        raise ValueError(
            f"attention_mask: expected a mask where sliding_window == {sliding_window} is shorter than the sequence "
            "and is_causal is not given, got None"
        )
    return {}


def _stated(options: dict[str, Any], query: Tensor, key: Tensor) -> PatternMask:
    """The mask that means the same as `_implied`."""
    from transformers import masking_utils as own

    pattern: Any = own.causal_mask_function if options else own.bidirectional_mask_function
    if options.get("window") is not None:
        pattern = own.sliding_window_causal_mask_function(options["window"][0] + 1)
    sizes = (query.shape[0], query.shape[2], key.shape[2], options.get("q_offset", 0))
    return pattern_mask(*sizes, 0, pattern, None, query.device)


def _within(
    mask: Tensor | None, is_causal: bool | None, sliding_window: int | None, cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | None, query: Tensor, key: Tensor,
) -> Tensor:  # fmt: skip
    """The mask, or what a call without one means, that also forbids pairs across packed sequences."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: expected a batch of 1, all sequences in one row, got {query.shape[0]}")
    ends = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    if mask is None:
        mask = _stated(_implied(query.shape[2], key.shape[2], is_causal, sliding_window), query, key)
    if isinstance(mask, PatternMask):
        return mask.within(*ends)
    _given(mask)  # or an error
    rows, columns = (documents_of(end, x.shape[2], x.device) for end, x in zip(ends, (query, key), strict=True))
    same = rows[:, None] == columns
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise for unsupported arguments instead of ignoring them."""
    for name, given in kwargs.items():
        known = name in _NOT_FOR_ATTENTION or name.startswith("output_")
        if given is not None and given is not False and not known:
            why = "attn_implementation='fastattn' does not know this argument"
            raise ValueError(f"{name}: expected None, {why}; got {_short(given)}")


def _short(given: Any) -> str:
    return f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__

"""``attn_implementation="fastattn"`` for the models of Hugging Face transformers, 5.23 and later.

Two functions are registered, because one is not enough: a model gives attention no mask at all, padding and windows
included, unless a mask function of the same name is known. What they agree on is what transformers' eager code means:

- A mask is the whole truth. It holds causality, the sliding window, padding and packing, and `mask` never leaves out
  one that forbids something.
- No mask forbids nothing. What a layer calls itself (``module.is_causal``) decides nothing: models that were not
  written for such an interface leave it out, or say the wrong thing. A caller's own ``is_causal=True`` counts.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastattn.functional import attention, attention_varlen, divided
from fastattn.integrations.huggingface_eager import attention_with_weights, weights_are_collected
from fastattn.integrations.huggingface_mask import PatternMask, hands_masks_on, pattern_mask, without_packing
from fastattn.integrations.huggingface_paged import admit, paged_attention

NAME = "fastattn"

# Arguments that models hand through to attention and that say nothing about the result, beside "output_...".
# fmt: off
_NOT_FOR_ATTENTION = frozenset(
    {
        "cache_position", "deterministic", "grid_thw", "max_length_k", "max_length_q", "num_items_in_batch",
        "position_ids", "return_dict", "seq_idx", "shift_labels", "use_cache",
    }
)
# fmt: on
# Arguments of continuous batching, which come with a paged cache.
_OF_PAGES = frozenset({"logits_indices", "logits_processor_args", "max_length_k", "read_index", "write_index"})

_replaced: dict[Any, Callable[..., Any] | None] = {}
_undo: list[Callable[[], None]] = []


def register() -> None:
    """Make ``attn_implementation="fastattn"`` known to every model of transformers. A second call changes nothing.

    Then ``from_pretrained(..., attn_implementation="fastattn")``, or ``model.set_attn_implementation("fastattn")`` on a
    model that exists.

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
    """Undo `register`: whatever had the name before has it again. What others registered since then stays.

    Where nothing had it, a model that still asks for "fastattn" fails with an error that says so.
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
    """Attention of the models that still ask for "fastattn"."""
    raise RuntimeError(
        "attn_implementation: expected one that is registered, got 'fastattn' after unregister(); call "
        "fastattn.integrations.huggingface.register() again or model.set_attn_implementation('sdpa')"
    )


def _require_transformers() -> None:
    """Raise ImportError unless transformers is there and as new as what was tested."""
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
    """The mask of one kind of layer, as transformers asks for it.

    Args:
        batch_size, q_length, kv_length: B, Lq, Lk.
        q_offset, kv_offset: absolute positions of query 0 and of key 0; a static cache gives a tensor.
        mask_function: the pattern; default causal.
        attention_mask: bool (B, seen), False where there is padding.
        allow_is_causal_skip: not needed: a causal mask costs nothing.
        allow_is_bidirectional_skip: whether to return None where nothing is forbidden.
        use_vmap: the pattern is a function of single indices.
        device: of the mask.
        kwargs: ``config`` of the model, ``dtype``, and what else ``transformers.masking_utils.sdpa_mask`` takes.

    Returns:
        (B, 1, Lq, Lk), True takes part: a `PatternMask`, or a dense bool mask where the pattern takes single indices or
        the call is traced. For models that do not declare that they hand masks on, the float mask of their eager code.
        None: nothing is forbidden.
    """
    from transformers import masking_utils
    from transformers.utils.import_utils import is_tracing

    config = kwargs.get("config")
    declared = config is None or hands_masks_on(config)
    function: Any = masking_utils.causal_mask_function if mask_function is None else mask_function
    if (division := divided.current()) is not None:
        function = without_packing(function)
    dense = use_vmap or is_tracing(q_offset if isinstance(q_offset, Tensor) else attention_mask)
    if declared and not dense:
        found = pattern_mask(
            batch_size, q_length, kv_length, int(q_offset), kv_offset, function, attention_mask, device
        )
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
    """Of a pattern to both sides: there is no padding, and no window shorter than the keys."""
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
    """Attention as the layers of transformers call it, on `fastattn.attention`.

    Args:
        module: the layer; its ``training`` switches dropout.
        query: (B, Hq, Lq, D).
        key: (B, Hk, Lk, D), Hq a multiple of Hk. Not repeated.
        value: (B, Hk, Lk, Dv).
        attention_mask: 4-D, broadcastable to (B, Hq, Lq, Lk): bool (True takes part) or float (added). None forbids
            nothing, unless ``is_causal`` is True and there is more than one query.
        dropout: of the weights; 0 unless the layer is training.
        scaling: default ``1 / sqrt(D)``.
        is_causal: query i sees keys 0 .. i. Only counts without a mask. False: every query sees all keys.
        sliding_window: a query sees itself and the ``sliding_window - 1`` keys before it. Only counts without a mask,
            and with ``is_causal``, which must be given where the window is shorter than the sequence.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (Hq,) sinks, one more logit per head.
        position_bias: float, broadcastable to (B, Hq, Lq, Lk), added to the scores.
        cu_seq_lens_q: integer (sequences + 1,): where packed sequences begin, and the end. Queries see the keys of
            their own sequence, as far as the mask allows. B is 1.
        cu_seq_lens_k: likewise for the keys; None means the same.
        output_attentions: also return the weights, which are computed in full for this.
        cache: the paged cache of continuous batching, to which k and v are appended first. What it and the arguments
            beside it say takes the place of a mask: causal order within each request, and the window.
        kwargs: what else the model passes on.

    Returns:
        (B, Lq, Hq, Dv), and the weights (B, Hq, Lq, Lk) where they are asked for, otherwise None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also for an argument that is not
            known here and may change the result.
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
    if attention_mask is None:
        options = _implied(query.shape[2], key.shape[2], is_causal, sliding_window)
    else:
        options = _given(attention_mask)
    division = divided.current()
    if division is not None and cu_seq_lens_q is not None:
        if not {*options} <= {"causal", "window", "q_offset"} or query.shape[0] != 1:
            divided.refuse("attention_mask", "padding, or another pattern than causal order and a window")
    elif cu_seq_lens_q is not None:
        mask = _stated(options, query, key) if attention_mask is None else attention_mask
        options = _given(_within(mask, cu_seq_lens_q, cu_seq_lens_k, query, key))
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
    """What a mask means, as arguments of `fastattn.attention`."""
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
    """What no mask means, as arguments of `fastattn.attention`."""
    if is_causal:
        window = None if sliding_window is None else (sliding_window - 1, 0)
        return {"causal": True, "window": window, "q_offset": 0 if q_len > 1 else kv_len - 1}  # one query is the newest
    if is_causal is False:
        return {}  # such a layer sees all; a window to both sides comes as a mask
    division, longest = divided.current(), max(q_len, kv_len)
    if sliding_window is not None and (longest if division is None else division.whole(longest)) > sliding_window:
        # models differ in what a window means to both sides: the mask says it
        raise ValueError(
            f"attention_mask: expected a mask where sliding_window == {sliding_window} is shorter than the sequence "
            "and nothing says is_causal, got None"
        )
    return {}


def _stated(options: dict[str, Any], query: Tensor, key: Tensor) -> PatternMask:
    """What `_implied` says, as a mask."""
    from transformers import masking_utils as own

    pattern: Any = own.causal_mask_function if options else own.bidirectional_mask_function
    if options.get("window") is not None:
        pattern = own.sliding_window_causal_mask_function(options["window"][0] + 1)
    sizes = (query.shape[0], query.shape[2], key.shape[2], options.get("q_offset", 0))
    return pattern_mask(*sizes, 0, pattern, None, query.device)


def _within(mask: Tensor, cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The mask that also forbids what crosses from one packed sequence to another."""
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: expected a batch of 1, all sequences in one row, got {query.shape[0]}")
    ends = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
    documents = [
        torch.searchsorted(end.to(x.device, torch.int64), torch.arange(x.shape[2], device=x.device), right=True)
        for end, x in zip(ends, (query, key), strict=True)
    ]
    if isinstance(mask, PatternMask):
        return mask.within(documents[0], documents[1], ends)
    same = documents[0][:, None] == documents[1]
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise for what cannot be honoured, rather than ignore it."""
    for name, given in kwargs.items():
        known = name in _NOT_FOR_ATTENTION or name.startswith("output_")
        if given is not None and given is not False and not known:
            why = "attn_implementation='fastattn' does not know this argument"
            raise ValueError(f"{name}: expected None, {why}; got {_short(given)}")


def _short(given: Any) -> str:
    return f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__

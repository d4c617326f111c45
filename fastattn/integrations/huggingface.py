"""``attn_implementation="fastattn"`` for the models of Hugging Face transformers, 5.23 and later.

Two functions are registered, because one is not enough: a model gives attention no mask at all, padding and windows
included, unless a mask function of the same name is known. What they agree on:

- A mask is the whole truth. It already holds causality, the sliding window, padding and packing.
- No mask means what it means in transformers' own ``"sdpa"``, by which models are written: nothing is forbidden if the
  layer is not causal or there is one query; else query i sees keys 0 .. i. `mask` leaves the mask out only where that
  is exactly what it would have said.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import attention

NAME = "fastattn"

# Arguments that models hand through to attention and that say nothing about the result, beside "output_...".
_NOT_FOR_ATTENTION = frozenset(
    {"cache_position", "deterministic", "num_items_in_batch", "position_ids", "return_dict", "seq_idx", "use_cache"}
)
_HINTS = {
    "cache": "paged caches are not supported",
    "cu_seq_lens_q": "pack sequences by position_ids",
    "cu_seq_lens_k": "pack sequences by position_ids",
    "max_length_q": "pack sequences by position_ids",
    "max_length_k": "pack sequences by position_ids",
}
_WEIGHTS = "output_attentions: expected False, a fused kernel has no weights to return; got True"

_replaced: dict[Any, Callable[..., Any] | None] = {}


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
            _replaced[interface] = present
            interface.register(NAME, function)


def unregister() -> None:
    """Undo `register`: whatever had the name before has it again. What others registered since then stays."""
    if not _replaced:
        return
    for interface, function in _interfaces():
        before = _replaced.pop(interface, None)
        if interface._global_mapping.get(NAME) is not function:
            continue
        if before is None:
            del interface._global_mapping[NAME]  # transformers has no function for this
        else:
            interface.register(NAME, before)


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
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one kind of layer, as transformers asks for it, or None where `attention_forward` can imply it.

    Args:
        batch_size, q_length, kv_length: B, Lq, Lk.
        q_offset, kv_offset: absolute positions of query 0 and of key 0; a static cache gives a tensor.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether the pattern is so plain that None may stand for it.
        kwargs: the pattern and the padding, for ``transformers.masking_utils.sdpa_mask``.

    Returns:
        bool (B, 1, Lq, Lk), True takes part; or None.
    """
    from transformers.masking_utils import sdpa_mask

    tracing = isinstance(q_offset, Tensor) and torch.compiler.is_compiling()  # then sdpa_mask makes the mask anyway
    if allow_is_causal_skip and not tracing:
        # sdpa_mask relies on its callers here: one query in a static cache must not see the slots still to be filled.
        behind = q_offset - kv_offset
        allow_is_causal_skip = bool(behind == 0 if q_length > 1 else behind >= kv_length - 1)
    if not getattr(kwargs.get("config"), "is_causal", True):
        allow_is_bidirectional_skip = False  # a decoder used as an encoder: its layers still call themselves causal
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType] (its hint forgets tensors)
        kv_offset=kv_offset,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the layers of transformers call it, on `fastattn.attention`.

    Args:
        module: the layer; its ``training`` switches dropout, its ``is_causal`` counts where the argument is None.
        query: (B, Hq, Lq, D).
        key: (B, Hk, Lk, D), Hq a multiple of Hk. Not repeated.
        value: (B, Hk, Lk, Dv).
        attention_mask: 4-D, broadcastable to (B, Hq, Lq, Lk): bool (True takes part) or float (added). None
            forbids nothing if the layer is not causal or there is one query; else query i sees keys 0 .. i.
        dropout: of the weights; 0 unless the layer is training.
        scaling: default ``1 / sqrt(D)``.
        is_causal: only counts without a mask.
        sliding_window: a query sees itself and the ``sliding_window - 1`` keys before it. Only counts without a mask.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        s_aux: (Hq,) sinks, one more logit per head.
        position_bias: float, broadcastable to (B, Hq, Lq, Lk), added to the scores.
        kwargs: what else the model passes on.

    Returns:
        (B, Lq, Hq, Dv), and None in place of the weights.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; also for an argument that is not
            known here and may change the result.
    """
    _refuse(kwargs)
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        raise ValueError(
            f"s_aux.shape: expected ({query.shape[1]},), one for each query head, got {tuple(s_aux.shape)}"
        )
    if query.shape[0] == 1 != key.shape[0]:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, shared by the batch
    allowed, bias = None, position_bias
    causal, window, q_offset = False, None, 0
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        causal, window, q_offset = _implied(query.shape[2], key.shape[2], bool(is_causal), sliding_window)
    else:
        if attention_mask.ndim != 4:
            raise ValueError(
                "attention_mask.shape: expected 4 dimensions, broadcastable to (B, Hq, Lq, Lk), "
                f"got {tuple(attention_mask.shape)}"
            )
        if attention_mask.dtype == torch.bool:
            allowed = attention_mask
        elif not attention_mask.is_floating_point():
            raise TypeError(
                f"attention_mask.dtype: expected bool (True takes part) or a floating-point dtype, "
                f"got {attention_mask.dtype}"
            )
        else:
            bias = attention_mask if bias is None else bias + attention_mask
    out = attention(
        query, key, value, causal=causal, window=window, q_offset=q_offset, mask=allowed, bias=bias, softcap=softcap,
        sinks=s_aux, scale=scaling, dropout_p=dropout if module.training else 0.0,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _implied(
    q_len: int, kv_len: int, is_causal: bool, sliding_window: int | None
) -> tuple[bool, tuple[int, int] | None, int]:
    """What no mask means: ``causal``, ``window`` and ``q_offset`` of `fastattn.attention`."""
    q_offset = 0 if q_len > 1 else kv_len - 1  # one query is the newest
    if sliding_window is None:
        return is_causal and q_len > 1, None, q_offset
    if is_causal:
        return q_len > 1, (sliding_window - 1, 0), q_offset
    if max(q_len, kv_len) > sliding_window:  # models differ in what a window means to both sides: the mask says it
        raise ValueError(
            f"attention_mask: expected a mask where sliding_window == {sliding_window} is shorter than the sequence "
            "and the layer is not causal, got None"
        )
    return False, None, q_offset


def _refuse(kwargs: dict[str, Any]) -> None:
    """Raise for what cannot be honoured, rather than ignore it."""
    for name, given in kwargs.items():
        if given is None or given is False or name in _NOT_FOR_ATTENTION:
            continue
        if name == "output_attentions":
            raise ValueError(_WEIGHTS)
        if not name.startswith("output_"):
            hint = _HINTS.get(name, "attn_implementation='fastattn' does not know this argument")
            raise ValueError(f"{name}: expected None, {hint}; got {_short(given)}")
    if not torch.compiler.is_compiling() and _weights_are_collected():
        raise ValueError(_WEIGHTS)


def _weights_are_collected() -> bool:
    """Whether ``output_attentions=True`` was asked of a model that does not tell its attention layers."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    collected = None if collector is None else collector.get()
    return any(name.endswith("attentions") for name in collected or ())


def _short(given: Any) -> str:
    return f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__

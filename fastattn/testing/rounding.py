"""What rounding alone may do to each result of an attention call, for the rule of `fastattn.testing`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import ops
from fastattn.backends.reference import definition
from fastattn.backends.reference.dropout import dropout_keep, keep_scale
from fastattn.backends.reference.packed import packed_sequences
from fastattn.spec import Operands, Options, make_spec


class Effect(NamedTuple):
    """What rounding may do to one result, for each element or for all: `docs/numerics.md`, "The rounding term"."""

    summed: Tensor
    """the sum of the absolute values of the terms that are summed on the way to the result"""
    stored: Tensor = torch.zeros(())
    """the error that follows from the rounding of the output that the forward pass stored"""


def learned_operands(options: dict[str, Any]) -> dict[str, Tensor]:
    """The float tensors beside q, k and v, whose gradients may be wanted."""
    names = ("bias", "alibi_slopes", "sinks")
    return {name: options[name] for name in names if options.get(name) is not None}


def effects(
    inputs: dict[str, Any], options: dict[str, Any], seed: int, out: Tensor, lse: Tensor, actual_out: Tensor,
    first_batch: int = 0, lse_alone: bool = False,
) -> dict[str, Effect]:  # fmt: skip
    """The effect of rounding on each result, to first order.

    A fused backward has ``dS = P * (dP - delta)`` with ``P = exp(S - lse)`` and ``delta = sum(dO * O) - dlse``. Every
    term is rounded in the accumulator at its own size, not at that of the sum, since large terms may cancel. Besides,
    delta reads the O that the forward pass stored in the dtype of the inputs. That is ``actual_out``, which is itself
    held to the rule; ``out`` and ``lse`` are exact, in float64.

    ``lse_alone``: P is computed from an lse that was rounded at its own size, as PyTorch's kernel does. The absolute
    error of the exponent is then P's relative error. Ours store the maximum and the logarithm of the sum apart.
    """
    q, k, v = (inputs[name].detach().double() for name in ("q", "k", "v"))
    learned = {name: x.detach().double() for name, x in learned_operands(options).items()}
    spec = make_spec(q, k, v, **{**options, **learned})
    assert spec.q_offset is not None
    dout, dlse = inputs["dout"].double(), inputs.get("dlse")
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    operands = definition.cut(spec.operands(None), (0, q.shape[2]), (0, k.shape[2]))
    s, tanh, distance = definition.scores(q, k, operands, spec.options, 0, 0)
    finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    p = torch.exp(s - finite_lse)
    kept = torch.ones(())
    if spec.dropout_p > 0.0:
        torch.manual_seed(seed)
        batch, q_heads, q_len, kv_len = p.shape
        kept = dropout_keep(
            ops.draw_seed(q.device), spec.dropout_p, batch, q_heads, (0, q_len), (0, kv_len), first_batch
        )
        kept = kept.double() * keep_scale(spec.dropout_p)
    delta, delta_size = (dout * out).sum(-1), (dout * out).abs().sum(-1)
    if dlse is not None:
        dlse = dlse.double().masked_fill(lse == -torch.inf, 0.0)
        delta, delta_size = delta - dlse, delta_size + dlse.abs()
    far = distance.abs().double()
    ds = p * ((dout.abs() @ v.abs().mT) * kept + delta_size[..., None])
    p_size = p * kept
    if lse_alone:
        exponent = abs(spec.scale) * (q.abs() @ k.abs().mT) + finite_lse.abs()
        if spec.bias is not None:
            exponent = exponent + spec.bias.nan_to_num(neginf=0.0).abs()
        ds = ds + p * exponent * ((dout @ v.mT) * kept - delta[..., None]).abs()
        p_size = p_size * (1.0 + exponent)
    ds_stored = p * (dout * (actual_out.detach().double() - out)).sum(-1, keepdim=True)
    scale = abs(spec.scale)
    capped, capped_stored = ds, ds_stored
    if tanh is not None:
        capped, capped_stored = ds * (1.0 - tanh * tanh), ds_stored * (1.0 - tanh * tanh)

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (inputs["k"].shape[1], -1)).sum(2)

    found = {
        "out": Effect(p * kept @ v.abs()),
        "lse": Effect(p.sum(-1)),
        "dq": Effect(capped @ k.abs() * scale, capped_stored @ k * scale),
        "dk": Effect(per_key_head(capped.mT @ q.abs()) * scale, per_key_head(capped_stored.mT @ q) * scale),
        "dv": Effect(per_key_head(p_size.mT @ dout.abs())),
    }
    if spec.bias is not None:
        found["dbias"] = Effect(ds.sum_to_size(spec.bias.shape), ds_stored.sum_to_size(spec.bias.shape))
    if spec.alibi_slopes is not None:
        sizes = ((x * far).sum((2, 3)).sum_to_size(spec.alibi_slopes.shape) for x in (ds, ds_stored))
        found["dalibi_slopes"] = Effect(*(x.view(options["alibi_slopes"].shape) for x in sizes))
    if spec.sinks is not None:
        p_sink = torch.exp(spec.sinks[:, None] - finite_lse.squeeze(-1))
        moved = (dout * (actual_out.detach().double() - out)).sum(-1)
        found["dsinks"] = Effect((p_sink * delta_size).sum((0, 2)), (p_sink * moved).sum((0, 2)))
    return found


def packed_effects(
    inputs: dict[str, Any], options: dict[str, Any], seed: int, out: Tensor, lse: Tensor, actual_out: Tensor
) -> dict[str, Effect]:
    """`effects` of each packed sequence, put together."""
    options = dict(options)
    packing = {name: options.pop(name, None) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "kv_start")}
    slopes, q_offset = options.get("alibi_slopes"), options.get("q_offset")
    per_sequence = slopes is not None and slopes.ndim == 2
    offsets, fixed = (q_offset, 0) if isinstance(q_offset, Tensor) else (None, q_offset)
    parts = []
    sequences = list(packed_sequences(Operands(q_offset_tensor=offsets, **packing), Options(q_offset=fixed)))
    for one in sequences:
        own = {name: x[:, :, one.keys if name in ("k", "v") else one.rows] for name, x in inputs.items()}
        own_offset = one.options.q_offset if offsets is None else one.operands.q_offset_tensor
        own_options = options | {"q_offset": own_offset}
        if (starts := one.operands.kv_start) is not None:
            own_options["kv_start"] = starts.clamp(max=own["k"].shape[2])
        if slopes is not None:
            own_options["alibi_slopes"] = slopes[one.number] if per_sequence else slopes
        results = (x[:, :, one.rows] for x in (out, lse, actual_out))
        parts.append(effects(own, own_options, seed, *results, first_batch=one.number))
    found = {}
    for name in parts[0]:
        both = []
        for sizes in zip(*(part[name] for part in parts), strict=True):
            if name in ("dalibi_slopes", "dsinks"):
                stacked = torch.stack(sizes)
                both.append(stacked if per_sequence and name == "dalibi_slopes" else stacked.sum(0))
            elif sizes[0].ndim == 0:
                both.append(sizes[0])
            else:  # what belongs to no sequence is 0
                length = inputs[{"dk": "k", "dv": "v"}.get(name, "q")].shape[2]
                whole = sizes[0].new_zeros(*sizes[0].shape[:2], length, *sizes[0].shape[3:])
                for one, own in zip(sequences, sizes, strict=True):
                    whole[:, :, one.keys if name in ("dk", "dv") else one.rows] = own
                both.append(whole)
        found[name] = Effect(*both)
    return found

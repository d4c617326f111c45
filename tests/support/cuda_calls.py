"""Calls of the CUDA C++ kernel, and the comparison with the specification: for its model and for a GPU."""

import itertools

import torch

from fastattn import ops, reference
from fastattn.spec import make_spec
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, HALF, make_qkv

DTYPES = (HALF, BFLOAT)
KEYS = {64: 128, 128: 128, 256: 64}
"""head dim -> keys of a tile"""


def specification(spec, dtype):
    q, k, v = (t.detach().to(dtype) for t in (spec.q, spec.k, spec.v))
    return reference_call(spec, q, k, v, None if spec.sinks is None else spec.sinks.to(dtype))


def reference_call(spec, q, k, v, sinks):
    packed = {"cu_seqlens_q": spec.cu_seqlens_q, "cu_seqlens_k": spec.cu_seqlens_k, "seqused_k": spec.seqused_k}
    offsets = spec.q_offset_tensor
    return reference.attention(
        q, k, v, sinks=sinks, q_offset_tensor=offsets, block_mask=[], **packed, **spec.options._asdict()
    )


def make_inputs(device, lengths, *, dim, dtype=HALF, heads=(2, 2), used=None, **shapes):
    """(q, k, v), and the arguments that go with them.

    Where ``lengths`` are lists they are those of packed sequences, (total, heads, D) in memory, of which ``used`` keys
    take part. Whatever belongs to no sequence, at the ends too, is NaN.
    """
    if isinstance(lengths[0], int):
        return make_qkv(device, lengths, dims=(dim, dim), dtype=dtype, heads=heads, **shapes), {}
    starts = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device=device) for x in lengths]
    bounds = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    if used is not None:
        bounds["seqused_k"] = torch.tensor(used, device=device)
    taken = [lengths[0], *2 * [lengths[1] if used is None else used]]
    made = []
    for room, own, count in zip((lengths[0], lengths[1], lengths[1]), taken, (heads[0], *2 * heads[1:]), strict=True):
        x = torch.full((sum(room) + 3, count, dim), torch.nan)
        for start, rows in zip(itertools.accumulate(room, initial=0), own, strict=False):
            x[start : start + rows] = torch.randn(rows, count, dim)
        made.append(x.to(device, dtype).transpose(0, 1)[None])
    return made, bounds


def check_forward(q, k, v, sinks=None, **options):
    """Out of the backend "cuda"; it and lse are held to the rule. Below the choice of a backend, so on any device.

    ``sinks``: one logit for each query head, as numbers; so is ``q_offset``, if it is a tuple.
    """
    if sinks is not None:
        options["sinks"] = torch.tensor(sinks, device=q.device)
    if isinstance(options.get("q_offset"), tuple):
        options["q_offset"] = torch.tensor(options["q_offset"], device=q.device)
    spec = make_spec(q, k, v, return_lse=True, **options)
    out, lse = ops.attention(spec, "cuda")
    expected_out, expected_lse = specification(spec, torch.float64)
    assert_parity(out, expected_out, specification(spec, q.dtype)[0], "out")
    assert_parity(lse, expected_lse, specification(spec, torch.float32)[1], "lse")
    return out


def check_backward(q, k, v, sinks=None, dout=None, lse_gradient=True, **options):
    """(dq, dk, dv, dsinks) of the backend "cuda", held to the rule; ``dsinks`` is None where there is no sink.

    ``dout`` (B, Hq, Lq, D), or one at random; with ``lse_gradient`` another one flows in through lse.
    """
    if isinstance(options.get("q_offset"), tuple):
        options["q_offset"] = torch.tensor(options["q_offset"], device=q.device)
    own = [t.detach().requires_grad_() for t in (q, k, v)]
    if sinks is not None:
        own.append(torch.tensor(sinks, device=q.device, dtype=torch.float32).requires_grad_())
    spec = make_spec(*own[:3], return_lse=True, sinks=own[3] if len(own) > 3 else None, **options)
    out, lse = ops.attention(spec, "cuda")
    seen = lse.detach() != -torch.inf
    dout = torch.randn_like(out) if dout is None else dout
    dlse = torch.randn_like(lse) if lse_gradient else torch.zeros_like(lse)

    def gradients(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in own]
        results = reference_call(spec, *leaves[:3], leaves[3] if len(leaves) > 3 else None)
        given = (dout.to(dtype), (dlse * seen).to(dtype))
        return torch.autograd.grad(results, leaves, given)

    given = (dout, dlse * seen) if lse_gradient else (dout,)
    actual = torch.autograd.grad((out, lse) if lse_gradient else (out,), own, given)
    expected, eager = gradients(torch.float64), gradients(q.dtype)
    for name, x, y, z in zip(("dq", "dk", "dv", "dsinks"), actual, expected, eager, strict=False):
        assert_parity(x, y, z, name)
    return actual


# Name -> lengths, others of make_inputs, arguments of the function. Tails, several tiles, rows that see nothing.
CASES = {
    "one tile": ((128, 128), {}, {}),
    "one query": ((1, 300), {}, {"causal": True}),
    "tails": ((130, 259), {}, {}),
    "more queries than keys": ((259, 130), {}, {}),
    "causal": ((300, 300), {}, {"causal": True}),
    "causal, Lq < Lk": ((77, 390), {}, {"causal": True}),
    "causal, first rows see nothing": ((300, 130), {}, {"causal": True}),
    "causal, top left": ((200, 300), {}, {"causal": True, "q_offset": 0}),
    "offsets": ((70, 150), {"batch": 3}, {"causal": True, "q_offset": (80, -30, 9)}),
    "nothing visible": ((5, 7), {}, {"causal": True, "q_offset": -9}),
    "no keys": ((5, 0), {}, {}),
    "grouped heads": ((66, 140), {"heads": (6, 2), "batch": 2}, {"causal": True}),
    "grouped heads, one query": ((1, 300), {"heads": (8, 2)}, {"causal": True}),
    "grouped heads, seven": (
        (20, 140),
        {"heads": (7, 1)},
        {"causal": True, "sinks": (0.5, -3.0, 9.0, 1.0, 2.0, 0.0, -1.0)},
    ),
    "grouped heads, as many as rows": ((3, 70), {"heads": (64, 1)}, {"window": (50, 1), "softcap": 3.0}),
    "packed": (([5, 0, 135, 1, 40], [9, 20, 70, 200, 0]), {}, {"causal": True}),
    "packed, grouped heads": (
        ([0, 31, 1, 66, 0], [0, 31, 140, 20, 5]),
        {"heads": (6, 2)},
        {"sinks": (1.0, 0, 3.0, -2.0, 0, 5.0)},
    ),
    "packed, not all keys": (([30, 3, 17], [150, 0, 64]), {"used": [131, 0, 11]}, {"causal": True, "q_offset": 50}),
    "packed, offsets": (([30, 17], [150, 64]), {}, {"window": (40, 0), "q_offset": (120, 3)}),
    "scale": ((40, 200), {}, {"scale": 1.5}),
    "window": ((200, 400), {}, {"window": (70, 30)}),
    "window, causal": ((300, 300), {"heads": (4, 2)}, {"window": (100, None), "causal": True}),
    "window to the right": ((140, 400), {}, {"window": (-40, 300), "q_offset": 0}),
    "window, some rows see nothing": ((300, 130), {}, {"window": (20, 5), "q_offset": 0}),
    "window of one key": ((150, 150), {}, {"window": (0, 0)}),
    "softcap": ((130, 200), {}, {"softcap": 2.0, "causal": True}),
    "softcap, large": ((70, 140), {}, {"softcap": 30.0, "window": (60, 20)}),
    "sinks": ((130, 200), {"heads": (4, 2)}, {"sinks": (0.5, -3.0, 9.0, -100.0), "causal": True}),
    "sinks, first rows see nothing": ((300, 130), {}, {"sinks": (1.0, -2.0), "causal": True}),
    "window, softcap and sinks": ((200, 200), {}, {"sinks": (0.0, 2.0), "softcap": 5.0, "window": (90, 3)}),
}

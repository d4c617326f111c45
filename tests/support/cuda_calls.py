"""Calls of the CUDA C++ kernel, and the comparison with the specification: for its model and for a GPU."""

import torch

from fastattn import ops, reference
from fastattn.spec import make_spec
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, HALF

DTYPES = (HALF, BFLOAT)


def specification(spec, dtype):
    q, k, v = (t.detach().to(dtype) for t in (spec.q, spec.k, spec.v))
    return reference.attention(
        q, k, v, None, None, None, None, None, None, None, None, [],
        left=None, right=spec.right, q_offset=spec.q_offset, scale=spec.scale, softcap=None, dropout_p=0.0,
    )  # fmt: skip


def check_forward(q, k, v, **options):
    """Out of the backend "cuda"; it and lse are held to the rule. Below the choice of a backend, so on any device."""
    spec = make_spec(q, k, v, return_lse=True, **options)
    out, lse = ops.attention(spec, "cuda")
    expected_out, expected_lse = specification(spec, torch.float64)
    assert_parity(out, expected_out, specification(spec, q.dtype)[0], "out")
    assert_parity(lse, expected_lse, specification(spec, torch.float32)[1], "lse")
    return out


# Name -> lengths, other arguments of make_qkv, arguments of the function. Tails, several tiles, rows that see nothing.
CASES = {
    "one tile": ((128, 128), {}, {}),
    "one query": ((1, 300), {}, {"causal": True}),
    "tails": ((130, 259), {}, {}),
    "more queries than keys": ((259, 130), {}, {}),
    "causal": ((300, 300), {}, {"causal": True}),
    "causal, Lq < Lk": ((77, 390), {}, {"causal": True}),
    "causal, first rows see nothing": ((300, 130), {}, {"causal": True}),
    "causal, top left": ((200, 300), {}, {"causal": True, "q_offset": 0}),
    "nothing visible": ((5, 7), {}, {"causal": True, "q_offset": -9}),
    "no keys": ((5, 0), {}, {}),
    "grouped heads": ((66, 140), {"heads": (6, 2), "batch": 2}, {"causal": True}),
    "scale": ((40, 200), {}, {"scale": 1.5}),
}

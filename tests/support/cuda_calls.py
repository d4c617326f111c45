"""Calls of the CUDA C++ kernel, and the comparison with the specification: for its model and for a GPU."""

import torch

from fastattn import ops, reference
from fastattn.spec import make_spec
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, HALF

DTYPES = (HALF, BFLOAT)
KEYS = {64: 128, 128: 128, 256: 64}
"""head dim -> keys of a tile"""


def specification(spec, dtype):
    q, k, v = (t.detach().to(dtype) for t in (spec.q, spec.k, spec.v))
    sinks = None if spec.sinks is None else spec.sinks.to(dtype)
    return reference.attention(q, k, v, sinks=sinks, block_mask=[], **spec.options._asdict())


def check_forward(q, k, v, sinks=None, **options):
    """Out of the backend "cuda"; it and lse are held to the rule. Below the choice of a backend, so on any device.

    ``sinks``: one logit for each query head, as numbers.
    """
    if sinks is not None:
        options["sinks"] = torch.tensor(sinks, device=q.device)
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

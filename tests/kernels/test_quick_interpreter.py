"""The interpreter that tests use computes what Triton's own computes, and leaves `triton.language` as it was."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from fastattn import attention
from fastattn.kernels import launch
from tests.support import quick_interpreter
from tests.support.attention_cases import make_bias, make_qkv

pytestmark = pytest.mark.skipif(not launch.INTERPRETED.value, reason="kernels are compiled here, not interpreted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_without_it(device, dtype):
    q, k, v = (x.requires_grad_() for x in make_qkv(device, (33, 70), dtype=dtype))
    bias = make_bias(device, (1, 2, 33, 70), requires_grad=True)

    def run():
        out = attention(q, k, v, causal=True, bias=bias, softcap=3.0, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), (q, k, v, bias))]

    quick, ours = run(), TritonSemantic.broadcast_impl_value
    with quick_interpreter.without():
        assert TritonSemantic.broadcast_impl_value is not ours
        assert all(map(torch.equal, quick, run()))
    assert TritonSemantic.broadcast_impl_value is ours


@pytest.mark.parametrize("columns", [3, 16, 70])
def test_products_round_alike_in_every_order(columns):
    """A product and the transposed one; OpenBLAS of a processor with FMA rounds them differently at such widths."""
    a, b, start = (
        np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((64, 48), (48, 70), (64, 70))
    )
    b, start = b[:, :columns], start[:, :columns]
    dot = interpreter.interpreter_builder.create_dot
    one, other = (
        dot(*(interpreter.TensorHandle(x, tl.float32) for x in group), None, None).data
        for group in ((a, b, start), (b.T, a.T, start.T))
    )
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, other.T)


def test_the_language_is_as_before_after_a_launch(device):
    before = dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math))
    attention(*make_qkv(device, (33, 70)), backend="triton")
    assert before == (dict(vars(tl)), dict(vars(tl.tensor)), dict(vars(tl.math)))


def test_the_language_is_as_before_after_a_launch_that_fails(device, monkeypatch):
    before = dict(vars(tl))

    def fail(self, *arguments):
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", fail)
        with pytest.raises(Exception, match="on purpose"):
            attention(*make_qkv(device, (33, 70)), backend="triton")
    assert before == dict(vars(tl))
    attention(*make_qkv(device, (33, 70)), backend="triton")

"""The operator inside PyTorch: opcheck, torch.compile, autocast, and launches that do not depend on a length."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import ops


def qkv(q_len=33, kv_len=47, dim=16, v_dim=24):
    return (
        torch.randn(2, 4, q_len, dim, requires_grad=True),
        torch.randn(2, 2, kv_len, dim, requires_grad=True),
        torch.randn(2, 2, kv_len, v_dim, requires_grad=True),
    )


def operands(q_len=33, kv_len=47):
    return {
        "mask": torch.rand(2, 1, 1, kv_len) > 0.3,
        "bias": torch.randn(1, 4, q_len, kv_len, requires_grad=True),
        "alibi_slopes": torch.rand(4, requires_grad=True),
        "sinks": torch.randn(4, requires_grad=True),
    }


SEED = torch.tensor([5])
BLOCKS = fastattn.BlockMask.from_mask(torch.rand(33, 47) > 0.3).tensors
NO_OPERANDS = (None,) * 5  # mask to offsets, before the seed and the packed sequences
OPTIONS = {
    "plain": (*NO_OPERANDS, None, None, None, None, None, [], None, None, 0, 0.25, None, 0.0),
    "causal": (*NO_OPERANDS, None, None, None, None, None, [], None, 0, 14, 0.25, None, 0.0),
    "window, softcap, dropout": (*NO_OPERANDS, SEED, None, None, None, None, [], 9, 3, 14, 0.25, 5.0, 0.3),
    "offsets": (*NO_OPERANDS[1:], torch.tensor([3, 20]), None, None, None, None, None, [], None, 0, 0, 0.25, None, 0.0),
    "block mask": (*NO_OPERANDS, None, None, None, None, None, list(BLOCKS), None, None, 0, 0.25, None, 0.0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_opcheck_forward(options):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, uninitialised memory included
    torch.library.opcheck(torch.ops.fastattn.attention_forward.default, (*qkv(), *options, "reference"))


@pytest.mark.filterwarnings("ignore")
def test_opcheck_with_every_operand():
    q, k, v = qkv()
    mask, bias, slopes, sinks = operands().values()
    args = (
        q, k, v, mask, bias, slopes[None].detach(), sinks, None, SEED, None, None, None, None, list(BLOCKS),
        9, 3, 14, 0.25, 5.0, 0.3, "reference",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fastattn.attention_forward.default, args)
    with torch.no_grad():
        out, lse, statistics = torch.ops.fastattn.attention_forward.default(*args)
    tensors = (torch.randn_like(out), torch.randn_like(lse), *(t.detach() for t in (q, k, v)), out, statistics)
    torch.library.opcheck(
        torch.ops.fastattn.attention_backward.default,
        (*tensors, *(t.detach() if isinstance(t, torch.Tensor) else t for t in args[3:]), [True, True, False]),
        test_utils=("test_schema", "test_faketensor"),
    )


CALLS = {
    "torch backend": {},
    "causal and mask": {"causal": True, "q_offset": 0, "mask": True},
    "bias with gradient": {"bias": True},
    "dropout": {"dropout_p": 0.1, "causal": True},
    "lse": {"return_lse": True},
    "everything": {"mask": True, "bias": True, "alibi_slopes": True, "sinks": True, "window": (9, 3), "softcap": 5.0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_compiles_whole_and_computes_the_same(call, dynamic):
    torch._dynamo.reset()
    tensors = operands()
    kwargs = {name: tensors[name] if value is True and name in tensors else value for name, value in call.items()}
    inputs = qkv()
    leaves = [*inputs, *(t for t in kwargs.values() if isinstance(t, torch.Tensor) and t.requires_grad)]

    def run(function):
        torch.manual_seed(0)
        result = function(*inputs, **kwargs)
        out = result[0] if isinstance(result, tuple) else result
        return out, torch.autograd.grad(out.sum(), leaves)

    compiled = torch.compile(fastattn.attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    out, gradients = run(compiled)
    expected, expected_gradients = run(fastattn.attention)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, gradients, expected_gradients))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kwargs", [{}, {"causal": True}, {"return_lse": True}], ids=["plain", "causal", "lse"])
def test_a_new_length_is_not_compiled_again(kwargs):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fastattn.attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for length in (17, 32, 64, 100, 129):
        q = torch.randn(2, 4, length, 16)
        compiled(q, q, q, **kwargs)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_autocast_casts_activations_and_leaves_the_bias():
    q, k, v = qkv()
    bias = torch.randn(33, 47, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = fastattn.attention(*(t.bfloat16() for t in (q, k, v)), bias=bias)
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32 and q.grad.dtype == torch.float32


def test_third_derivative_is_refused_not_wrong():
    q, k, v = qkv()
    out = fastattn.attention(q, k, v, backend="reference")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not three times"):
        second.sum().backward()


def test_seed_comes_from_the_default_generator():
    torch.manual_seed(3)
    first = ops.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, ops.draw_seed(torch.device("cpu")))


# Runs outside the interpreter: launches are caught before they need a driver, and asked what would be compiled.
COUNT_SPECIALISATIONS = """
import sys
from unittest import mock
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from fastattn.kernels import backward, forward, launch
from fastattn.spec import Gradients, Operands, Options

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = {}

def launcher(function, grid):
    def catch(*args, **kwargs):
        binder = create_function_from_signature(function.signature, function.params, backend)
        _, specialization, options = binder(*args, **kwargs)
        keys.setdefault(function.__name__, set()).add(str((specialization, options)))
    return catch

def run(length, kv_length, dim, heads_last, batch=2, heads=4, mask=False, bias=False):
    def empty(heads, length):
        if heads_last:
            return torch.empty(batch, length, heads, dim, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        return torch.empty(batch, heads, length, dim, device="meta", dtype=torch.bfloat16)
    q, k, v = empty(heads, length), empty(heads // 2, kv_length), empty(heads // 2, kv_length)
    statistics = torch.empty(2, batch, heads, length, device="meta")
    m = torch.empty(batch, 1, 1, kv_length, dtype=torch.bool, device="meta") if mask else None
    b = torch.empty(1, heads, length, kv_length, device="meta") if bias else None
    call = Operands(mask=m, bias=b), Options(right=0, q_offset=kv_length - length, scale=0.1)
    forward.attention_forward(q, statistics[0], statistics, q, k, v, *call)
    gradients = Gradients(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), b)
    backward.attention_backward(gradients, q, None, q, k, v, q, statistics, *call)

LENGTHS = ((1, 1), (2, 16), (16, 17), (64, 64), (77, 1000), (128, 4096), (1000, 77), (65536, 131072))
with mock.patch.object(JITFunction, "__getitem__", launcher), \\
        mock.patch.object(launch, "architecture", lambda device: "sm_90"), \\
        mock.patch.object(torch.Tensor, "data_ptr", lambda self: 0):
    for case in (dict(dim=64, heads_last=False), dict(dim=64, heads_last=True), dict(dim=59, heads_last=False),
                 dict(dim=59, heads_last=True), dict(dim=64, heads_last=False, mask=True, bias=True)):
        keys.clear()
        for batch, heads in ((2, 4), (1, 2), (3, 6)):
            for lengths in LENGTHS:
                run(*lengths, batch=batch, heads=heads, **case)
        for name, found in keys.items():
            # A mask or bias of one row is the same as one that broadcasts over rows: at most two layouts.
            limit = 2 if case.get("bias") and name != "delta_kernel" else 1
            assert len(found) <= limit, "\\n".join([f"{case} {name}", *sorted(found)])
        print(case, {name: len(found) for name, found in keys.items()})
"""


def test_kernels_are_compiled_once_for_all_lengths():
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "0", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", COUNT_SPECIALISATIONS], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("forward_kernel") == 5

"""PyTorch's own attention served by fastattn: that it is, that it is right, and that it is undone exactly."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.library import Library
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

import fastattn
from fastattn import attention, attention_varlen, backends
from fastattn.integrations.activate import _Flash
from tests.support.attention_cases import BFLOAT, HALF, SINGLE, make_bias, make_mask, make_qkv
from tests.support.layer_checks import assert_parity, cast, run

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = [name for table in _Flash("reference").tables().values() for name in table]


@pytest.fixture(autouse=True)
def inactive():
    yield
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()


@pytest.fixture
def calls(monkeypatch):
    """How often each backend ran in each direction."""
    counter = Counter()
    for backend in ("reference", "triton"):
        module = backends.module(backend)
        for direction in ("forward", "backward"):
            counting = functools.partial(_counted, counter, (backend, direction), getattr(module, direction))
            monkeypatch.setattr(module, direction, counting)
    return counter


def _counted(counter, key, run, *args):
    counter.update([key])
    return run(*args)


def registrations():
    """Every kernel of every operator that `activate` may replace, as PyTorch lists them."""
    return [torch._C._dispatch_dump(f"aten::{name}") for name in OPERATORS]


def results(function, inputs, seed=0):
    """Output, and the gradients of a fixed weighted sum of it."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@contextlib.contextmanager
def lse_alone():
    """Ours keep for the backward pass what PyTorch's operators keep, which is lse alone."""
    with pytest.MonkeyPatch.context() as patch:
        for backend in ("reference", "triton"):
            module = backends.module(backend)
            patch.setattr(module, "forward", functools.partial(_forgetting, module.forward, backend))
        yield


def _forgetting(forward, backend, out, lse, statistics, q, k, v, operands, *rest):
    forward(out, lse, statistics, q, k, v, operands, *rest)
    statistics.copy_(backends.statistics_of(lse, operands, backend))


def expected_results(function, inputs):
    """`results` of ours, as PyTorch's operators can give them."""
    with lse_alone():
        return results(function, inputs)


def assert_equal(ours, expected):
    """To the bit."""
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(x, y)


CALLS = {
    "plain": ({}, {}),
    "causal, top-left": ({"is_causal": True}, {"causal": True, "q_offset": 0}),
    "boolean mask": ({"attn_mask": make_mask("cpu", (1, 1, 33, 47))}, "mask"),
    "float mask": ({"attn_mask": make_bias("cpu", (33, 47))}, "bias"),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("call", CALLS)
def test_scaled_dot_product_attention(call, backend, calls):
    """What PyTorch's function computes is what ours computes, to the bit."""
    options, ours = CALLS[call]
    if isinstance(ours, str):  # PyTorch turns a boolean mask into a float one
        mask = options["attn_mask"]
        ours = {"bias": torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask}
    inputs = make_qkv("cpu", (33, 47), dtype=SINGLE)
    expected = expected_results(lambda q, k, v: attention(q, k, v, backend=backend, return_lse=True, **ours)[0], inputs)
    calls.clear()
    with fastattn.activate(backend=backend):
        actual = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), inputs)
    assert calls == {(backend, "forward"): 1, (backend, "backward"): 1}
    assert_equal(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_grouped_heads_and_half_precision(backend, calls):
    inputs = make_qkv("cpu", (33, 33), heads=(4, 2), dtype=HALF)
    expected = expected_results(lambda q, k, v: attention(q, k, v, causal=True, backend=backend), inputs)
    calls.clear()
    with fastattn.activate(backend=backend):
        actual = results(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), inputs
        )
    assert calls.total() == 2
    assert_equal(actual, expected)


LAYERS = {
    "MultiheadAttention": (
        lambda: torch.nn.MultiheadAttention(32, 2, batch_first=True),
        lambda x: ([x, x, x], {"need_weights": False}),
    ),
    "TransformerEncoderLayer": (
        lambda: torch.nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True),
        lambda x: ([x], {"src_key_padding_mask": torch.arange(17) >= torch.tensor([[17], [9]])}),
    ),
}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch_train_on_it(name, backend, calls):
    make, arguments = LAYERS[name]
    layer = make()
    args, kwargs = arguments(torch.randn(2, 17, 32))
    exact, eager = run(cast_layer(make, layer), *cast((args, kwargs), torch.float64)), run(layer, args, kwargs)
    with fastattn.activate(backend=backend):
        ours = run(layer, args, kwargs)
    assert calls == {(backend, "forward"): 1, (backend, "backward"): 1}
    for key, result in ours.items():
        assert_parity(result, exact[key], eager[key], key, intermediate=exact[key].abs().max())


def cast_layer(make, layer):
    double = make().double()
    double.load_state_dict(layer.state_dict())
    return double


def test_bfloat16_of_autocast_arrives_as_it_is():
    q, k, v = make_qkv("cpu", (33, 47), dtype=SINGLE)
    with torch.autocast("cpu", dtype=BFLOAT), fastattn.activate(backend="reference"):
        out = F.scaled_dot_product_attention(q, k, v)
    halves = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, attention(*halves, backend="reference"))


def test_by_default_the_cpu_keeps_its_kernel(calls):
    inputs = make_qkv("cpu", (33, 47), dtype=SINGLE)
    expected = results(F.scaled_dot_product_attention, inputs)
    with fastattn.activate():
        assert torch_attention.current_flash_attention_impl() == "fastattn"
        assert_equal(results(F.scaled_dot_product_attention, inputs), expected)
    assert not calls


def test_our_own_function_still_works_under_it():
    """Whose backend of choice on CPU is the kernel that has been replaced."""
    inputs = make_qkv("cpu", (33, 33), dtype=SINGLE)
    with fastattn.activate(backend="reference"):
        actual = results(lambda *x: attention(*x, causal=True), inputs)
    assert_equal(actual, expected_results(lambda *x: attention(*x, causal=True, backend="reference"), inputs))


# Undone exactly


class Counting:
    """An implementation of somebody else's."""

    def __init__(self):
        self.calls = 0

    def register(self):
        self.library = Library("aten", "IMPL", "CPU")
        self.library.impl("_scaled_dot_product_flash_attention_for_cpu", self.kernel, "CPU")
        return self

    def kernel(self, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        self.calls += 1
        return query.clone(), query[..., 0].float()

    def remove(self):
        del self.library


@pytest.mark.parametrize("undo", ["deactivate", "with"])
@pytest.mark.parametrize("times", [1, 3])
def test_pytorchs_kernels_come_back(undo, times, calls):
    inputs = make_qkv("cpu", (33, 47), dtype=SINGLE)
    before, expected = registrations(), results(F.scaled_dot_product_attention, inputs)
    with contextlib.ExitStack() as stack:
        for _ in range(times):
            context = fastattn.activate(backend="reference")
            if undo == "with":
                stack.enter_context(context)
        during = registrations()
        assert all(x != y for x, y in zip(before, during, strict=True))
        if undo == "deactivate":
            fastattn.deactivate()
    assert torch_attention.current_flash_attention_impl() is None
    assert registrations() == before
    assert_equal(results(F.scaled_dot_product_attention, inputs), expected)
    assert not calls


@pytest.mark.filterwarnings("ignore:(?s)Warning only once")
def test_another_implementation_comes_back():
    other = Counting()
    torch_attention.register_flash_attention_impl("counting", register_fn=other.register)
    torch_attention.activate_flash_attention_impl("counting")
    q, k, v = make_qkv("cpu", (33, 47), dtype=SINGLE)
    for undo in ("deactivate", "with"):
        with fastattn.activate(backend="reference"):
            fastattn.activate(backend="reference")
            F.scaled_dot_product_attention(q, k, v)
            assert other.calls == 0
            if undo == "deactivate":
                fastattn.deactivate()
                assert torch_attention.current_flash_attention_impl() == "counting"
        assert torch_attention.current_flash_attention_impl() == "counting"
        F.scaled_dot_product_attention(q, k, v)
        assert other.calls == 1
        other.calls = 0


def test_an_inner_activation_leaves_the_outer_one(calls):
    q, k, v = make_qkv("cpu", (17, 17), dtype=SINGLE)
    with fastattn.activate(backend="reference"):
        with fastattn.activate(backend="triton"):
            F.scaled_dot_product_attention(q, k, v)
        F.scaled_dot_product_attention(q, k, v)
    F.scaled_dot_product_attention(q, k, v)
    assert calls == {("triton", "forward"): 1, ("reference", "forward"): 1}


def test_deactivate_without_activate():
    with pytest.raises(RuntimeError, match="fastattn is not active, torch's registry has None"):
        fastattn.deactivate()


def test_without_the_registry(monkeypatch):
    monkeypatch.delattr(torch_attention, "activate_flash_attention_impl")
    for function in (fastattn.activate, fastattn.deactivate):
        with pytest.raises(RuntimeError, match="registry of flash implementations"):
            function()


def test_pytorchs_kernel_is_no_backend():
    with pytest.raises(ValueError, match="backend: expected 'triton', 'cuda', 'reference' or None, got 'torch'"):
        fastattn.activate(backend="torch")
    assert torch_attention.current_flash_attention_impl() is None


def test_a_backend_that_cannot_serve_a_call_says_so():
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    with (
        fastattn.activate(backend="triton"),
        pytest.raises(ValueError, match="backend 'triton' cannot serve this call"),
    ):
        F.scaled_dot_product_attention(q, q, q)


def test_nothing_is_registered_on_import_and_nobody_is_warned():
    code = """
        import torch, fastattn
        assert torch.nn.attention.current_flash_attention_impl() is None
        assert "fastattn" not in torch.nn.attention.list_flash_attention_impls()
        for _ in range(2):
            with fastattn.activate(backend="reference"):
                pass
    """
    command = [sys.executable, "-W", "error:Warning only once", "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


# The operators of CUDA, on CPU tensors


@pytest.fixture
def cuda_table():
    """PyTorch's CUDA operators have no kernels for CPU: ours take the place."""
    library = Library("aten", "IMPL", "CPU")
    for name, kernel in _Flash("reference").tables()["CUDA"].items():
        library.impl(name, kernel, "CPU")
    yield torch.ops.aten
    library._destroy()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("layout", ["heads first", "heads last"])
def test_the_cuda_operator_of_sdpa(cuda_table, options, layout):
    """Bottom-right; dropout's seed reaches the backward in the random state."""
    inputs = make_qkv("cpu", (33, 47), dtype=HALF)
    if layout == "heads last":
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    ours = {"causal" if name == "is_causal" else name: value for name, value in options.items()}
    expected = expected_results(lambda q, k, v: attention(q, k, v, backend="reference", **ours), inputs)
    everything = []

    def call(q, k, v):
        everything[:] = cuda_table._scaled_dot_product_flash_attention(q, k, v, **options)
        return everything[0]

    assert_equal(results(call, inputs), expected)
    fake = torch.ops.aten._scaled_dot_product_flash_attention(*(x.to("meta") for x in inputs), **options)
    for x, y in zip(everything, fake, strict=True):
        if isinstance(y, torch.Tensor):
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        else:
            assert x == y


POSITIONS = [({}, {}), ({"window_size_left": 5, "window_size_right": -1}, {"window": (5, None)})]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("options", "ours"), POSITIONS, ids=["open", "window"])
def test_the_cuda_operator_below(cuda_table, causal, options, ours):
    inputs = [x.transpose(1, 2).contiguous() for x in make_qkv("cpu", (33, 47), dtype=HALF)]

    def theirs(q, k, v):
        return cuda_table._flash_attention_forward(q, k, v, None, None, 33, 47, 0.2, causal, False, **options)[0]

    def same(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return attention(*heads_first, causal=causal, dropout_p=0.2, backend="reference", **ours).transpose(1, 2)

    assert_equal(results(theirs, inputs), expected_results(same, inputs))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("options", "ours"), POSITIONS, ids=["open", "window"])
def test_the_cuda_operator_on_packed_sequences(cuda_table, causal, options, ours):
    starts_q, starts_k = torch.tensor([0, 5, 5, 20]).int(), torch.tensor([0, 9, 12, 40]).int()
    inputs = [torch.randn(length, 2, 16).half() for length in (20, 40, 40)]
    arguments = (starts_q, starts_k, 15, 28, 0.0, causal, False)

    def theirs(q, k, v):
        out, lse, *_ = cuda_table._flash_attention_forward(q, k, v, *arguments, **options)
        assert lse.shape == (2, 20)
        return out

    def same(q, k, v):
        return attention_varlen(q, k, v, starts_q, starts_k, causal=causal, backend="reference", **ours)

    expected = expected_results(same, inputs)
    assert_equal(results(theirs, inputs), expected)
    if hasattr(cuda_table, "_flash_attention_forward_no_dropout_inplace"):
        out = torch.full_like(inputs[0], torch.nan)
        lse = cuda_table._flash_attention_forward_no_dropout_inplace(out, *inputs, *arguments, **options)
        assert lse.shape == (2, 20)
        assert torch.equal(out, expected[0])


def test_the_cpu_operator_has_no_dropout():
    q = torch.randn(1, 2, 4, 8)
    with (
        fastattn.activate(backend="reference"),
        pytest.raises(ValueError, match=r"dropout_p: expected none .* got 0\.1"),
    ):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.1)


NO_COMPILER = not shutil.which("cc") and not shutil.which("gcc")
INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C compiler"))


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_compiled(compiler, calls):
    """The strides are those that tracing has foretold: inductor checks."""
    inputs = make_qkv("cpu", (33, 33), dtype=SINGLE)

    def model(q, k, v):
        return F.scaled_dot_product_attention(q * 2.0, k, v, is_causal=True) * 2.0

    with fastattn.activate(backend="reference"):
        expected = results(model, inputs)
        calls.clear()
        actual = results(torch.compile(model, fullgraph=True, backend=compiler), inputs)
    assert calls == {("reference", "forward"): 1, ("reference", "backward"): 1}
    assert_equal(actual, expected)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGPU:
    @pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
    @pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=["fp16", "bf16"])
    def test_scaled_dot_product_attention(self, dtype, options, calls):
        inputs = make_qkv("cuda", (129, 129), dims=(64, 64), dtype=dtype)
        ours = {"causal" if name == "is_causal" else name: value for name, value in options.items()}
        expected = expected_results(lambda q, k, v: attention(q, k, v, backend="triton", **ours), inputs)
        calls.clear()
        with fastattn.activate(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            actual = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), inputs)
        assert calls == {("triton", "forward"): 1, ("triton", "backward"): 1}
        assert_equal(actual, expected)

    def test_the_lower_right_triangle(self, calls):
        inputs = make_qkv("cuda", (65, 129), dims=(64, 64), dtype=HALF)
        expected = expected_results(lambda q, k, v: attention(q, k, v, causal=True, backend="triton"), inputs)
        calls.clear()
        bias = causal_lower_right(65, 129)
        with fastattn.activate():
            actual = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, bias), inputs)
        assert calls.total() == 2
        assert_equal(actual, expected)

    def test_packed_sequences(self, calls):
        starts = torch.tensor([0, 5, 70, 129], device="cuda").int()
        inputs = [torch.randn(129, 2, 64).to("cuda", HALF) for _ in "qkv"]
        expected = expected_results(lambda q, k, v: attention_varlen(q, k, v, starts, backend="triton"), inputs)
        calls.clear()
        with fastattn.activate():
            actual = results(lambda q, k, v: varlen_attn(q, k, v, starts, starts, 65, 65), inputs)
        assert calls.total() == 2
        assert_equal(actual, expected)

    def test_compiled(self, calls):
        inputs = make_qkv("cuda", (129, 129), dims=(64, 64), dtype=HALF)

        def model(q, k, v):
            return F.scaled_dot_product_attention(q * 2.0, k, v, is_causal=True) * 2.0

        with fastattn.activate(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            expected = results(model, inputs)
            assert_equal(results(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs), expected)
        assert calls == {("triton", "forward"): 2, ("triton", "backward"): 2}

    def test_pytorchs_kernels_come_back(self, calls):
        inputs = make_qkv("cuda", (129, 129), dims=(64, 64), dtype=HALF)
        before, expected = registrations(), results(F.scaled_dot_product_attention, inputs)
        with fastattn.activate():
            pass
        assert registrations() == before
        assert_equal(results(F.scaled_dot_product_attention, inputs), expected)
        assert not calls

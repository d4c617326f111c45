"""RMS norm and SwiGLU in one pass: the kernels on every instruction set, and the functions that call them."""

import pytest
import torch
import torch.nn.functional as F

from fastattn.backends import cpu
from fastattn.backends.cpu import library
from fastattn.functional.one_pass import rms_norm, swiglu
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, DTYPE_NAMES, HALF, SINGLE

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"{library.problem()}")

CANARY, EPS = -77.0, 0.1
dtypes = pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)


def between_canaries(like):
    """Rows to be filled, with a row before and one behind that nobody may touch."""
    storage = torch.full((like.shape[0] + 2, *like.shape[1:]), CANARY, dtype=like.dtype)
    return storage, storage[1:-1]


def check(results, names):
    """results: name -> (all of the storage, exact, eager)."""
    for name, (storage, exact, eager) in zip(names, results, strict=True):
        assert_parity(storage[1:-1], exact, eager, name)
        assert (storage[0] == CANARY).all() and (storage[-1] == CANARY).all()


def with_gradients(function, dy, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def plain_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def plain_gate(gate, up):
    return F.silu(gate) * up


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(300, 64), (7, 100), (2, 5001), (0, 8)])
def test_every_variant_normalises(rows, width, dtype, variant):
    x, dy, weight = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    stored = [between_canaries(like) for like in (x, x, weight[None])]
    (_, y), (_, dx), (_, dweight) = stored
    cpu.rms_norm(y, x, weight, EPS)
    cpu.rms_norm_gradients(dx, dweight, dy, x, weight, EPS)
    exact = with_gradients(plain_norm, dy.double(), x.double(), weight.double())
    eager = with_gradients(plain_norm, dy, x, weight)
    exact[2], eager[2] = exact[2][None], eager[2][None]
    check(zip((s for s, _ in stored), exact, eager, strict=True), ("y", "dx", "dweight"))


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(300, 64), (7, 101), (0, 8)])
def test_every_variant_gates(rows, width, dtype, variant):
    gate, up, dy = (5 * torch.randn(rows, width).to(dtype) for _ in range(3))
    stored = [between_canaries(gate) for _ in range(3)]
    (_, y), (_, dgate), (_, dup) = stored
    cpu.gate(y, gate, up)
    cpu.gate_gradients(dgate, dup, dy, gate, up)
    exact = with_gradients(plain_gate, dy.double(), gate.double(), up.double())
    check(zip((s for s, _ in stored), exact, with_gradients(plain_gate, dy, gate, up), strict=True),
          ("y", "dgate", "dup"))  # fmt: skip


KERNELS = ("rms_norm", "rms_norm_gradients", "gate", "gate_gradients")
CALLS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS), plain_norm, [(9, 70, 65), (65,)]),
    "swiglu": (swiglu, plain_gate, [(9, 70, 65), (9, 70, 65)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_training_step_takes_the_kernels(name, monkeypatch):
    own, _, shapes = CALLS[name]
    called = []
    for kernel in KERNELS:
        run = getattr(cpu, kernel)
        monkeypatch.setattr(cpu, kernel, lambda *args, kernel=kernel, run=run: (called.append(kernel), run(*args)))
    with_gradients(own, torch.randn(shapes[0]), *(torch.randn(shape) for shape in shapes))
    forward = "rms_norm" if name == "rms_norm" else "gate"
    assert called == [forward, f"{forward}_gradients"]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_any_order(name):
    """Second derivatives, several gradients at once, and gradients with strides of their own."""
    own, plain, shapes = CALLS[name]
    inputs = [torch.randn(shape) for shape in shapes]
    dy = torch.randn(shapes[0])

    def results(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        first = torch.autograd.grad(y, leaves, dy.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)
        several = torch.autograd.grad(
            y, leaves, torch.stack([dy, -dy]).to(dtype), is_grads_batched=True, retain_graph=True
        )
        expanded = torch.autograd.grad(y.sum(), leaves)
        return [y, *first, *second, *several, *expanded]

    ours, exact, eager = results(own, SINGLE), results(plain, torch.float64), results(plain, SINGLE)
    for actual, *others in zip(ours, exact, eager, strict=True):
        assert_parity(actual.detach(), *(x.detach() for x in others))


@pytest.mark.parametrize("name", CALLS)
def test_bits_do_not_depend_on_threads(name, threads):
    own, _, shapes = CALLS[name]
    inputs, dy = [torch.randn(shape) for shape in shapes], torch.randn(shapes[0])
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(with_gradients(own, dy, *inputs))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", CALLS)
def test_what_kernels_do_not_take_goes_to_torch(name, monkeypatch):
    """Small, strided, mixed and float64 tensors, transforms, and calls without gradients: the same function."""
    own, plain, shapes = CALLS[name]
    for kernel in KERNELS:
        monkeypatch.setattr(cpu, kernel, lambda *args: pytest.fail("a kernel was called"))
    x, other = (torch.randn(shape).requires_grad_() for shape in shapes)
    small = [t[:1, :1] if t.ndim == 3 else t for t in (x, other)]
    strided = [t.transpose(0, 1) if t.ndim == 3 else t for t in (x, other)]
    for case in (small, strided, [x.double(), other.double()], [x.detach(), other.detach()]):
        eager = plain(*case)
        assert_parity(own(*case), plain(*(t.double() for t in case)), eager)
    assert own(x.to("meta"), other.to("meta")).shape == x.shape
    exact, eager = plain(x.double(), other.double()), plain(x, other)
    assert_parity(own(x.double(), other), exact, plain(x.double(), other))
    over = (0, None) if other.ndim == 1 else (0, 0)
    assert_parity(torch.func.vmap(own, over)(x, other), exact, eager)
    assert_parity(torch.compile(own, backend="eager", fullgraph=True)(x, other), exact, eager)
    with torch.no_grad():
        assert_parity(own(x, other), exact, eager)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_gives_the_dtype_of_torch(name):
    own, plain, shapes = CALLS[name]
    for dtype in (SINGLE, BFLOAT):
        x, other = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
        with torch.autocast("cpu", BFLOAT):
            y = own(x, other)
            assert y.dtype == (F.rms_norm(x, other.shape, other, EPS) if name == "rms_norm" else plain(x, other)).dtype
        assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype

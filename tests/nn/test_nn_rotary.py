"""Rotary positions of the layers on a CPU: the kernel beside PyTorch's operators, and where those serve."""

import pytest
import torch

from fastattn.backends.cpu import library as cpu_library
from fastattn.functional import rotary
from fastattn.nn import Block, RoPE, TransformerConfig
from fastattn.nn.position import rotate, rotate_both
from fastattn.testing import assert_parity

pytestmark = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")


@pytest.fixture
def turned(monkeypatch):
    """The shapes of calls that the kernel served."""
    shapes = []
    own = rotary.backends.cpu.rotate

    def noted(y, x, cos, sin, back):
        shapes.append(tuple(x.shape))
        own(y, x, cos, sin, back)

    monkeypatch.setattr(rotary.backends.cpu, "rotate", noted)
    return shapes


def by_operators(x, tables, monkeypatch):
    """The same from PyTorch's operators."""
    with monkeypatch.context() as patched:
        patched.setattr(rotary, "served", lambda *_: False)
        return rotate(x, tables)


def tables_of(batch, length, head_dim):
    """Of every position, or of other ones for each batch entry."""
    positions = torch.arange(length) if batch == 1 else torch.randint(1000, (batch, length))
    return RoPE().tables(positions.view(batch, length), head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "head_dim"), [(1, 6), (3, 16), (1, 80), (3, 64)])
def test_results_and_gradients(batch, head_dim, dtype, turned, monkeypatch):
    x = torch.randn(3, 130, 5, head_dim).to(dtype).requires_grad_()
    dy = torch.randn(x.shape).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # another order in memory
    tables = tables_of(batch, 130, head_dim)
    y = rotate(x, tables)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert turned == [(3 * 130, 5, head_dim)] * 2 and y.dtype == dtype
    exact, plain = (by_operators(x.to(to), tables, monkeypatch) for to in (torch.float64, dtype))
    for name, ours, theirs, eager in zip(
        ("y", "dx"),
        (y, dx),
        (exact, *torch.autograd.grad(exact, x, dy.double(), retain_graph=True)),
        (plain, *torch.autograd.grad(plain, x, dy, retain_graph=True)),
        strict=True,
    ):
        assert_parity(ours, theirs, eager, name, float(theirs.detach().abs().max()))


def test_second_derivatives_and_batched_gradients(turned):
    x = torch.randn(2, 70, 2, 16).requires_grad_()
    tables = tables_of(1, 70, 16)
    dy = torch.randn(x.shape).requires_grad_()
    (dx,) = torch.autograd.grad(rotate(x, tables), x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, x.detach())  # of <dx, x> = <dy, y>
    assert len(turned) == 3 and torch.equal(ddy, rotate(x, tables))
    several = torch.randn(3, *x.shape)
    (together,) = torch.autograd.grad(rotate(x, tables), x, several, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(rotate(x, tables), x, one)[0] for one in several]
    assert_parity(together, torch.stack(one_by_one).double(), torch.stack(one_by_one))


def test_any_number_of_threads_gives_the_same_bits(turned):
    x = torch.randn(2, 300, 4, 64).requires_grad_()
    tables, before, results = tables_of(1, 300, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(rotate(x, tables))
    finally:
        torch.set_num_threads(before)
    assert len(turned) == 3 and all(torch.equal(results[0], other) for other in results[1:])


def test_queries_and_keys_of_other_numbers_of_heads(turned, monkeypatch):
    q, k = (torch.randn(2, 100, heads, 32).requires_grad_() for heads in (6, 2))
    tables = tables_of(2, 100, 32)
    both = rotate_both(q, k, tables)
    assert turned == [(200, 6, 32), (200, 2, 32)]
    for ours, x in zip(both, (q, k), strict=True):
        assert_parity(ours, by_operators(x.double(), tables, monkeypatch), by_operators(x, tables, monkeypatch))


def test_pytorchs_operators_serve_the_rest(turned):
    tables = tables_of(1, 70, 16)
    x = torch.randn(2, 70, 4, 16).requires_grad_()
    for other in (x.detach(), x[:, :, :1, :], x.double(), x.transpose(1, 2).contiguous().transpose(1, 2)):
        rotate(other, tables)
    rotate(x, tuple(t.double() for t in tables))
    torch.func.vmap(lambda one: rotate(one, (tables[0][0], tables[1][0])))(x)
    torch.compile(rotate, backend="eager", fullgraph=True)(x, tables)
    with torch.no_grad():
        rotate(x, tables)
    assert turned == []
    rotate(x, tables)
    assert len(turned) == 1


def test_a_block_trains_as_by_operators(turned, monkeypatch):
    block = Block(TransformerConfig(d_model=64, num_layers=1, num_heads=4, num_kv_heads=2, position=RoPE()))
    x = torch.randn(2, 80, 64)

    def gradients(model, x):
        return torch.autograd.grad(model(x, causal=True).square().sum(), list(model.parameters()))

    ours = gradients(block, x)
    assert len(turned) == 4
    with monkeypatch.context() as patched:
        patched.setattr(rotary, "served", lambda *_: False)
        plain = gradients(block, x)
        exact = gradients(block.double(), x.double())
    for a, b, c in zip(ours, exact, plain, strict=True):
        assert_parity(a, b, c, intermediate=float(b.abs().max()))

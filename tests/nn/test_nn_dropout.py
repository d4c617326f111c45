"""Dropout of the Transformer layers on a CPU: what it drops, its gradients, and where PyTorch's own serves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn.nn as fnn
from fastattn.backends.cpu import library as cpu_library
from fastattn.functional import dropout as functional
from fastattn.functional.dropout import dropout
from fastattn.nn import parts

pytestmark = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")


@pytest.fixture
def drawn(monkeypatch):
    """The seeds of calls that the kernel served."""
    seeds = []
    own = functional.backends.cpu.dropout

    def noted(y, x, p, seed):
        seeds.append(seed)
        own(y, x, p, seed)

    monkeypatch.setattr(functional.backends.cpu, "dropout", noted)
    return seeds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_keep_what_the_result_keeps(dtype, drawn):
    x = torch.ones(50, 130, dtype=dtype).requires_grad_()
    y = dropout(x, 0.25)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75, dtype=dtype).item()}
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert torch.equal(dx, y) and len(set(drawn)) == 1
    dy = torch.ones_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(dropout(x, 0.25), x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx, dy, torch.ones_like(dx))
    assert torch.equal(ddy, dx)


def test_batched_gradients_keep_what_the_result_keeps(drawn):
    x = torch.ones(50, 130).requires_grad_()
    y = dropout(x, 0.25)
    several = torch.randn(3, *x.shape)
    (together,) = torch.autograd.grad(y, x, several, is_grads_batched=True)
    assert torch.equal(together, several * y) and len(set(drawn)) == 1 and len(drawn) == 4


def test_the_share_that_is_dropped_is_p():
    """Of n elements, within six standard deviations: less than one run in 10^8 is outside."""
    n, p = 1 << 20, 0.1
    dropped = (dropout(torch.ones(1024, n // 1024), p) == 0).sum().item()
    assert abs(dropped - n * p) < 6 * (n * p * (1 - p)) ** 0.5


def test_a_seed_fixes_it_on_any_number_of_threads():
    x, results, before = torch.randn(300, 256), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(7)
            results.append((dropout(x, 0.5), dropout(x, 0.5)))
    finally:
        torch.set_num_threads(before)
    (first, second), *others = results
    assert not torch.equal(first, second)
    assert all(torch.equal(a, first) and torch.equal(b, second) for a, b in others)


def test_checkpointing_drops_the_same_again():
    x = torch.randn(64, 128, requires_grad=True)
    y = checkpoint(lambda x: dropout(x, 0.5).square(), x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 0, y == 0)


@pytest.mark.parametrize(
    ("x", "p"),
    [
        (torch.randn(64, 128).double(), 0.5),
        (torch.randn(64, 128).T, 0.5),
        (torch.randn(8, 8), 0.5),
        (torch.randn(64, 128), 0.0),
        (torch.randn(64, 128), 1.0),
    ],
    ids=["float64", "strided", "small", "p = 0", "p = 1"],
)
def test_what_the_kernel_does_not_serve_is_pytorchs(x, p, drawn):
    torch.manual_seed(3)
    found = dropout(x, p)
    torch.manual_seed(3)
    assert torch.equal(found, F.dropout(x, p)) and not drawn


def test_transforms_take_pytorchs(drawn):
    x = torch.randn(3, 64, 128)
    torch.func.vmap(lambda x: dropout(x, 0.5), randomness="different")(x)
    torch.func.jvp(lambda x: dropout(x, 0.5), (x,), (x,))
    assert not drawn


# In the layers


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layers_drop_by_the_kernel_in_training_alone(name, drawn):
    layer = getattr(fnn, name)(64, 4, 128, dropout=0.2, batch_first=True)
    args = [torch.randn(2, 64, 64) for _ in range(2 if "Decoder" in name else 1)]
    layer(*args).sum().backward()
    assert len(drawn) == (8 if "Decoder" in name else 6)  # each forward and backward
    layer.eval()(*args)
    assert len(drawn) == (8 if "Decoder" in name else 6)


class Silent(nn.Dropout):
    def forward(self, input):
        return input


@pytest.mark.parametrize("change", ["subclass", "hook"])
def test_other_dropout_layers_are_called(change, drawn):
    layer = fnn.TransformerEncoderLayer(64, 4, 128, dropout=0.2, batch_first=True)
    seen = []
    for part in ("dropout", "dropout1", "dropout2"):
        if change == "subclass":
            setattr(layer, part, Silent(0.2))
        else:
            getattr(layer, part).register_forward_hook(lambda *_: seen.append(1))
    layer(torch.randn(2, 64, 64))
    assert not drawn and len(seen) == (3 if change == "hook" else 0)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_hook_on_linear1_was_given_stays_as_it_was(training):
    """ReLU in place would change it."""
    layer = fnn.TransformerEncoderLayer(64, 4, 128, batch_first=True).train(training)
    kept = []
    layer.linear1.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    layer(torch.randn(2, 64, 64))
    ((out, copy),) = kept
    assert torch.equal(out, copy) and (out < 0).any()


def test_relu_is_in_place_where_nobody_sees_it(monkeypatch):
    calls = []
    monkeypatch.setattr(parts.F, "relu", lambda x: calls.append(1) or torch.relu(x))
    layer = fnn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation=F.relu).eval()
    x = torch.randn(2, 64, 64)
    out = layer(x)
    assert not calls
    layer.linear1.register_forward_hook(lambda *_: None)
    assert torch.equal(layer(x), out) and len(calls) == 1

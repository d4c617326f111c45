"""What the layer tests share: run a layer, and compare it with torch.nn's by the rule of fastattn/testing."""

import contextlib
import copy
import inspect

import torch
from torch import Tensor

from fastattn.testing import assert_parity

INF = float("inf")
DRAWS = 6


class Pool:
    """Results by name, each name held to the parity rule as one tensor.

    For the largest error of a few numbers is mostly chance, and so is twice that of somebody else.
    """

    def __init__(self):
        self.results = {}

    def add(self, name, actual, expected, eager):
        assert actual.shape == expected.shape == eager.shape, name
        self.results.setdefault(name, []).append((actual.flatten(), expected.flatten(), eager.flatten()))

    def check(self):
        for name, results in self.results.items():
            actual, expected, eager = map(torch.cat, zip(*results, strict=True))
            if actual.dtype == torch.float64 and eager.dtype == torch.float32:
                # float64 has no better truth than torch.nn's own result. Its error e is taken to be that of float32,
                # scaled by the precision; the rule allows ours 2 e, so the two may be 3 e = 2 (1.5 e) apart.
                precision = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                eager = expected + 1.5 * precision * (eager.double() - expected)
            assert_parity(actual, expected, eager, name=name)


@contextlib.contextmanager
def fast_path_off():
    """Without torch.nn's second implementation for evaluation."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def redraw(args):
    """Random tensors shaped and laid out like `args`; one that occurs twice is one object again."""
    memo = {id(x): torch.randn_like(x) for x in args}
    return [memo[id(x)] for x in args]


def cast(value, dtype):
    """Floating tensors in `value` (a tensor, list, tuple or dict) in `dtype`; an object met twice stays one object."""
    memo = {}

    def visit(x):
        if isinstance(x, Tensor):
            return memo.setdefault(id(x), x.to(dtype) if x.is_floating_point() else x)
        if isinstance(x, (list, tuple)):
            return type(x)(visit(y) for y in x)
        return {k: visit(y) for k, y in x.items()} if isinstance(x, dict) else x

    return visit(value)


def run(layer, args, kwargs):
    """Outputs, and the gradients of a fixed weighted sum of them with respect to every parameter and input."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in args}
    layer.zero_grad()
    outputs = layer(*(leaves[id(x)] for x in args), **kwargs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs)
    loss.backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"gradient of argument {i}": leaf.grad for i, leaf in enumerate(leaves.values())}
    results |= {f"gradient of {name}": p.grad for name, p in layer.named_parameters()}
    return results


def assert_same_as_torch(ours, theirs, args, kwargs=None, dtype=torch.float32):
    """`ours` on the weights of `theirs`, which is torch.nn's layer: same outputs and gradients, by the parity rule.

    torch.nn is run in float64, for the truth, and in `dtype`, for the error that is allowed, on DRAWS random inputs
    shaped like `args`. All start from one random state, so that dropout is the same where it draws the same numbers.
    """
    theirs = copy.deepcopy(theirs).to(dtype)
    ours = copy.deepcopy(ours).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    exact = copy.deepcopy(theirs).double()
    eager_dtype = torch.float32 if dtype == torch.float64 else dtype  # see Pool
    theirs.to(eager_dtype)
    kwargs = cast(kwargs or {}, dtype)
    pool = Pool()
    for _ in range(DRAWS):
        inputs, state = cast(redraw(args), dtype), torch.get_rng_state()
        results = []
        for layer, layer_dtype in ((ours, dtype), (exact, torch.float64), (theirs, eager_dtype)):
            torch.set_rng_state(state)
            with fast_path_off():
                results.append(run(layer, *cast((inputs, kwargs), layer_dtype)))
        actual, expected, eager = results
        assert actual.keys() == expected.keys()
        for name in expected:
            assert actual[name].dtype == dtype, name
            pool.add(name, actual[name], expected[name], eager[name])
    pool.check()


def padding(lengths, size):
    """Key padding mask (N, size), True behind each length."""
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def causal(size, dtype=torch.float32):
    return torch.nn.Transformer.generate_square_subsequent_mask(size, dtype=dtype)


def to_float(mask):
    """A boolean mask (True = ignore) as a float one, with finite values at open positions."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(mask.shape, generator=generator).masked_fill(mask, -INF)


def assert_same_error(ours, theirs):
    """Both callables fail, with the same exception and text."""
    errors = []
    for call in (theirs, ours):
        try:
            call()
        except Exception as error:  # whatever torch.nn raises is the expectation
            errors.append((type(error), str(error)))
    assert len(errors) == 2, f"expected both to fail, got {errors}"
    assert errors[0] == errors[1]


def assert_same_signature(ours, theirs):
    """Same parameter names, order, kinds and defaults (hints may say more)."""

    def parameters(f):
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert parameters(ours) == parameters(theirs)


class Calls:
    """Counts calls of the fused operator from the layers, and keeps the keyword arguments of each."""

    def __init__(self, monkeypatch):
        import fastattn.nn.attention as module

        self.kwargs = []

        def counted(original):
            def call(*args, **kwargs):
                self.kwargs.append(kwargs)
                return original(*args, **kwargs)

            return call

        for name in ("attention", "attention_of_heads", "attention_varlen"):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))

    def __len__(self):
        return len(self.kwargs)

"""What is skipped for small calls changes nothing but their time: remembered choices, and kernels called directly."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.backends.cpu import library
from fastattn.functional import remembered

needs_cpu_library = pytest.mark.skipif(library.problem() is not None, reason=f"cpu backend: {library.problem()}")


def inputs(**options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 2, 5, 8, **options) for _ in "qkv"]


def twice(*args: Any, **options: Any) -> Tensor:
    """Of a call that is known by then."""
    fastattn.attention(*args, **options)
    before = len(remembered._calls)
    out = fastattn.attention(*args, **options)
    assert len(remembered._calls) == before
    return out


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "q_offset": 0}, {"scale": 0.5}])
def test_a_known_call_gives_what_the_full_way_gives(options: dict[str, Any]):
    q, k, v = inputs()
    assert torch.equal(twice(q, k, v, **options), fastattn.attention(q, k, v, backend="torch", **options))
    assert torch.equal(twice(q, k[:, :1], v[:, :1]), fastattn.attention(q, k[:, :1], v[:, :1], backend="torch"))


@needs_cpu_library
@pytest.mark.parametrize(
    "options", [{"window": (2, 0)}, {"window": (1, None)}, {"softcap": 0.5}, {"causal": True, "window": (0, 3)}]
)
def test_a_known_call_with_terms_gives_what_the_full_way_gives(options: dict[str, Any]):
    q, k, v = inputs()
    mask = torch.rand(5, 5) > 0.3
    twice(q, k, v)
    for more in ({}, {"return_lse": True}, {"causal": False, "window": None, "mask": mask, "return_lse": True}):
        known: Any = options | more
        for found, expected in zip(
            twice(q, k, v, **known), fastattn.attention(q, k, v, backend="cpu", **known), strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (5,), (2, 1, 5), (2, 1, 1, 5)])
def test_the_values_of_a_mask_are_read_each_time(shape: tuple[int, ...]):
    q, k, v = inputs()
    mask = torch.ones(shape, dtype=torch.bool)
    twice(q, k, v, mask=mask)
    mask[..., 1:] = False
    assert torch.equal(fastattn.attention(q, k, v, mask=mask), fastattn.attention(q, k, v, mask=mask, backend="torch"))
    mask.fill_(False)
    assert not fastattn.attention(q, k, v, mask=mask).any()


def test_gradients_are_recorded_when_they_are_wanted_and_not_otherwise():
    q, k, v = inputs(requires_grad=True)
    with torch.no_grad():
        assert not twice(q, k, v).requires_grad
    assert fastattn.attention(q, k, v).requires_grad
    assert not fastattn.attention(q.detach(), k.detach(), v.detach()).requires_grad


@needs_cpu_library
def test_a_known_call_has_the_backend_of_its_gradients():
    """In half precision gradients change the choice."""
    q, k, v = (torch.randn(1, 2, 16, 8, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    with torch.no_grad():
        assert fastattn.explain(q, k, v).backend == "torch"
        twice(q, k, v)
    assert fastattn.explain(q, k, v).backend == "cpu"
    assert "ScaledDotProduct" not in fastattn.attention(q, k, v).grad_fn.name()  # pyright: ignore


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
        ({"q_offset": True}, TypeError, "q_offset: expected an int"),
        ({"dropout_p": False}, TypeError, "dropout_p: expected a float"),
        ({"return_lse": 0}, TypeError, "return_lse: expected a bool"),
        ({"return_lse": 1}, TypeError, "return_lse: expected a bool"),
        ({"window": (True, 0)}, TypeError, r"window"),
        ({"window": 3}, TypeError, r"window"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"mask": torch.ones(5, 5)}, TypeError, "mask.dtype: expected bool"),
        ({"k": torch.ones(2, 2, 5, 8, dtype=torch.float64)}, TypeError, "k.dtype: expected q.dtype"),
        ({"k": torch.ones(2, 2, 5, 8, device="meta")}, ValueError, "k.device: expected q.device"),
        ({"k": torch.ones(2, 2, 5, 8).to_sparse()}, TypeError, "k: expected a dense strided tensor"),
        ({"k": torch.ones(2, 2, 5, 8).tolist()}, TypeError, "k: expected a Tensor, got list"),
        ({"v": torch.ones(2, 2, 5, 8).numpy()}, TypeError, "v: expected a Tensor, got ndarray"),
        ({"v": torch.nested.nested_tensor([torch.ones(2, 5, 8)] * 2)}, TypeError, "v: expected a dense strided tensor"),
    ],
)
def test_what_resembles_a_known_call_is_refused_all_the_same(change: dict[str, Any], error: type, text: str):
    q, k, v = inputs()
    known = {"q": q, "k": k, "v": v, "causal": True, "q_offset": 1}
    twice(**known)
    twice(**known | {"window": (1, 0), "softcap": 1.0, "return_lse": True})
    twice(**known | {"causal": False, "mask": torch.ones(5, 5, dtype=torch.bool)})
    with pytest.raises(error, match=text):
        fastattn.attention(**known | {"causal": "mask" not in change} | change)


def test_torchs_function_keeps_its_rule_for_heads():
    q, k, v = inputs()
    k, v = k[:, :1], v[:, :1]  # broadcast, or grouped
    assert twice(q, k, v).shape == q.shape
    for _ in range(2):
        with pytest.raises(TypeError, match="enable_gqa: expected a bool"):
            fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=1)  # pyright: ignore
        broadcast = fastattn.scaled_dot_product_attention(q, k, v)
        assert torch.equal(broadcast, fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    q = torch.cat([q, q], 1)
    with pytest.raises(ValueError, match=r"query\.shape"):
        k, v = torch.cat([k, k, k], 1), torch.cat([v, v, v], 1)
        fastattn.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_autocast_and_forward_mode_go_the_full_way():
    q, k, v = inputs()
    twice(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(q, k, v).dtype == torch.bfloat16
    tangent = torch.func.jvp(lambda q: fastattn.attention(q, k, v), (q,), (torch.ones_like(q),))[1]
    assert tangent.shape == q.shape
    together = torch.func.vmap(lambda q: fastattn.attention(q[None], k[:1], v[:1])[0])(q)
    assert together.shape == q.shape


def test_so_many_calls_are_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remembered, "_MOST", 4)
    for length in range(1, 10):
        q = torch.randn(1, 1, length, 8)
        out = fastattn.attention(q, q, q)
        assert torch.equal(out, fastattn.attention(q, q, q, backend="torch"))
        assert len(remembered._calls) <= 4


@needs_cpu_library
def test_calls_alike_in_shape_are_told_apart():
    """By dtype, strides and what needs a gradient; each is known, however they take turns."""
    torch.manual_seed(0)
    spread = [torch.randn(2, 5, 2, 8).transpose(1, 2) for _ in "qkv"]
    every: list[list[Tensor]] = [inputs(), spread, inputs(dtype=torch.bfloat16), inputs(requires_grad=True)]
    for tensors in every:
        fastattn.attention(*tensors, softcap=2.0)
    before = {key: len(alike) for key, alike in remembered._calls.items()}
    for tensors in every * 2:
        out = fastattn.attention(*tensors, softcap=2.0)
        assert torch.equal(out, fastattn.attention(*tensors, softcap=2.0, backend="cpu"))
        assert out.requires_grad == tensors[0].requires_grad
    assert {key: len(alike) for key, alike in remembered._calls.items()} == before


@needs_cpu_library
@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (5, 1), (5,), (2, 1, 5), (2, 1, 1, 5), (2, 2, 5, 5)])
def test_a_repeated_call_reads_its_own_tensors(shape: tuple[int, ...]):
    """Other addresses, masks in other orders, and results that no later call writes to."""
    torch.manual_seed(0)
    kept = []
    for _ in range(4):
        q, k, v = (torch.randn(2, 2, 5, 8) for _ in "qkv")
        mask = torch.rand(shape) > 0.3
        backwards = mask.permute(*range(mask.ndim - 1, -1, -1)).contiguous().permute(*range(mask.ndim - 1, -1, -1))
        for given in (mask, backwards, mask[..., :1].expand(shape)):
            out, lse = fastattn.attention(q, k, v, mask=given, return_lse=True)
            kept += zip(
                (out, lse), fastattn.attention(q, k, v, mask=given, return_lse=True, backend="cpu"), strict=True
            )
    assert all(torch.equal(found, expected) for found, expected in kept)


@needs_cpu_library
def test_a_repeated_call_follows_the_number_of_threads():
    q, k, v = inputs()
    expected = twice(q, k, v, window=(2, 0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert torch.equal(fastattn.attention(q, k, v, window=(2, 0)), expected)
    finally:
        torch.set_num_threads(before)


def test_a_known_call_with_a_parameter_or_a_subclass_goes_the_full_way():
    class Named(Tensor):
        pass

    q, k, v = inputs()
    expected = twice(q, k, v)
    assert type(fastattn.attention(q.as_subclass(Named), k, v)) is Named
    out = fastattn.attention(torch.nn.Parameter(q), k, v)
    assert out.requires_grad and torch.equal(out, expected)


def test_without_pytorchs_guards_every_call_goes_the_full_way(monkeypatch: pytest.MonkeyPatch):
    q, k, v = inputs()
    expected = twice(q, k, v)
    monkeypatch.setattr(remembered, "_calls", {})
    monkeypatch.setattr(remembered, "TensorGuards", None)
    assert torch.equal(twice(q, k, v), expected)
    assert not remembered._calls


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@needs_cpu_library
def test_modes_and_profiles_see_the_operator():
    q, k, v = inputs()
    with Seen() as seen:
        expected = fastattn.attention(q, k, v, return_lse=True, backend="cpu")
    assert "fastattn.attention_forward.default" in seen.names
    with torch.profiler.profile() as profile:
        fastattn.attention(q, k, v, return_lse=True, backend="cpu")
    assert "fastattn::attention_forward" in {event.key for event in profile.key_averages()}
    for actual, wanted in zip(fastattn.attention(q, k, v, return_lse=True, backend="cpu"), expected, strict=True):
        assert torch.equal(actual, wanted)


@needs_cpu_library
def test_modes_and_profiles_see_the_operator_of_a_known_call():
    q, k, v = inputs()
    expected = twice(q, k, v, window=(2, 2))
    with Seen() as seen:
        out = fastattn.attention(q, k, v, window=(2, 2))
    assert torch.equal(out, expected)
    assert "fastattn.attention_forward.default" in seen.names
    with torch.profiler.profile() as profile:
        fastattn.attention(q, k, v, window=(2, 2))
    assert "fastattn::attention_forward" in {event.key for event in profile.key_averages()}
    with SeenFunctions() as functions:
        fastattn.attention(q, k, v, window=(2, 2))
    assert "fastattn.attention_forward.default" in functions.names


@needs_cpu_library
def test_a_view_that_negates_is_read_as_what_it_is():
    q, k, v = inputs()
    negated = torch.complex(q, -q).conj().imag  # the dispatcher negates it, its memory does not
    assert negated.is_neg()
    actual = fastattn.attention(negated, k, v, window=(2, 2), backend="cpu")
    assert torch.equal(actual, fastattn.attention(negated.clone(), k, v, window=(2, 2), backend="cpu"))


@needs_cpu_library
def test_a_backward_pass_reads_negating_views_as_what_they_are():
    leaves = [x.requires_grad_() for x in inputs()]

    def negated(x: Tensor) -> Tensor:
        """The same numbers, as a view of their negative."""
        return torch.complex(x, -x).conj().imag

    def gradients(dout: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(fastattn.attention(*leaves, window=(2, 2), backend="cpu"), leaves, dout)

    dout = torch.randn_like(leaves[0])
    expected = gradients(dout)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, negated):
        hooked = gradients(dout)
    for wanted, *actual in zip(expected, gradients(negated(dout)), hooked, strict=True):
        assert all(torch.equal(wanted, x) for x in actual)


@needs_cpu_library
def test_appending_is_noticed_by_autograd():
    q = torch.randn(1, 2, 1, 8)
    k_cache, v_cache = torch.zeros(1, 16, 2, 8), torch.zeros(1, 16, 2, 8)
    scale = torch.ones((), requires_grad=True)
    used = (k_cache * scale).sum()
    with torch.no_grad():
        fastattn.attention_with_kvcache(q, k_cache, v_cache, q, q, cache_lens=3, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()
    with torch.inference_mode():
        fastattn.attention_with_kvcache(q, k_cache, v_cache, q, q, cache_lens=3, backend="cpu")
        caches = k_cache.clone(), v_cache.clone()
        fastattn.attention_with_kvcache(q, *caches, q, q, cache_lens=3, backend="cpu")
    assert torch.equal(caches[0], k_cache)


def test_pytorchs_function_is_called_as_it_is():
    q, k, v = inputs()
    assert torch.equal(twice(q, k, v), F.scaled_dot_product_attention(q, k, v))

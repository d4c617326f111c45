"""Quantised KV caches: what is written, parity on what it stands for, errors, memory."""

import pytest
import torch

from fastattn import attention_with_kvcache, explain_with_kvcache
from fastattn.backends import reference, triton
from fastattn.spec import make_cache_spec, target
from tests.support.attention_cases import BFLOAT, DOUBLE, HALF, SINGLE
from tests.support.cache_problems import check, make_problem

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
KINDS = ("tensor", "head", "token")
BACKENDS = pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])


def quantised(problem, dtype, kind):
    """(the problem over a quantised cache with its contents, the scales)."""
    scales = {}
    for name in ("k", "v"):
        cache = getattr(problem, f"{name}_cache")
        known = cache.float().nan_to_num(0.0)
        largest = known.abs().amax(tuple(range(4)) if kind == "tensor" else (0, 1, 3)) + 1.0
        scale = largest / (127.0 if dtype == INT8 else 448.0)
        given = None if kind == "token" else scale.reshape(-1, 1)
        values, measured = reference.kvcache.quantise(cache, given, dtype)
        holder = cache.new_empty(cache.shape, dtype=dtype).copy_(values)
        setattr(problem, f"{name}_cache", torch.empty_strided(cache.shape, cache.stride(), dtype=dtype).copy_(holder))
        scales[f"{name}_scale"] = measured[..., 0].contiguous() if kind == "token" else scale
    return problem, scales


@BACKENDS
@pytest.mark.parametrize(
    ("kind", "page", "dtype"), [("tensor", 0, HALF), ("head", 16, BFLOAT), ("token", 0, SINGLE), ("token", 48, HALF)]
)
@pytest.mark.parametrize("cache", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_parity(cache, kind, page, dtype, backend, device):
    problem = make_problem(device, (70, 0, 12), new=2, q_len=3, page=page, dtype=dtype, dims=(32, 16))
    problem, scales = quantised(problem, cache, kind)
    check(problem, backend, 2, **scales, sinks=torch.randn(4, device=device))


@BACKENDS
@pytest.mark.parametrize("cache", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_any_strides_and_a_prompt(cache, backend, device):
    """More rows than a step has, into an empty cache too: what is attended to is what the cache holds."""
    problem, scales = quantised(
        make_problem(device, (0, 9), new=40, q_len=40, dims=(24, 59), strided=True), cache, "token"
    )
    check(problem, backend, **scales, mask=torch.rand(40, 90, device=device) < 0.7)
    problem, scales = quantised(make_problem(device, (0, 0), new=20, q_len=20), cache, "head")
    check(problem, backend, cache_lens=0, **scales)


@BACKENDS
@pytest.mark.parametrize("cache", [INT8, FLOAT8], ids=["int8", "fp8"])
def test_what_is_written(cache, backend, device):
    """Half-way numbers go to the even one, what is too large is cut, a row of zeros has scale 0."""
    largest = 127.0 if cache == INT8 else 448.0
    new = torch.tensor([0.5, 1.5, -2.5, 3.0, largest, 1e4, -1e4, 0.017])
    new = torch.stack([new, new.clamp(-largest, largest), torch.zeros(8)]).view(1, 1, 3, 8).to(device)
    caches = [torch.zeros(1, 4, 1, 8, device=device).to(cache) for _ in "kv"]
    given, q = [torch.ones((), device=device) for _ in "kv"], torch.zeros(1, 1, 1, 8, device=device)
    attention_with_kvcache(q, *caches, new, new, cache_lens=0, k_scale=given[0], v_scale=given[1], backend=backend)
    cut = new[0, 0].clamp(-largest, largest)
    expected = (cut.round() if cache == INT8 else cut).to(cache)
    assert torch.equal(caches[0][0, :3, 0].float(), expected.float())
    scales = [torch.full((1, 4, 1), 7.0, device=device) for _ in "kv"]
    attention_with_kvcache(q, *caches, new, new, cache_lens=1, k_scale=scales[0], v_scale=scales[1], backend=backend)
    measured = torch.tensor([7.0, torch.tensor(1e4) / largest, torch.tensor(largest) / largest, 0.0], device=device)
    assert torch.equal(scales[0].flatten(), measured) and torch.equal(*scales)
    assert torch.equal(caches[1][0, 2, 0].float(), expected[1].float()) and not caches[1][0, 3].float().any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_and_infinity_make_a_measured_row_nan(backend):
    new = torch.ones(1, 1, 2, 8)
    new[0, 0, 0, 3], new[0, 0, 1, 5] = float("nan"), float("inf")
    caches, scales = [torch.zeros(1, 4, 1, 8, dtype=INT8) for _ in "kv"], [torch.zeros(1, 4, 1) for _ in "kv"]
    out = attention_with_kvcache(
        new[:, :, :1].nan_to_num(), *caches, new, new, cache_lens=0, k_scale=scales[0], v_scale=scales[1],
        backend=backend,
    )  # fmt: skip
    assert scales[0][0, :2].isnan().all() and not scales[0][0, 2:].any() and out.isnan().all()


@pytest.mark.parametrize(("backend", "chunk"), [("triton", 12), ("cpu", 12), ("cpu", 40)])
def test_packed_queries(chunk, backend, device):
    """Steps beside a chunk, bit for bit what each entry gives by itself."""
    held = (30, 5, 9)
    problem, scales = quantised(make_problem(device, held, new=0, page=16, dtype=HALF), INT8, "token")
    rows = torch.randn(chunk + 2, 4, 16, device=device).half()
    k, v = (torch.randn(chunk + 2, 2, 16, device=device).half() for _ in "kv")
    starts = torch.tensor([0, 1, 1 + chunk, 1 + chunk], dtype=torch.int32, device=device)
    given = {"block_table": problem.table, "backend": backend, "return_lse": True, "num_splits": 1, **scales}
    out, lse = attention_with_kvcache(
        rows, problem.k_cache, problem.v_cache, k, v, cache_lens=problem.lens, cu_seqlens_q=starts, **given
    )
    for entry, (first, end) in enumerate(((0, 1), (1, 1 + chunk))):
        assert problem.table is not None
        own = given | {"block_table": problem.table[entry : entry + 1], "cache_lens": held[entry] + end - first}
        one, one_lse = attention_with_kvcache(
            rows[None, first:end].transpose(1, 2), problem.k_cache, problem.v_cache, **own
        )
        assert torch.equal(out[first:end], one[0].transpose(0, 1)) and torch.equal(lse[:, first:end], one_lse[0])
    assert not out[1 + chunk :].any()


def test_memory():
    """Keys and values in a half or a quarter, and 4 bytes for each token and head."""
    whole = make_problem("cpu", (50, 3), dims=(128, 128), dtype=BFLOAT)
    problem, scales = quantised(whole.copy(), INT8, "token")
    bytes_of = [x.untyped_storage().nbytes() for x in (problem.k_cache, whole.k_cache, scales["k_scale"])]
    assert bytes_of[0] * 2 == bytes_of[1] and bytes_of[2] * 32 == bytes_of[0]


def test_explain_and_refusals(monkeypatch):
    problem, scales = quantised(make_problem("cpu", (50, 3)), FLOAT8, "head")
    arguments = problem.q, problem.k_cache, problem.v_cache
    why = explain_with_kvcache(*arguments, cache_lens=problem.lens, **scales)
    assert "float8_e4m3fn cache with k_scale (2,) v_scale (2,)" in why.call
    why = explain_with_kvcache(*arguments, cache_lens=50, **scales)
    assert why.reasons["torch"] == ["it has no quantised caches"]
    why = explain_with_kvcache(problem.q.double(), *arguments[1:], cache_lens=50, **scales)
    assert why.backend == "reference" and any("float64 over a quantised cache" in text for text in why.reasons["cpu"])
    spec = make_cache_spec(*arguments, cache_lens=50, **scales)
    on_gpu = spec._replace(q=FakeGPU(spec.q))
    for gpu, refused in (("a100", True), ("l4", False), ("h100", False), ("mi300x", True)):
        with target.assume(target.TARGETS[gpu]):
            found = triton.cache_reasons(on_gpu)
        assert any("float8_e4m3fn cache needs" in text for text in found) == refused


class FakeGPU:
    """What a backend asks of queries on a GPU."""

    def __init__(self, q):
        self.device, self.dtype, self.shape = torch.device("cuda"), q.dtype, q.shape


def test_float64_is_served_by_the_reference():
    problem, scales = quantised(make_problem("cpu", (50, 3), dtype=DOUBLE), INT8, "token")
    check(problem, "reference", **scales)


Q, CACHE = torch.zeros(2, 4, 1, 16), torch.zeros(2, 32, 2, 16, dtype=INT8)
NEW, SCALE, ROWS = torch.zeros(2, 2, 1, 16), torch.ones(2, 32, 2), torch.ones(2, 33, 2)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"k_scale": None}, TypeError, "k_scale: expected a Tensor for a cache of torch.int8, got NoneType"),
        ({"v_cache": CACHE.to(FLOAT8)}, TypeError, "v_cache.dtype: expected k_cache.dtype == torch.int8, got torch.fl"),
        ({"k_cache": CACHE.float(), "v_cache": CACHE.float()}, ValueError, "k_scale: expected None for a cache of"),
        ({"k_cache": CACHE.short()}, TypeError, "k_cache.dtype: expected q.dtype == torch.float32, or int8 or float8"),
        ({"v_scale": SCALE.half()}, TypeError, "v_scale.dtype: expected float32, got torch.float16"),
        ({"v_scale": SCALE[:1]}, ValueError, r"v_scale.shape: expected \(\) .* \(2,\) for each head, or \(2, 32"),
        ({"k_scale": SCALE.to("meta")}, ValueError, "k_scale.device: expected q.device == cpu, got meta"),
        ({"k_scale": SCALE.clone().requires_grad_()}, ValueError, "k_scale.requires_grad: expected False"),
        ({"v_scale": SCALE}, ValueError, "v_scale: expected memory of its own .* got that of k_scale"),
        ({"v_scale": SCALE[:1, :1, :1].expand(2, 32, 2)}, ValueError, "v_scale: expected every element in a place of"),
        (
            {"k_scale": ROWS[:, :32], "v_scale": ROWS[:, 1:]}, ValueError,
            "v_scale: expected memory of its own .* got that of k_scale",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(changes, error, text):
    given = {
        "q": Q, "k_cache": CACHE, "v_cache": CACHE.clone(), "k": NEW, "v": NEW, "cache_lens": 20, "k_scale": SCALE,
        "v_scale": SCALE.clone(), **changes,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        attention_with_kvcache(**given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["head", "token"])
def test_a_compiled_step(kind):
    """It writes caches and scales as an eager one does."""
    torch._dynamo.reset()
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, dynamic=True, backend="aot_eager")
    problem, scales = quantised(make_problem("cpu", (30, 5)), INT8, kind)
    eager, eager_scales = problem.copy(), {name: x.clone() for name, x in scales.items()}
    ours = compiled(
        problem.q, problem.k_cache, problem.v_cache, problem.k, problem.v, cache_lens=problem.lens, **scales
    )
    assert torch.equal(ours, eager.run(**eager_scales))
    assert torch.equal(problem.k_cache, eager.k_cache) and torch.equal(problem.v_cache, eager.v_cache)
    assert all(torch.equal(x.nan_to_num(), eager_scales[name].nan_to_num()) for name, x in scales.items())
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["head", "token"])
def test_opcheck(kind):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs, uninitialised memory included
    problem, scales = quantised(make_problem("cpu", (7, 30), new=2, q_len=2), INT8, kind)
    scales = [x.nan_to_num() for x in scales.values()]
    tensors, lens = (problem.k_cache, problem.v_cache, problem.k, problem.v), problem.lens
    append, attend = torch.ops.fastattn.kv_cache_append.default, torch.ops.fastattn.attention_kvcache.default
    torch.library.opcheck(append, (*tensors, lens, None, None, *scales, "cpu"))
    terms = torch.rand(1, 1, 2, 9) < 0.5, torch.randn(1, 4, 2, 9), lens
    args = (None, None, lens, None, 2, None, 9, 0, 0.25, 5.0, 2, True, None, *terms, *scales, None, "cpu")
    torch.library.opcheck(attend, (problem.q, *tensors, *args))

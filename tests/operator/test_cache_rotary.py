"""Rotary positions of queries and new keys over a KV cache, against complex numbers in float64.

"triton" turns them in the launch that appends, "cpu" in one pass over each, the reference by PyTorch's operators.
"""

import dataclasses

import pytest
import torch

from fastattn import attention_with_kvcache, explain_with_kvcache
from fastattn.functional import rotary
from fastattn.nn import RoPE
from fastattn.nn.position import rotate
from fastattn.testing import assert_parity, cache, check_kvcache
from tests.support.attention_cases import DTYPE_NAMES, HALF, SINGLE
from tests.support.cache_problems import check, make_problem

LENS = (37, 0, 9)
BACKENDS = ["triton", "cpu", "reference"]


def tables(rotated, positions=96, dtype=SINGLE, device="cpu"):
    return [x.to(device, dtype) for x in RoPE().tables(torch.arange(positions), rotated)]


def turned(x, first, cos, sin, interleaved):
    """One entry x (H, L, D), by complex numbers in float64."""
    rotated = 2 * cos.shape[1]
    at = slice(first, first + x.shape[1])
    factor = torch.complex(cos[at].double(), sin[at].double())
    part = x[..., :rotated].double()
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else torch.stack(part.chunk(2, -1), -1)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    part = pairs.flatten(-2) if interleaved else torch.cat(pairs.unbind(-1), -1)
    return torch.cat([part, x[..., rotated:].double()], -1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("rotated", [16, 6])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_appended_and_asked_is_turned(backend, page, dtype, rotated, interleaved, device):
    problem = make_problem(device, LENS, new=3, q_len=3, page=page, dtype=dtype)
    cos, sin = tables(rotated, device=device)
    own, exact, eager = problem.copy(), problem.copy(), problem.copy()
    for field in dataclasses.fields(exact):
        x = getattr(exact, field.name)
        if x is not None and x.is_floating_point():
            setattr(exact, field.name, x.double())
    for name in ("q", "k"):
        x = torch.stack([turned(getattr(problem, name)[b], n, cos, sin, interleaved) for b, n in enumerate(LENS)])
        setattr(exact, name, x)
        setattr(eager, name, x.to(dtype))
    options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    assert_parity(own.run(backend=backend, **options), exact.run(), eager.run(backend="reference"))
    assert_parity(own.k_cache.nan_to_num(), exact.k_cache.nan_to_num(), eager.k_cache.nan_to_num())
    assert torch.equal(own.v_cache.nan_to_num(), eager.v_cache.nan_to_num())


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize(("new", "q_len"), [(0, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rule(backend, new, q_len, page, dtype, interleaved, device):
    """`check_kvcache` turns q and k itself, by tables of less than the head dim, which is no power of two."""
    problem = make_problem(device, (37, 8, 9), new=new, q_len=q_len, dims=(20, 16), page=page, dtype=dtype)
    cos, sin = tables(10, device=device)
    check(problem, backend, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_and_dtypes_of_tables(backend, interleaved, device):
    cos, sin = tables(16, dtype=HALF, device=device)
    for pair in ((cos, sin), [x.float().mT.contiguous().mT for x in (cos, sin)]):
        problem = make_problem(device, LENS, new=2, q_len=2, strided=True)
        check(problem, backend, rotary_cos=pair[0], rotary_sin=pair[1], rotary_interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_a_step_turns_by_no_operators(backend, page, interleaved, device, monkeypatch):
    """Neither queries nor keys; on "triton" no launch is added."""

    def by_operators(*_):
        raise AssertionError

    launched = []
    if backend == "triton":
        decode = pytest.importorskip("fastattn.kernels.decode")
        start = decode.replay.start
        monkeypatch.setattr(
            decode.replay, "start", lambda kernel, *rest: launched.append(kernel.__name__) or start(kernel, *rest)
        )
    problem, (cos, sin) = make_problem(device, LENS, page=page), tables(16, device=device)
    expected = problem.copy().run(backend="reference", rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
    monkeypatch.setattr(rotary, "turn", by_operators)
    own = problem.run(backend=backend, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, num_splits=1)
    torch.testing.assert_close(own, expected)
    assert launched == (["append_kernel", "decode_kernel"] if backend == "triton" else [])


@pytest.mark.parametrize("change", [{"rotary_interleaved": True}, {"rotary_cos": tables(16)[1]}], ids=["pairs", "sin"])
def test_another_turn_is_found(monkeypatch, change):
    problem, (cos, sin) = make_problem("cpu", (37, 8, 9)), tables(16)

    def other(*arguments, **options):
        return attention_with_kvcache(*arguments, **options | change)

    monkeypatch.setattr(cache, "attention_with_kvcache", other)
    with pytest.raises(AssertionError, match="turned k: "):
        check(problem, "reference", rotary_cos=cos, rotary_sin=sin)
    problem.k = problem.v = None
    with pytest.raises(AssertionError, match="out: largest error"):
        check(problem, "reference", rotary_cos=cos, rotary_sin=sin)


@pytest.mark.parametrize("shape", [(2,), (2, 32, 2)], ids=["head", "token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rule_over_a_quantised_cache(backend, shape, device):
    q, k = torch.randn(2, 4, 3, 16, device=device), torch.randn(2, 2, 3, 16, device=device)
    k_cache, v_cache = (torch.zeros(2, 32, 2, 16, dtype=torch.int8, device=device) for _ in "kv")
    scales = {name: torch.full(shape, x, device=device) for name, x in (("k_scale", 0.03), ("v_scale", 0.02))}
    cos, sin = tables(16, device=device)
    options = {"cache_lens": 20, "rotary_cos": cos, "rotary_sin": sin, "backend": backend, **scales}
    check_kvcache(q, k_cache, v_cache, k, k.neg(), **options)


@pytest.mark.parametrize(("new", "q_len"), [(0, 2), (4, 2)])
def test_queries_are_turned_where_they_stand(new, q_len):
    problem = make_problem("cpu", (37, 8, 9), new=new, q_len=q_len)
    cos, sin = tables(16)
    by_hand = problem.copy()
    for name, count in (("q", q_len), ("k", new)):
        if (x := getattr(by_hand, name)) is not None:
            positions = problem.lens[:, None] + new - count + torch.arange(count)
            pair = (cos[positions], sin[positions])
            setattr(by_hand, name, rotate(x.transpose(1, 2), pair).transpose(1, 2))
    options = {"backend": "reference"}
    assert torch.equal(problem.run(rotary_cos=cos, rotary_sin=sin, **options), by_hand.run(**options))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_queries(backend, interleaved, device):
    """Each entry as by itself, bit for bit; also where nothing is appended. Rows of no entry are nobody's."""
    if backend == "triton" and device != "cpu":
        pytest.skip("compiled, the kernel that appends rounds once where two operators round twice")
    counts, held = (2, 0, 5), (30, 7, 3)
    starts, total = torch.tensor([0, 2, 2, 7], dtype=torch.int32), 9
    cos, sin = tables(16)
    options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved, "backend": backend}
    problem = make_problem("cpu", held, new=0)
    q, k, v = torch.randn(total, 4, 16), torch.randn(total, 2, 16), torch.randn(total, 2, 16)
    whole = problem.copy()
    out = attention_with_kvcache(
        q, whole.k_cache, whole.v_cache, k, v, cache_lens=problem.lens, cu_seqlens_q=starts, **options
    )
    after = problem.lens + torch.tensor(counts)
    again = attention_with_kvcache(q, whole.k_cache, whole.v_cache, cache_lens=after, cu_seqlens_q=starts, **options)
    assert torch.equal(out, again) and not out[7:].any()
    for entry, (first, end) in enumerate(((0, 2), (2, 2), (2, 7))):
        if first < end:
            caches = [x[entry : entry + 1].clone() for x in (problem.k_cache, problem.v_cache)]
            new = [x[None, first:end].transpose(1, 2) for x in (q, k, v)]
            one = attention_with_kvcache(new[0], *caches, *new[1:], cache_lens=held[entry], **options)
            assert torch.equal(out[first:end], one[0].transpose(0, 1))


Q, CACHE, NEW = torch.zeros(2, 4, 1, 16), torch.zeros(2, 32, 2, 16), torch.zeros(2, 2, 1, 16)
TABLE = torch.zeros(32, 8)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"rotary_sin": None}, TypeError, "rotary_sin: expected a Tensor beside rotary_cos, got NoneType"),
        ({"rotary_cos": TABLE.int()}, TypeError, "rotary_cos.dtype: expected a floating-point dtype, got torch.int32"),
        ({"rotary_cos": TABLE.to("meta")}, ValueError, "rotary_cos.device: expected q.device == cpu, got meta"),
        ({"rotary_cos": TABLE[0]}, ValueError, r"rotary_cos.shape: expected \(positions, R / 2\), R at most D == 16"),
        ({"rotary_sin": TABLE[:, :4]}, ValueError, r"rotary_sin.shape: expected rotary_cos.shape == \(32, 8\), got"),
        (dict.fromkeys(("rotary_cos", "rotary_sin"), TABLE.repeat(1, 2)), ValueError, "R at most D == 16, got"),
        (
            dict.fromkeys(("rotary_cos", "rotary_sin"), TABLE[:20]), ValueError,
            r"rotary_cos.shape\[0\]: expected more than the last position 20, got 20 positions",
        ),
        ({"rotary_interleaved": 1}, TypeError, "rotary_interleaved: expected a bool, got int"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_bad_arguments(changes, error, text):
    given = {
        "q": Q, "k_cache": CACHE, "v_cache": CACHE.clone(), "k": NEW, "v": NEW, "cache_lens": torch.tensor([20, 7]),
        "rotary_cos": TABLE, "rotary_sin": TABLE, **changes,
    }  # fmt: skip
    for function in (attention_with_kvcache, explain_with_kvcache):
        with pytest.raises(error, match=text):
            function(**given)
    assert not given["k_cache"].any()


def test_explain_says_so():
    options = {"cache_lens": 7, "rotary_cos": TABLE, "rotary_sin": TABLE}
    why = explain_with_kvcache(Q, CACHE, CACHE.clone(), NEW, NEW, **options)
    assert why.call.endswith(f"rotary_cos {tuple(TABLE.shape)}")
    why = explain_with_kvcache(Q, CACHE, CACHE.clone(), NEW, NEW, **options, rotary_interleaved=True)
    assert why.call.endswith(f"rotary_cos {tuple(TABLE.shape)}, interleaved")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_compiled_step(backend):
    """By PyTorch's operators, which the compiler joins; "cpu" without it turns by a kernel, which rounds otherwise."""
    torch._dynamo.reset()
    compiled = torch.compile(attention_with_kvcache, fullgraph=True, dynamic=True, backend="aot_eager")
    problem = make_problem("cpu", LENS, new=2, q_len=2)
    eager, (cos, sin) = problem.copy(), tables(16)
    options = {
        "cache_lens": problem.lens, "rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": True, "backend": backend
    }  # fmt: skip
    same = {"rtol": 0.0, "atol": 0.0} if backend == "reference" else {}
    ours = compiled(problem.q, problem.k_cache, problem.v_cache, problem.k, problem.v, **options)
    torch.testing.assert_close(ours, eager.run(**options), **same)
    torch.testing.assert_close(problem.k_cache, eager.k_cache, equal_nan=True, **same)
    torch._dynamo.reset()

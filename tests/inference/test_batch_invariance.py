"""A row has the same bits in every batch size: attention over a cache, and generation on top of it."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import attention_with_kvcache, nn
from fastattn.backends.cpu import library
from tests.support.attention_cases import BFLOAT, SINGLE

kernels = pytest.importorskip("fastattn.kernels.decode", reason="the triton package is not installed")

BATCH = 4
needs_library = pytest.mark.skipif(library.problem() is not None, reason=f"{library.problem()}")
BACKENDS = [pytest.param("cpu", marks=needs_library), "triton"]


def make_cache(capacity, paged=False):
    q, k, v = torch.randn(BATCH, 4, 2, 16), torch.randn(BATCH, 1, 2, 16), torch.randn(BATCH, 1, 2, 16)
    caches = [torch.randn(BATCH, capacity, 1, 16) for _ in "kv"]
    lens = torch.linspace(1, capacity - 2, BATCH).int().flip(0)
    table = None
    if paged:
        caches = [x.reshape(-1, 32, 1, 16) for x in caches]
        table = torch.arange(BATCH * capacity // 32, dtype=torch.int32).view(BATCH, -1)
    return q, caches, k, v, lens, table


def attend(rows, q, caches, k, v, lens, table, **options):
    """Of these rows (out, lse). The caches are those of the call alone."""
    whole = [x.clone() if table is not None else x[rows].clone() for x in caches]
    table = None if table is None else table[rows]
    return attention_with_kvcache(
        q[rows], *whole, k[rows], v[rows], cache_lens=lens[rows], block_table=table, return_lse=True, **options
    )


@pytest.fixture
def few_multiprocessors(monkeypatch):
    """So that by default a batch of one divides its keys and a larger one does not."""
    monkeypatch.setattr(kernels.launch, "multiprocessors", lambda device: 4)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "pages"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_with_kvcache(backend, paged, few_multiprocessors):
    inputs = make_cache(1024, paged)
    options = {"backend": backend, "batch_invariant": True}
    everything = attend(slice(None), *inputs, **options)
    for rows in (slice(0, 1), slice(1, 3)):
        for part, whole in zip(attend(rows, *inputs, **options), everything, strict=True):
            assert torch.equal(part, whole[rows])


def test_by_default_the_parts_of_the_keys_follow_the_batch(few_multiprocessors):
    """What the option is for: without it the test above would fail."""
    inputs = make_cache(1024)
    out, _ = attend(slice(None), *inputs, backend="triton")
    alone, _ = attend(slice(0, 1), *inputs, backend="triton")
    assert not torch.equal(alone, out[:1])


@needs_library
def test_the_backend_does_not_follow_the_batch():
    inputs = make_cache(1024)
    q, caches, *_ = inputs
    chosen = {
        fastattn.explain_with_kvcache(
            q[:n, :, :1], *(x[:n] for x in caches), cache_lens=1000, batch_invariant=invariant
        ).backend: invariant
        for invariant in (False, True) for n in (1, BATCH)
    }  # fmt: skip
    assert chosen == {"torch": False, "cpu": True}
    options = {"batch_invariant": True}
    everything, alone = attend(slice(None), *inputs, **options), attend(slice(0, 1), *inputs, **options)
    assert torch.equal(alone[0], everything[0][:1])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_other_backends_refuse(backend):
    with pytest.raises(ValueError, match=f"batch_invariant: expected False with backend '{backend}'"):
        attend(slice(None), *make_cache(32), backend=backend, batch_invariant=True)


def test_packed_queries_are_refused():
    q, cache = torch.randn(3, 2, 16), torch.randn(2, 8, 2, 16)
    starts = torch.tensor([0, 1, 3])
    for function in (attention_with_kvcache, fastattn.explain_with_kvcache):
        with pytest.raises(ValueError, match="batch_invariant: expected False with cu_seqlens_q"):
            function(q, cache, cache, cache_lens=4, cu_seqlens_q=starts, batch_invariant=True)


@needs_library
def test_explain_says_so():
    q, cache = torch.randn(2, 2, 1, 16), torch.randn(2, 8, 2, 16)
    why = fastattn.explain_with_kvcache(q, cache, cache, cache_lens=4, batch_invariant=True)
    assert why.call.endswith("batch_invariant")
    assert why.reasons["torch"] == why.reasons["reference"] == ["the bits of an entry may follow the batch"]


# However many rows


def one_step_after_another(q, caches, k, v, lens, chunks, **options):
    """(out, lse) of chunks of rows, each appended to a cache and then computed."""
    caches, results, at = [x.clone() for x in caches], [], 0
    for rows in chunks:
        own = slice(at, at + rows)
        results.append(
            attention_with_kvcache(
                q[:, :, own], *caches, k[:, :, own], v[:, :, own], cache_lens=lens + at, return_lse=True, **options
            )
        )
        at += rows
    return [torch.cat(x, 2) for x in zip(*results, strict=True)]


TERMS = {
    "plain": {},
    "window": {"window": (20, 0)},
    "terms": {"softcap": 3.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, -0.1]), "sinks": torch.randn(4)},
    "start": {"kv_start": torch.tensor([5, 0])},
    "pages": {"block_table": torch.randperm(12, dtype=torch.int32).view(2, 6)},
}


CASES = [
    *(pytest.param("cpu", term, dtype, marks=needs_library) for term in TERMS for dtype in (SINGLE, BFLOAT)),
    *(("reference", term, SINGLE) for term in TERMS),
    ("triton", "plain", SINGLE), ("triton", "terms", BFLOAT),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "term", "dtype"), CASES)
def test_a_decode_step_has_the_bits_of_a_prefill(backend, term, dtype):
    """One row after the other, in chunks, and all at once: to a cache that holds something and to an empty one."""
    rows, dim = 150 if backend == "cpu" else 40, 24
    chunks = [1] * rows if backend == "cpu" else [rows - 8, 6, 1, 1]  # the others take their time
    q, k, v = (torch.randn(2, n, rows, dim, dtype=dtype) for n in (4, 2, 2))
    shape = (12, 32, 2, dim) if term == "pages" else (2, 192, 2, dim)
    caches = [torch.randn(shape, dtype=dtype) for _ in "kv"]
    options = {"backend": backend, "batch_invariant": "rows", **TERMS[term]}
    for lens in ([40, 3], [0, 0])[: 1 if backend == "triton" else 2]:
        run = functools.partial(
            one_step_after_another, q, caches, k, v, torch.tensor(lens, dtype=torch.int32), **options
        )
        for part, expected in zip(run(chunks), run([rows]), strict=True):
            assert torch.equal(part, expected)


@needs_library
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_it_is_attention_without_a_cache_too(backend):
    q, k, v = torch.randn(1, 4, 70, 16), *torch.randn(2, 1, 2, 70, 16)
    caches = [torch.empty(1, 90, 2, 16) for _ in "kv"]
    options = {"backend": backend, "batch_invariant": "rows"}
    out, _ = one_step_after_another(q, caches, k, v, torch.zeros(1, dtype=torch.int32), [64, 5, 1], **options)
    assert torch.equal(out, fastattn.attention(q, k, v, causal=True, backend=backend))


@needs_library
def test_by_default_a_step_has_other_bits():
    """What the option is for: without it the test above would fail."""
    q, k, v = (torch.randn(1, n, 300, 64) for n in (4, 2, 2))
    caches, lens = [torch.empty(1, 300, 2, 64) for _ in "kv"], torch.zeros(1, dtype=torch.int32)
    run = functools.partial(one_step_after_another, q, caches, k, v, lens, backend="cpu")
    assert not torch.equal(run([299, 1])[0], run([300])[0])


def test_rows_are_explained_and_refused():
    q, cache = torch.randn(2, 4, 1, 16), torch.randn(2, 8, 2, 16)
    table = torch.zeros(2, 4, dtype=torch.int32)
    why = fastattn.explain_with_kvcache(
        q, cache, cache, cache_lens=4, batch_invariant="rows", backend="reference"
    )  # fmt: skip
    assert why.call.endswith("scale 0.25, keys not divided, batch_invariant 'rows'")
    assert why.reasons["torch"] == ["the bits of a row may follow the others"]
    given = functools.partial(attention_with_kvcache, q, cache, cache, cache_lens=4)
    for options, error, text in (
        ({"batch_invariant": "row"}, TypeError, "batch_invariant: expected a bool or 'rows', got 'row'"),
        ({"batch_invariant": "rows", "num_splits": 2}, ValueError, "num_splits: expected None with batch_invariant"),
        (
            {"batch_invariant": "rows", "backend": "torch"},
            ValueError,
            "expected False with backend 'torch', got 'rows'",
        ),
        ({"batch_invariant": "rows", "backend": "triton", "block_table": table}, ValueError, "without block_table"),
        (
            {"batch_invariant": "rows", "backend": "triton", "window": (3, 0)},
            ValueError,
            "without a window to the left",
        ),
    ):
        with pytest.raises(error, match=text):
            given(**options)


class RowByRow(torch.nn.Linear):
    """PyTorch's product of one row at a time: of more it may add up in another order."""

    def forward(self, input):
        rows = input.reshape(-1, 1, input.shape[-1])
        return torch.cat([F.linear(row, self.weight, self.bias) for row in rows]).reshape(*input.shape[:-1], -1)


def make_model(**options):
    sizes = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    model = nn.CausalLM(nn.CausalLMConfig(**sizes, **options)).eval()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = RowByRow
    return model


CACHES = [nn.KVCache, nn.DynamicCache, functools.partial(nn.PagedCache, page_size=8)]


@needs_library
@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("cache", CACHES, ids=["static", "growing", "pages"])
def test_generate(cache, length):
    model, prompts = make_model(), torch.randint(50, (20, length))
    run = functools.partial(fastattn.generate, model, max_new_tokens=6, cache=cache, batch_invariant=True)
    everything = run(prompts)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 20)):
        part = run(prompts[rows])
        assert torch.equal(part.tokens, everything.tokens[rows])
        assert torch.equal(part.scores, everything.scores[rows])


@needs_library
@pytest.mark.parametrize("cache", CACHES, ids=["static", "growing", "pages"])
def test_steps_have_the_logits_of_one_pass(cache):
    """Greedy: each token's score is, bit for bit, that of a pass over the text that came out."""
    model, prompts = make_model(), torch.randint(50, (3, 40))
    run = functools.partial(fastattn.generate, model, prompts, cache=cache)
    made = run(9, batch_invariant="rows")
    text = torch.cat([prompts, made.tokens], 1)
    whole = model.make_cache(3, 49, cache)
    whole.batch_invariant = "rows"
    with torch.no_grad():
        logits = model(text, cache=whole)[:, 39:-1]
    scores = logits.new_zeros(3)
    for step, own in enumerate(logits.unbind(1)):
        assert torch.equal(own.argmax(1), made.tokens[:, step])
        scores += own.gather(1, made.tokens[:, step, None]).squeeze(1) - own.logsumexp(1)
    assert torch.equal(scores, made.scores)


@needs_library
def test_a_planned_step_is_generate_too():
    """Of few rows, with PyTorch's own layers: the products of a step are those of the library."""
    model = nn.CausalLM(nn.CausalLMConfig(vocab_size=50, d_model=64, num_layers=2, num_heads=4)).eval()
    model.prefill = functools.partial(one_by_one, model, model.prefill)
    prompts = torch.randint(50, (5, 7))
    run = functools.partial(fastattn.generate, model, max_new_tokens=8, batch_invariant=True)
    everything = run(prompts)
    for rows in (slice(0, 1), slice(1, 4)):
        part = run(prompts[rows])
        assert torch.equal(part.tokens, everything.tokens[rows])
        assert torch.equal(part.scores, everything.scores[rows])


def one_by_one(model, prefill, tokens, cache, lengths):
    """The prompts of a batch through PyTorch's layers alone, then their keys together."""
    assert lengths is None
    logits = []
    for row, token in enumerate(tokens):
        own = model.make_cache(1, cache.capacity)
        own.batch_invariant = True
        logits.append(prefill(token[None], own, None))
        for ours, mine in ((cache.k, own.k), (cache.v, own.v)):
            for all_rows, one in zip(ours, mine, strict=True):
                all_rows[row].copy_(one[0])
    cache.advance(tokens.shape[1])
    return torch.cat(logits)


def test_an_encoder_decoder_refuses():
    config = nn.TransformerConfig(d_model=32, num_layers=1, num_heads=4)
    model = nn.EncoderDecoder(nn.EncoderDecoderConfig(encoder=config, decoder=config, source_vocab_size=9))
    with pytest.raises(ValueError, match="batch_invariant: expected False for an EncoderDecoder"):
        fastattn.generate(model, [[1, 2]], 2, start=1, batch_invariant=True)

"""The KV caches by themselves, against a list per batch entry."""

import functools

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
import fastattn.nn as fnn
from fastattn.backends.reference.kvcache import quantise
from fastattn.spec.cache_operands import cached, dequantised

LAYERS, HEADS, DIM, PAGE, WINDOW, CHUNK = 2, 2, 3, 16, 20, 7
CAPACITY = 70
KINDS = {
    "static": (fnn.KVCache, CAPACITY, {}),
    "dynamic": (fnn.DynamicCache, 3, {}),
    "paged": (fnn.PagedCache, CAPACITY, {}),
    "sliding": (fnn.SlidingWindowCache, CAPACITY, {"window": WINDOW, "chunk": CHUNK}),
}


def make(kind, batch, **more):
    cls, capacity, options = KINDS[kind]
    return cls(LAYERS, batch, capacity, HEADS, DIM, **options, **more)


class Twin:
    """A cache, and what should be in it: per entry a list of (key, value) numbers."""

    def __init__(self, kind, batch):
        self.kind, self.cache, self.rows, self.next = kind, make(kind, batch), [[] for _ in range(batch)], 1.0

    def append(self, lengths):
        new, batch = max(lengths), len(self.rows)
        numbers = self.next + torch.arange(batch * new).view(batch, 1, new, 1)
        self.next += batch * new
        self.cache.reserve(new)
        for layer in range(LAYERS):
            k = (numbers + 0.25 * layer).expand(batch, HEADS, new, DIM)
            window = (WINDOW, 0) if self.kind == "sliding" else None
            self.cache.attend(layer, k, k, -k, window=window)
        self.cache.advance(new, torch.tensor(lengths))
        for row, own, n in zip(self.rows, numbers[:, 0, :, 0].tolist(), lengths, strict=True):
            row.extend(own[:n])

    def check(self):
        assert self.cache.batch == len(self.rows)
        assert self.cache.lens.tolist() == [len(row) for row in self.rows]
        assert self.cache.length >= max(map(len, self.rows))
        for layer in range(LAYERS):
            for b, row in enumerate(self.rows):
                visible = slice(max(len(row) - WINDOW, 0), None) if self.kind == "sliding" else slice(None)
                expected = torch.tensor(row)[visible] + 0.25 * layer
                for buffers, sign in ((self.cache.k, 1), (self.cache.v, -1)):
                    x = cached(buffers[layer], self.cache.block_table, slice(b, b + 1), len(row))[0]
                    assert torch.equal(x[:, visible], sign * expected[None, :, None].expand(HEADS, -1, DIM))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sequence_of_operations(kind, data):
    twin = Twin(kind, data.draw(st.integers(1, 3)))
    for _ in range(data.draw(st.integers(1, 8))):
        batch = len(twin.rows)
        operations = ["append", "select"] + ["crop"] * (kind != "sliding") + ["release"] * (kind == "paged")
        operation = data.draw(st.sampled_from(operations))
        if operation == "append":
            new = data.draw(st.integers(1, CHUNK))
            lengths = [new, *(data.draw(st.integers(0, new)) for _ in range(batch - 1))]
            if twin.cache.length + new > CAPACITY:
                continue
            twin.append(lengths)
        elif operation == "select":
            size = batch if kind == "paged" else data.draw(st.integers(1, 3))  # its pool is for `batch` entries
            index = data.draw(st.lists(st.integers(0, batch - 1), min_size=size, max_size=size))
            twin.cache.select(torch.tensor(index))
            twin.rows = [list(twin.rows[i]) for i in index]
        elif operation == "crop":
            length = data.draw(st.integers(0, max(map(len, twin.rows))))
            twin.cache.crop(length)
            twin.rows = [row[:length] for row in twin.rows]
        else:
            entry = data.draw(st.integers(0, batch - 1))
            twin.cache.release(entry)
            twin.rows[entry] = []
        twin.check()


@pytest.mark.parametrize("kind", ["static", "paged", "sliding"])
def test_a_full_cache_raises_and_stays_as_it_was(kind):
    twin = Twin(kind, 2)
    for _ in range(CAPACITY // CHUNK):
        twin.append([CHUNK, CHUNK])
    before = [x.clone() for x in (*twin.cache.k, *twin.cache.v)]
    with pytest.raises(ValueError, match="cache: expected room for 3 more tokens, got 70 of 70 places in use"):
        twin.cache.reserve(3)
    twin.check()
    for x, y in zip((*twin.cache.k, *twin.cache.v), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def test_a_dynamic_cache_doubles():
    twin = Twin("dynamic", 2)
    capacities = set()
    for _ in range(20):
        twin.append([1, 1])
        capacities.add(twin.cache.capacity)
    assert capacities == {3, 6, 12, 24}


@pytest.mark.parametrize("kind", ["static", "sliding"])
def test_buffers_stay_where_they_are(kind):
    """CUDA graphs replay on the same addresses."""
    twin = Twin(kind, 3)

    def addresses():
        tensors = (*twin.cache.k, *twin.cache.v, twin.cache.lens)
        return [x.data_ptr() for x in tensors]

    before = addresses()
    twin.append([5, 2, 3])
    twin.cache.select(torch.tensor([2, 2, 0]))
    assert addresses() == before


def test_memory_of_a_sliding_window_does_not_grow_with_the_text():
    cache = fnn.SlidingWindowCache(1, 1, 1_000_000, HEADS, DIM, window=WINDOW, chunk=CHUNK)
    assert cache.k[0].shape[0] * PAGE <= WINDOW + CHUNK + 2 * PAGE


def test_pages_go_back_to_the_pool():
    cache = fnn.PagedCache(LAYERS, 3, CAPACITY, HEADS, DIM, num_pages=6)
    twin = Twin("static", 3)
    twin.cache, twin.kind = cache, "paged"
    twin.append([7, 7, 7])
    assert cache.free_pages == 3
    for _ in range(3):
        twin.append([7, 7, 7])
    assert cache.free_pages == 0
    with pytest.raises(ValueError, match="cache: expected 3 free pages, got 0"):
        cache.reserve(5)
    twin.check()
    cache.release(1)
    twin.rows[1] = []
    assert cache.free_pages == 2
    twin.append([4, 4, 4])
    twin.check()
    with pytest.raises(ValueError, match="cache: expected a pool of 8 pages for this selection, got 6"):
        cache.select(torch.tensor([0, 2, 0, 2]))
    twin.check()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_selections_are_refused(kind):
    cache = make(kind, 2)
    for index, error in (([0, 1], TypeError), (torch.tensor([0.0]), TypeError)):
        with pytest.raises(error, match="index: expected an int32 or int64 tensor, got"):
            cache.select(index)
    for index in (torch.tensor([[0]]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"index.shape: expected \(batch,\), got"):
            cache.select(index)
    for index in (torch.tensor([2]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="index: expected entries from 0 to 1, got"):
            cache.select(index)


def test_bad_crops_are_refused():
    with pytest.raises(ValueError, match="length: expected 0 or more, got -1"):
        make("static", 1).crop(-1)
    with pytest.raises(ValueError, match="cache: a sliding window cannot go back"):
        make("sliding", 1).crop(3)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_counts_are_refused(kind):
    cache = make(kind, 2)
    with pytest.raises(ValueError, match="new: expected 0 or more, got -1"):
        cache.reserve(-1)
    cache.reserve(3)
    with pytest.raises(ValueError, match="new: expected 0 or more, got -1"):
        cache.advance(-1)
    with pytest.raises(ValueError, match=r"lengths: expected 0 to 3, got \[0, 4\]"):
        cache.advance(3, torch.tensor([0, 4]))
    assert cache.length == 0 and not cache.lens.any()


def test_bad_entries_are_not_released():
    cache = make("paged", 2)
    cache.reserve(3)
    free = cache.free_pages
    for entry, text in ((2, "expected 0 to 1, got 2"), (-1, "expected at least 0, got -1")):
        with pytest.raises(ValueError, match=f"entry: {text}"):
            cache.release(entry)
    with pytest.raises(TypeError, match="entry: expected an int, got Tensor"):
        cache.release(torch.tensor(0))
    assert cache.free_pages == free


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e5m2], ids=str)
def test_dtypes_that_no_cache_has_are_refused(dtype):
    with pytest.raises(TypeError, match=f"dtype: expected one of float16, .* int8, float8_e4m3fn, got {dtype}"):
        fnn.KVCache(LAYERS, 1, CAPACITY, HEADS, DIM, dtype=dtype)


def test_pages_are_not_assigned_inside_a_compiled_step():
    cache = make("paged", 1)
    step = torch.compile(cache.reserve, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cache\.reserve: expected a call before the compiled step"):
        step(1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_cache_holds_what_a_plain_one_does(kind, dtype):
    """Rounded, with the scales of tokens in their places whatever is done to it; in a quarter of the memory."""
    plain, small = make(kind, 3), make(kind, 3, dtype=dtype)

    def append(lengths):
        k, v = (torch.randn(len(lengths), HEADS, max(lengths), DIM) for _ in "kv")
        for cache in (plain, small):
            cache.reserve(max(lengths))
            for layer in range(LAYERS):
                cache.attend(layer, k, k + layer, v, window=(WINDOW, 0))
            cache.advance(max(lengths), torch.tensor(lengths))

    append([5, 3, 4])
    append([1, 1, 1])
    for cache in (plain, small):
        cache.select(torch.tensor([2, 0, 0]))
        if kind != "sliding":
            cache.crop(5)
    append([2, 6, 1])
    assert small.lens.tolist() == plain.lens.tolist()
    for layer in range(LAYERS):
        for name in ("k", "v"):
            whole, rounded = getattr(plain, name)[layer], getattr(small, name)[layer]
            scale = getattr(small, f"{name}_scale")[layer]
            assert 4 * rounded.nbytes == whole.nbytes and DIM * scale.nbytes == whole.nbytes
            for b, n in enumerate(small.lens.tolist()):
                own = slice(b, b + 1)
                values, scales = quantise(cached(whole, plain.block_table, own, n), None, dtype)
                expected = values.float() * scales
                assert torch.equal(dequantised(rounded, scale, small.block_table, own, n, torch.float32), expected)


def test_generation_over_a_quantised_cache():
    config = fnn.CausalLMConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2)
    model, tokens = fnn.CausalLM(config).eval(), torch.randint(0, 50, (2, 9))
    kinds = (functools.partial(kind, dtype=torch.int8) for kind in (fnn.KVCache, fnn.PagedCache))
    ours = [fastattn.generate(model, tokens, 6, cache=kind).tokens for kind in kinds]
    assert torch.equal(*ours) and ours[0].shape == (2, 6)

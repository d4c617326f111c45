"""BlockMask: what it stores is the mask it was made from, and attention under it is attention under that mask."""

import io
import pickle

import pytest
import torch

from fastattn import BlockMask, attention, explain
from fastattn.block_mask import BLOCK, BlockTensors, dense_rows
from fastattn.kernels import config
from fastattn.testing import check_attention
from tests.support.attention_cases import BFLOAT, HALF, SINGLE

HEADS, KV_HEADS, DIM = 2, 1, 16
Q_LEN, KV_LEN = 150, 290  # 2 x 3 tiles, the last ones cut off


def random_mask(batch, heads, q_len=Q_LEN, kv_len=KV_LEN):
    """With empty, full and partial tiles, differing from head to head, and rows that see nothing."""
    mask = torch.rand(batch, heads, q_len, kv_len) > 0.4
    mask[:, :, :BLOCK, :BLOCK] = False
    mask[:, :, :BLOCK, BLOCK : 2 * BLOCK] = True
    mask[:1, -1:, BLOCK:, 2 * BLOCK :] = False
    mask[:, :, BLOCK + 2] = False
    return mask


def qkv(device, dtype=SINGLE, batch=2, q_len=Q_LEN, kv_len=KV_LEN):
    return tuple(
        torch.randn(batch, heads, length, DIM).to(device, dtype)
        for heads, length in ((HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len))
    )


SHAPES = [(1, 1), (2, 1), (1, HEADS), (2, HEADS)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [(Q_LEN, KV_LEN), (BLOCK, 2 * BLOCK), (1, 1), (0, 5), (5, 0), (300, 7)], ids=str)
def test_keeps_the_mask(shape, lengths):
    mask = random_mask(*shape, *lengths) if min(lengths) > BLOCK else torch.rand(*shape, *lengths) > 0.5
    block_mask = BlockMask.from_mask(mask)
    assert block_mask.shape == tuple(mask.shape) and torch.equal(block_mask.to_dense(), mask)
    rows, keys = (lengths[0] // 3, lengths[0]), (lengths[1] // 5, lengths[1] // 2)
    assert torch.equal(dense_rows(block_mask.tensors, rows, keys), mask[:, :, slice(*rows), slice(*keys)])


def test_lines_list_every_tile_that_is_not_empty_once():
    mask = random_mask(2, HEADS)
    tensors = BlockMask.from_mask(mask).tensors
    for offsets, entries, table in (
        (tensors.query_offsets, tensors.query_entries, tensors.table),
        (tensors.key_offsets, tensors.key_entries, tensors.table.transpose(2, 3)),
    ):
        for (start, inner, end), line in zip(offsets.view(-1, 3).tolist(), table.flatten(0, 2), strict=True):
            for part, wanted in ((entries[start:inner], line > 1), (entries[inner:end], line == 1)):
                assert part[:, 0].tolist() == wanted.nonzero()[:, 0].tolist()  # ascending
                assert torch.equal(part[:, 1], line[part[:, 0].long()])
        assert offsets.view(-1, 3)[-1, 2] == len(entries)


def test_empty_and_full_tiles_are_not_stored():
    block_mask = BlockMask.from_documents(torch.arange(1024) // 256)
    assert block_mask.sparsity == 0.75 and len(block_mask.tensors.pool) == 2
    assert "sparsity=75.0%, partial tiles=0" in repr(block_mask)
    assert "sparsity" not in repr(block_mask.to("meta"))  # it has no tiles to count


def test_documents():
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 0, 3, 0]])
    same = ids[:, None, :, None] == ids[:, None, None, :]
    assert torch.equal(BlockMask.from_documents(ids).to_dense(), same)
    assert torch.equal(BlockMask.from_documents(ids, causal=True).to_dense(), same.tril())
    queries = ids[:, :4]
    assert torch.equal(BlockMask.from_documents(queries, ids).to_dense(), same[:, :, :4])
    assert torch.equal(BlockMask.from_documents(ids[0]).to_dense(), same[:1])
    assert BlockMask.from_documents(ids[0, :0]).shape == (1, 1, 0, 0)
    assert BlockMask.from_documents(ids[0], ids[0, :0]).shape == (1, 1, 6, 0)


def test_predicate():
    """Called in strips with indices that broadcast; it may look into tensors of its own."""
    seen, prefix = [], torch.tensor([3, 150])

    def prefix_lm(b, h, i, j):
        seen.append(i.shape[2])
        return (j <= i) | (j < prefix[b])

    block_mask = BlockMask.from_predicate(prefix_lm, (2, 1, 200, 300))
    i, j = torch.arange(200)[:, None], torch.arange(300)
    expected = torch.stack([(j <= i) | (j < n) for n in (3, 150)])[:, None]
    assert torch.equal(block_mask.to_dense(), expected) and seen == [128, 72]
    assert BlockMask.from_predicate(lambda b, h, i, j: j <= i, [1, 1, 5, 5]).shape == (1, 1, 5, 5)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_under_it(shape, backend, device):
    block_mask = BlockMask.from_mask(random_mask(*shape)).to(device)
    check_attention(*qkv(device), backend=backend, block_mask=block_mask)


OTHERS = {
    "causal": {"causal": True},
    "window": {"window": (90, 20), "q_offset": -11},
    "mask": {"mask": torch.rand(1, 1, Q_LEN, KV_LEN) > 0.3},
    "bias": {"bias": torch.randn(1, HEADS, Q_LEN, KV_LEN, requires_grad=True)},
    "broadcast bias": {"bias": torch.randn(1, 1, 1, KV_LEN, requires_grad=True)},
    "slopes": {"alibi_slopes": torch.rand(HEADS, requires_grad=True), "softcap": 3.0},
    "sinks and dropout": {"sinks": torch.randn(HEADS, requires_grad=True), "dropout_p": 0.3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_with_every_other_argument(name, device, backend):
    options = {
        key: x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for key, x in OTHERS[name].items()
    }
    block_mask = BlockMask.from_mask(random_mask(1, HEADS)).to(device)
    check_attention(*qkv(device, batch=1), backend=backend, block_mask=block_mask, **options)


@pytest.mark.parametrize(("tile", "dtype"), [((64, 16), HALF), ((128, 32), BFLOAT), ((32, 128), HALF)], ids=str)
def test_any_tile_size(tile, dtype, device, backend):
    block_mask = BlockMask.from_mask(random_mask(1, HEADS)).to(device)
    with config.override(config.LaunchConfig(*tile, 4, 1)):
        check_attention(*qkv(device, dtype, batch=1), backend=backend, block_mask=block_mask)


def test_empty_tiles_are_not_read(device, backend):
    """Keys that nobody sees may hold anything: their tiles are never visited."""
    q, k, v = qkv(device, q_len=2 * BLOCK, kv_len=3 * BLOCK)
    mask = torch.ones(2 * BLOCK, 3 * BLOCK, dtype=torch.bool)
    mask[:, BLOCK : 2 * BLOCK] = False
    for x in (k, v):
        x[:, :, BLOCK : 2 * BLOCK] = torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, block_mask=BlockMask.from_mask(mask).to(device), backend=backend)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert all((g[:, :, BLOCK : 2 * BLOCK] == 0).all() for g in gradients[1:])


def test_repeats_are_bit_equal(device, backend):
    block_mask = BlockMask.from_mask(random_mask(1, 1)).to(device)
    leaves = [x.requires_grad_() for x in qkv(device, HALF)]

    def run():
        out = attention(*leaves, block_mask=block_mask, backend=backend)
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("field", BlockTensors._fields)
def test_changed_in_place_before_the_backward_pass(device, backend, field):
    """PyTorch's own error for saved tensors: gradients of another mask would be wrong in silence."""
    block_mask = BlockMask.from_mask(random_mask(1, 1)).to(device)
    leaves = [x.requires_grad_() for x in qkv(device)]
    out = attention(*leaves, block_mask=block_mask, backend=backend)
    getattr(block_mask.tensors, field).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in qkv("cpu")]
    block_mask = BlockMask.from_mask(random_mask(2, 1))

    def loss(q, k, v):
        return attention(q, k, v, block_mask=block_mask).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_explain_names_it():
    q, k, v = qkv("cpu")
    explanation = explain(q, k, v, block_mask=BlockMask.from_mask(random_mask(1, 1)))
    assert explanation.reasons["torch"] == ["it has no block masks"] and "BlockMask(shape=(1, 1, 150, 290)" in str(
        explanation
    )


GOOD = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool)
BAD_CALLS = {
    "dense": (GOOD, TypeError, "block_mask: expected a fastattn.BlockMask or None, got Tensor; a dense mask goes"),
    "lengths": (BlockMask.from_mask(GOOD.mT), ValueError, r"block_mask.shape: .*got \(1, 1, 290, 150\)"),
    "heads": (BlockMask.from_mask(GOOD.expand(3, -1, -1)), ValueError, r"\(2, 2, 150, 290\), got \(1, 3, 150, 290\)"),
    "device": (BlockMask.from_mask(GOOD).to("meta"), ValueError, "block_mask.device: expected cpu, got meta"),
}


@pytest.mark.parametrize(("block_mask", "error", "text"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls(block_mask, error, text):
    with pytest.raises(error, match=text):
        attention(*qkv("cpu"), block_mask=block_mask)


BAD_MASKS = {
    "float": (lambda: BlockMask.from_mask(GOOD.float()), TypeError, "mask: expected a bool Tensor, got torch.float32"),
    "list": (lambda: BlockMask.from_mask([True]), TypeError, "mask: expected a bool Tensor, got list"),
    "rank": (lambda: BlockMask.from_mask(GOOD[0]), ValueError, r"mask: expected \(Lq, Lk\).*got \(290,\)"),
    "float ids": (lambda: BlockMask.from_documents(torch.rand(3)), TypeError, "documents: expected an integer"),
    "rank of ids": (lambda: BlockMask.from_documents(torch.ones(1, 1, 3).int()), ValueError, r"\(L,\) or \(B, L\)"),
    "batches": (
        lambda: BlockMask.from_documents(torch.ones(2, 3).int(), torch.ones(3, 3).int()), ValueError, "key_documents"
    ),
    "shape": (lambda: BlockMask.from_predicate(lambda b, h, i, j: i > j, (3, 3)), ValueError, r"\(B, H, Lq, Lk\)"),
    "predicate type": (
        lambda: BlockMask.from_predicate(lambda b, h, i, j: i - j, (1, 1, 3, 3)), TypeError, "got torch.int64"
    ),
    "predicate with and": (
        lambda: BlockMask.from_predicate(lambda b, h, i, j: i >= j and j > 1, (1, 1, 3, 3)), TypeError,
        "predicate: expected &, | and ~ between tensors, got `and`",
    ),
    "predicate shape": (
        lambda: BlockMask.from_predicate(lambda b, h, i, j: torch.ones(7, dtype=torch.bool), (1, 1, 3, 3)), ValueError,
        r"broadcasts to \(1, 1, 3, 3\), got \(7,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_bad_masks(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_stored_and_loaded():
    stored = BlockMask.from_documents(torch.arange(300) // 70, causal=True)
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded.to_dense(), stored.to_dense())
    assert torch.equal(pickle.loads(pickle.dumps(stored)).to_dense(), stored.to_dense())


def test_a_damaged_file_is_refused():
    stored = BlockMask.from_mask(GOOD)
    stored.tensors.query_entries[0, 1] = 1000
    with pytest.raises(ValueError, match="damaged file"):
        pickle.loads(pickle.dumps(stored))

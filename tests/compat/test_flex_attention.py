"""FlexAttention's functions beside PyTorch's own, which run eagerly here, and beside a dense softmax for gradients."""

import inspect

import pytest
import torch
from torch.nn.attention import flex_attention as theirs

from fastattn import BlockMask, attention
from fastattn.compat import flex_attention as ours
from fastattn.compat.score_mod import score_terms
from fastattn.testing import assert_parity
from tests.support.pairwise import pairwise

B, H, LQ, LK, D = 2, 4, 150, 190, 16


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """PyTorch's function without its compiler."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


LENGTHS = torch.tensor([170, 60])
DOCUMENTS = torch.arange(300) // 70
SPECIAL = torch.tensor([3, 130])


def padding(b, h, q_idx, kv_idx):
    return kv_idx < LENGTHS[b]


def documents(b, h, q_idx, kv_idx):
    return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]


def special_keys(b, h, q_idx, kv_idx):
    """Reduces over a table, which is right for single positions alone."""
    return (kv_idx == SPECIAL).any() | (q_idx - kv_idx == h)


MASKS = {
    "causal": (causal, None, None),
    "padding": (theirs.and_masks(padding, documents), B, None),
    "documents": (documents, None, None),
    "heads": (special_keys, None, H),
    "all": (special_keys, B, H),
}


@pytest.mark.parametrize(
    ("name", "lengths", "block"),
    pairwise(MASKS, [(LQ, LK), (256, 128), (1, 300)], [128, 64, (48, 256), (256, 16)]),
    ids=str,
)
def test_from_flex(name, lengths, block):
    mask_mod, *batch = MASKS[name]
    for separate in (True, False):
        flex = theirs.create_block_mask(mask_mod, *batch, *lengths, "cpu", block, separate_full_blocks=separate)
        mask = BlockMask.from_flex(flex)
        assert mask.shape == tuple(n or 1 for n in batch) + lengths
        assert torch.equal(mask.to_dense(), theirs.create_mask(mask_mod, *batch, *lengths, "cpu"))
    made = ours.create_block_mask(mask_mod, *batch, *lengths, "cpu", block)
    assert torch.equal(made.to_dense(), mask.to_dense())
    assert all(torch.equal(a, b) for a, b in zip(made.tensors, mask.tensors, strict=True))


def test_from_flex_asks_within_partial_blocks_alone():
    """Blocks in a list of full ones are full, those in none are empty, whatever the function says there."""
    count, index = torch.tensor([1, 0, 2]), torch.tensor([[2, 9, 9], [9, 9, 9], [0, 1, 9]])
    full_count, full_index = torch.tensor([1, 2, 0]), torch.tensor([[0, 7, 7], [1, 2, 7], [7, 7, 7]])
    for numbers, indices in ((count, index), (count[None, None].int(), index[None, None].int())):
        flex = theirs.BlockMask.from_kv_blocks(
            numbers, indices, full_count.view(numbers.shape), full_index.view(indices.shape), BLOCK_SIZE=(20, 50),
            mask_mod=causal, seq_lengths=(55, 140), compute_q_blocks=False,
        )  # fmt: skip
        i, j = torch.arange(55)[:, None], torch.arange(140)
        full = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()[i // 20, j // 50]
        partial = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 0]]).bool()[i // 20, j // 50]
        assert torch.equal(BlockMask.from_flex(flex).to_dense(), (full | partial & (i >= j))[None, None])


@pytest.mark.parametrize("block", [128, (48, 256)], ids=str)
def test_from_flex_asks_for_positions_that_there_are(block):
    """A table that the function captures may end with the last position, within a block."""
    rows, columns = torch.randn(LQ), torch.randn(LK)

    def above(b, h, q_idx, kv_idx):
        return rows[q_idx] > columns[kv_idx]

    mask = BlockMask.from_flex(theirs.create_block_mask(above, None, None, LQ, LK, "cpu", block))
    assert torch.equal(mask.to_dense(), (rows[:, None] > columns)[None, None])


def test_from_flex_refuses():
    flex = theirs.create_block_mask(causal, 2, None, 300, 300, "cpu")
    with pytest.raises(RuntimeError, match="sliced"):
        BlockMask.from_flex(flex[0:1])
    short = theirs.BlockMask.from_kv_blocks(torch.ones(1, 1).int(), torch.zeros(1, 1, 1).int(), seq_lengths=(300, 300))
    with pytest.raises(ValueError, match=r"expected 3 rows of blocks for seq_lengths \(300, 300\), got 1"):
        BlockMask.from_flex(short)
    q = torch.randn(1, 1, 8, 8)
    with pytest.raises(TypeError, match="from_flex"):
        attention(q, q, q, block_mask=flex)


SLOPES = torch.tensor([0.5, 0.25, 0.0625, 0.1])
TABLE, COLUMNS = torch.randn(H, LQ + LK, requires_grad=True), torch.randn(B, LK, requires_grad=True)
SCORE_MODS = {
    "nothing": (None, set()),
    "identity": (lambda score, b, h, q_idx, kv_idx: score, set()),
    "constant": (lambda score, b, h, q_idx, kv_idx: score + 0.5, {"bias"}),
    "softcap": (lambda score, b, h, q_idx, kv_idx: 1.5 * torch.tanh(score / 1.5), {"softcap"}),
    "alibi": (lambda score, b, h, q_idx, kv_idx: score + SLOPES[h] * (kv_idx - q_idx), {"bias"}),
    "alibi, both sides": (lambda score, b, h, q_idx, kv_idx: score - SLOPES[h] * (q_idx - kv_idx).abs(), {"slopes"}),
    "one slope": (lambda score, b, h, q_idx, kv_idx: score - 0.3 * torch.abs(q_idx - kv_idx), {"slopes"}),
    "softcap and alibi": (
        lambda score, b, h, q_idx, kv_idx: torch.tanh(score / 2) * 2 - torch.exp2(-h - 1) * (kv_idx - q_idx).abs(),
        {"softcap", "slopes"},
    ),
    "relative": (lambda score, b, h, q_idx, kv_idx: score + TABLE[h, q_idx - kv_idx + LK], {"bias"}),
    "absolute": (lambda score, b, h, q_idx, kv_idx: COLUMNS[b, kv_idx] + score, {"bias"}),
    "mask": (lambda score, b, h, q_idx, kv_idx: torch.where(q_idx + 2 >= kv_idx, score, -float("inf")), {"bias"}),
    "nothing allowed": (lambda score, b, h, q_idx, kv_idx: torch.where(q_idx > 3, score, -float("inf")), {"bias"}),
}  # fmt: skip


def qkv(dtype=torch.float32, kv_heads=2):
    return tuple(torch.randn(B, h, n, D, dtype=dtype) for h, n in ((H, LQ), (kv_heads, LK), (kv_heads, LK)))


def both_masks(name):
    if name is None:
        return None, None
    arguments = (*MASKS[name], LQ, LK, "cpu")
    return ours.create_block_mask(*arguments), theirs.create_block_mask(*arguments)


@pytest.mark.parametrize(
    ("name", "mask", "dtype"),
    pairwise(SCORE_MODS, [None, "causal", "padding", "heads"], [torch.float32, torch.bfloat16]),
    ids=str,
)
def test_results_are_theirs(name, mask, dtype):
    score_mod, _ = SCORE_MODS[name]
    own, their_own = both_masks(mask)
    q, k, v = qkv(dtype)
    out, lse = ours.flex_attention(q, k, v, score_mod, own, enable_gqa=True, return_lse=True, scale=0.4)
    expected, plain = (
        theirs.flex_attention(
            *(x.to(t) for x in (q, k, v)), score_mod, their_own, 0.4, True, return_aux=theirs.AuxRequest(lse=True)
        )
        for t in (torch.float64, dtype)
    )  # fmt: skip
    assert_parity(out, expected[0], plain[0], "out")
    assert_parity(lse, expected[1].lse, plain[1].lse.float(), "lse")
    assert torch.equal(out, ours.flex_attention(q, k, v, score_mod, their_own, 0.4, True))


def weights(q, k, score_mod, mask):
    """(scores, softmax, log-sum-exp), dense."""
    scores = q @ k.repeat_interleave(H // k.shape[1], 1).mT * D**-0.5
    index = [torch.arange(n).view([-1 if d == at else 1 for d in range(4)]) for at, n in enumerate((B, H, LQ, LK))]
    scores = (scores if score_mod is None else score_mod(scores, *index)).masked_fill(~mask, -torch.inf)
    return scores, torch.softmax(scores, -1).nan_to_num(0.0), scores.logsumexp(-1, keepdim=True)


def sizes(q, k, v, score_mod, mask, dout, table):
    """Of what is summed on the way to each gradient, as `fastattn.testing` has it."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    group = H // k.shape[1]
    with torch.no_grad():
        scores, p, lse = weights(q, k, score_mod, mask)
        k, v = (x.repeat_interleave(group, 1).abs() for x in (k, v))
        exponent = 1.0 + scores.abs().nan_to_num(posinf=0.0) + lse.abs().nan_to_num(posinf=0.0)
        ds = p * exponent * (dout.abs() @ v.mT + (dout.abs() * (p @ v)).sum(-1, keepdim=True))
    heads = [(x.unflatten(1, (H // group, group)).sum(2)) for x in (ds.mT @ q.abs(), (p * exponent).mT @ dout.abs())]
    learned = torch.autograd.grad(weights(q, k[:, ::group], score_mod, mask)[0], table, ds) if table else ()
    return [ds @ k * D**-0.5, heads[0] * D**-0.5, heads[1], *learned]


@pytest.mark.parametrize("name", [name for name in SCORE_MODS if name != "nothing allowed"])
def test_gradients(name):
    """Of q, k and v, and of the tables that the function captures."""
    score_mod, _ = SCORE_MODS[name]
    table = [x for word, x in (("relative", TABLE), ("absolute", COLUMNS)) if word == name]
    inputs, dout = qkv(), torch.randn(B, H, LQ, D)
    mask = ours.create_block_mask(causal, None, None, LQ, LK, "cpu")

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), [*leaves, *table], dout.to(dtype))

    def dense(q, k, v):
        return weights(q, k, score_mod, mask.to_dense())[1] @ v.repeat_interleave(H // v.shape[1], 1)

    found = gradients(lambda q, k, v: ours.flex_attention(q, k, v, score_mod, mask, enable_gqa=True), torch.float32)
    exact, plain = (gradients(dense, dtype) for dtype in (torch.float64, torch.float32))
    of_sums = sizes(*inputs, score_mod, mask.to_dense(), dout, table)
    for what, *results in zip(("dq", "dk", "dv", "dtable"), found, exact, plain, of_sums, strict=False):
        assert_parity(*results[:3], what, results[3])


@pytest.mark.parametrize("name", [name for name in SCORE_MODS if name != "nothing"])
def test_what_it_becomes(name):
    score_mod, expected = SCORE_MODS[name]
    q = qkv()[0]
    terms = score_terms(score_mod, q, LK, None)
    named = {"softcap": terms.softcap, "slopes": terms.alibi_slopes, "bias": terms.bias}
    assert {word for word, value in named.items() if value is not None} == expected
    if name == "softcap":
        assert terms.softcap == 1.5
    if name == "alibi":  # under causal order the sign of the distance is known
        mask = ours.create_block_mask(causal, None, None, LQ, LK, "cpu")
        assert torch.equal(score_terms(score_mod, q, LK, mask).alibi_slopes, SLOPES.expand(B, H))
    if name == "absolute":
        assert terms.bias.shape == (B, 1, 1, LK)


def test_learned_slopes():
    """Their gradient flows through ``alibi_slopes``, no bias being made."""
    slopes = SLOPES.clone().requires_grad_()
    terms = score_terms(lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(), qkv()[0], LK, None)
    (gradient,) = torch.autograd.grad(terms.alibi_slopes.sum(), slopes)
    assert terms.bias is None and torch.equal(gradient, torch.full((H,), float(B)))


def in_place(score, b, h, q_idx, kv_idx):
    score += SLOPES[h]
    return score


REFUSED = {
    "factor": (lambda s, b, h, i, j: s * 2, "got, at b, h, q_idx, kv_idx == .0, 0, 0, 0., 2.0 for a score of 1"),
    "factor per head": (lambda s, b, h, i, j: s * SLOPES[h], "a factor goes to scale"),
    "clamp": (lambda s, b, h, i, j: s.clamp(max=50), "softcap . tanh"),
    "relu": (lambda s, b, h, i, j: torch.relu(s), "softcap . tanh"),
    "bias under the cap": (lambda s, b, h, i, j: torch.tanh(s + TABLE.detach()[h, j]), "expected the score itself or"),
    "one row": (lambda s, b, h, i, j: torch.where(i == 7, s.clamp(-5, 5), s), "differently from place to place"),
    "one pair": (lambda s, b, h, i, j: torch.where((i == 7) & (j > 20), 1.0, s), "differently from place to place"),
    "dropout": (lambda s, b, h, i, j: torch.dropout(s, 0.5, True), "random numbers, got aten.bernoulli"),
    "in place": (in_place, "expected neither operations in place"),
    "if": (lambda s, b, h, i, j: s if i > 3 else s + 1, "without `if`"),
    "arguments": (lambda s, b: s, "expected a function of .score, b, h, q_idx, kv_idx."),
}


@pytest.mark.parametrize(("score_mod", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(score_mod, text):
    with pytest.raises(NotImplementedError, match=f"score_mod: .*{text}"):
        ours.flex_attention(*qkv(kv_heads=H), score_mod)


def test_other_arguments():
    q, k, v = qkv(kv_heads=H)
    _, aux = ours.flex_attention(q, k, v, return_aux=theirs.AuxRequest(True), kernel_options={"BLOCK_M": 64})
    assert torch.equal(aux.lse, ours.flex_attention(q, k, v, return_lse=True)[1]) and aux.max_scores is None
    mask = ours.create_block_mask(padding, B, None, LQ, LK, "cpu")
    shared = ours.flex_attention(q, k[:1], v[:1], block_mask=mask)  # keys of one entry, for all
    assert torch.equal(
        shared[1], ours.flex_attention(q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1), None, mask)[1]
    )
    bad = {
        "max_scores": ({"return_aux": theirs.AuxRequest(max_scores=True)}, NotImplementedError),
        "expected one of them": ({"return_aux": theirs.AuxRequest(), "return_lse": True}, ValueError),
        "enable_gqa": ({"enable_gqa": 1}, TypeError),
        "block_mask: expected a torch.nn": ({"block_mask": causal}, TypeError),
    }
    for text, (change, error) in bad.items():
        with pytest.raises(error, match=text):
            ours.flex_attention(q, k, v, **change)
    with pytest.raises(ValueError, match="unless enable_gqa=True, got 2"):
        ours.flex_attention(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"block_mask.shape: expected .*150, 190.*got \(1, 1, 8, 8\)"):
        ours.flex_attention(q, k, v, block_mask=theirs.create_block_mask(causal, None, None, 8, 8, "cpu"))


@pytest.mark.filterwarnings("ignore")
def test_without_a_usable_accelerator_a_mask_is_on_the_cpu(monkeypatch):
    """As with a CUDA build of PyTorch where no GPU is."""

    def built_for(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    assert ours.create_block_mask(causal, None, None, LQ, LK).device.type == "cpu"


def test_under_compile():
    torch._dynamo.reset()
    q, k, v = qkv(kv_heads=H)
    mask = theirs.create_block_mask(causal, None, None, LQ, LK, "cpu")
    score_mod = SCORE_MODS["softcap and alibi"][0]
    compiled = torch.compile(ours.flex_attention, backend="eager")
    assert torch.equal(compiled(q, k, v, score_mod, mask), ours.flex_attention(q, k, v, score_mod, mask))


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures_are_theirs(name):
    """Order, kind and defaults: calls by position mean the same."""
    found, expected = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert list(found) == list(expected)
    for parameter in expected:
        assert found[parameter].kind == expected[parameter].kind
        assert found[parameter].default == expected[parameter].default

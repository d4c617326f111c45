"""The README: its code runs and prints what it says, and its figures were measured. The table of features is true."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import fastattn
from fastattn import BlockMask
from fastattn.nn.position import rotate
from fastattn.testing import assert_parity, check_attention, check_kvcache
from tests.support import code_blocks
from tests.support.attention_cases import HALF, SINGLE, make_bias, make_mask, make_qkv

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
FEATURES_PAGE = ROOT / "docs" / "features.md"
BLOCKS = code_blocks.blocks(README)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.code.strip().splitlines()[-1][:50] for block in BLOCKS])
def test_block(block, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader's environment is
    block.run({})


def test_has_blocks_for_function_layer_and_conversion():
    text = "".join(block.code for block in BLOCKS)
    for name in ("scaled_dot_product_attention", "fastattn.attention", "fastattn.nn", "fastattn.convert", "explain"):
        assert name in text


def test_is_short_enough_to_be_read():
    assert 6_000 <= len(README.read_bytes()) <= 8_000


def rows(text: str) -> dict[str, list[str]]:
    """First column -> the other cells, of every row of every table."""
    lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_figures_are_those_of_the_performance_page():
    """Which a script writes from stored measurements."""
    section = README.read_text().split("## What you gain")[1].split("\n## ")[0]
    page = (ROOT / "docs" / "performance.md").read_text().split("<!-- numbers:cpu -->")[1].split("<!-- end -->")[0]
    figures, measured = rows(section), rows(page)
    lengths, columns = figures.pop(""), measured.pop("")
    assert figures
    for name, cells in figures.items():
        expected = dict(zip(columns, measured[name], strict=True))
        assert cells == [expected[length] for length in lengths], name


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target


# docs/features.md: a function for each row, which does what the column of fastattn says

FEATURES: dict[str, Callable[[str], None]] = {}
CHECKED: dict[str, str] = {}
"""row -> what the column says"""


def feature(row: str, says: str):
    def add(check):
        FEATURES[row], CHECKED[row] = check, says
        return check

    return add


def fused(q, k, v, **options):
    """Forward and backward on the fused kernels, held to the tolerance rule."""
    check_attention(q, k, v, backend="triton", **options)


@feature("causal, top-left / bottom-right", "yes / yes")
def check_causal(device):
    q, k, v = make_qkv(device, (20, 40))
    fused(q, k, v, causal=True, q_offset=0)
    fused(q, k, v, causal=True)
    sees = [fastattn.attention(q * 0, k, v, causal=True, q_offset=offset, return_lse=True)[1] for offset in (0, None)]
    counts = torch.arange(1, 21, device=device)
    for lse, first in zip(sees, (0, 20), strict=True):  # equal scores: lse is the logarithm of how many keys there are
        assert torch.equal(lse[0, 0].exp().round().long(), counts + first)


@feature("boolean mask, broadcast in any dimension", "yes")
def check_mask(device):
    for shape in ((2, 1, 1, 40), (1, 2, 20, 1), (20, 40)):
        fused(*make_qkv(device, (20, 40), batch=2), mask=make_mask(device, shape))


@feature("mask and causal together", "yes")
def check_mask_and_causal(device):
    fused(*make_qkv(device, (40, 40)), causal=True, mask=make_mask(device, (40, 40)))


@feature("additive bias with gradient", "yes, any broadcast")
def check_bias(device):
    for shape in ((2, 2, 20, 40), (1, 2, 1, 40), (20, 1)):
        fused(*make_qkv(device, (20, 40), batch=2), bias=make_bias(device, shape, requires_grad=True))


@feature("grouped heads (GQA, MQA)", "yes")
def check_grouped_heads(device):
    for heads in ((4, 2), (4, 1)):
        fused(*make_qkv(device, (20, 40), heads=heads))


@feature("dropout", "yes")
def check_dropout(device):
    fused(*make_qkv(device, (20, 40)), dropout_p=0.3)


@feature("lse output / gradient through it", "yes / yes")
def check_lse(device):
    fused(*make_qkv(device, (20, 40)), lse_gradient=True)


@feature("rows with nothing allowed", "0, gradients 0")
def check_empty_rows(device):
    q, k, v = (t.requires_grad_() for t in make_qkv(device, (20, 40)))
    nothing = torch.zeros(20, 40, dtype=torch.bool, device=device)
    out = fastattn.attention(q, k, v, mask=nothing, backend="triton")
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all((t == 0).all() for t in (out, *gradients))


@feature("float32 / head dim of v != that of q", "yes / yes")
def check_float32_and_head_dims(device):
    fused(*make_qkv(device, (20, 40), dtype=SINGLE, dims=(24, 40)))


@feature("CPU training", "yes")
def check_cpu_training(device):
    model = fastattn.nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, losses = torch.randn(4, 10, 16), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(x).sub(x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@feature("`torch.nn` layers, same state dict", "yes")
def check_layers(device):
    theirs, ours = (nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval() for nn in (torch.nn, fastattn.nn))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 6, 16)
    ours_out, theirs_out = ours(x, x), theirs(x, x)
    assert_parity(ours_out, theirs.double()(x.double(), x.double()), theirs_out)


@feature("says which kernel runs, and why", "yes")
def check_explain(device):
    q, k, v = make_qkv("cpu")
    why = fastattn.explain(q, k, v, softcap=5.0)
    assert why.backend in ("cpu", "reference") and why.reasons["torch"] == ["it has no softcap"]


def fused_past_nan(q, k, v, unseen: slice, **options):
    """NaN in tiles that nothing may read does not come out, in neither direction."""
    k.data[:, :, unseen], v.data[:, :, unseen] = torch.nan, torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = fastattn.attention(*leaves, backend="triton", **options)
    dq, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and dq.isfinite().all()
    assert (dk[:, :, unseen] == 0).all() and (dv[:, :, unseen] == 0).all()


@feature("sliding window, work falls with it", "yes")
def check_window(device):
    fused(*make_qkv(device, (150, 150)), window=(20, 0))
    fused_past_nan(*make_qkv(device, (20, 400)), slice(0, 256), window=(20, 0))  # the queries stand at 380 .. 399


@feature("softcap / ALiBi, gradient to its slopes / sinks", "yes / yes, yes / yes")
def check_score_terms(device):
    slopes, sinks = (torch.rand(2, device=device).requires_grad_() for _ in range(2))
    q, k, v = make_qkv(device, (20, 40))
    fused(q, k, v, softcap=5.0)
    fused(q, k, v, alibi_slopes=slopes)
    fused(q, k, v, sinks=sinks)


@feature("block-sparse mask, from documents or a predicate", "yes")
def check_block_mask(device):
    documents = BlockMask.from_documents(torch.arange(300, device=device) // 130, causal=True)
    predicate = BlockMask.from_predicate(lambda b, h, i, j: (j <= i) | (j < 60), (1, 1, 300, 300), device)
    for mask in (documents, predicate):
        fused(*make_qkv(device, (300, 300)), block_mask=mask)
    far = BlockMask.from_predicate(lambda b, h, i, j: (j >= 256) & (i >= 0), (1, 1, 20, 300), device)
    fused_past_nan(*make_qkv(device, (20, 300)), slice(0, 256), block_mask=far)


@feature("packed sequences", "yes, and ALiBi, sinks and slopes with gradient")
def check_packed(device):
    starts = torch.tensor([0, 30, 30, 71], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(80, 2, 16).to(device, HALF) for _ in range(3))
    slopes, sinks = (torch.rand(2, device=device).requires_grad_() for _ in range(2))
    terms = {"alibi_slopes": slopes, "sinks": sinks}
    fused(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, **terms)


@feature("KV cache, contiguous and paged, split among programs", "yes, forward")
def check_kv_cache(device):
    lens = torch.tensor([30, 17], device=device)
    caches = [torch.randn(2, 48, 2, 16).to(device) for _ in "kv"]
    pages = [cache.view(6, 16, 2, 16) for cache in caches]
    table = torch.arange(6, dtype=torch.int32, device=device).view(2, 3)
    q, k, v = (torch.randn(2, heads, 1, 16).to(device) for heads in (4, 2, 2))

    def step(k_cache, v_cache, backend, dtype=SINGLE, **options):
        copies = (cache.to(dtype, copy=True) for cache in (k_cache, v_cache))  # the call writes into them
        new = (t.to(dtype) for t in (k, v))
        return fastattn.attention_with_kvcache(q.to(dtype), *copies, *new, cache_lens=lens, backend=backend, **options)

    expected, eager = step(*caches, "reference", torch.float64), step(*caches, "reference")
    for splits in (1, 3):
        assert_parity(step(*caches, "triton", num_splits=splits), expected, eager)
        assert_parity(step(*pages, "triton", num_splits=splits, block_table=table), expected, eager)


@feature("over it: masks and biases, int8 and float8 with scales, rotary positions", "yes, forward")
def check_kv_cache_operands(device):
    lens = torch.tensor([30, 17], device=device)
    q, k, v = (torch.randn(2, heads, 3, 16).to(device) for heads in (4, 2, 2))
    caches = [torch.randn(2, 48, 2, 16).to(device) for _ in "kv"]
    terms = {
        "mask": torch.rand(3, 20).to(device) < 0.7,
        "bias": torch.randn(4, 3, 9).to(device),
        "mask_start": lens - 6,
    }
    copies = [cache.clone() for cache in caches]
    check_kvcache(q, *copies, k, v, cache_lens=lens, backend="triton", **terms)
    for dtype, backend in ((torch.int8, "triton"), (torch.float8_e4m3fn, None)):  # older GPUs have no float8
        stored = [cache.mul(10).to(dtype) for cache in caches]
        scales = {name: torch.full((2, 48, 2), 0.1, device=device) for name in ("k_scale", "v_scale")}
        check_kvcache(q, *stored, k, v, cache_lens=lens, backend=backend, **scales)
    cos, sin = fastattn.nn.RoPE().tables(torch.arange(48, device=device), 16)
    at = lens[:, None] + torch.arange(3, device=device)
    turned = [rotate(x.transpose(1, 2), (cos[at], sin[at])).transpose(1, 2) for x in (q, k)]
    first, second = ([cache.clone() for cache in caches] for _ in "ab")
    options = {"cache_lens": lens, "backend": "triton"}
    out = fastattn.attention_with_kvcache(q, *first, k, v, rotary_cos=cos, rotary_sin=sin, **options)
    assert torch.equal(out, fastattn.attention_with_kvcache(turned[0], *second, turned[1], v, **options))


@feature("second derivatives / forward mode", "yes, in eager blocks, not fused")
def check_derivatives(device):
    q, k, v = make_qkv(device, (5, 7), dtype=SINGLE)
    exact = [t.double() for t in (q, k, v)]
    direction = torch.randn_like(q)

    def penalty(backend, q, k, v):
        q.requires_grad_()
        out = fastattn.attention(q, k, v, backend=backend)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), q)[0]

    def along(backend, q, k, v):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q.detach(), direction.to(q.dtype))
            return forward_ad.unpack_dual(fastattn.attention(dual, k, v, backend=backend)).tangent

    for derivative in (penalty, along):
        ours, eager = (derivative(backend, q, k, v) for backend in ("triton", "reference"))
        assert_parity(ours, derivative("reference", *exact), eager, intermediate=ours.abs().max().item())


@feature("models with RoPE, caches and generation", "yes, sequence-to-sequence too")
def check_models(device):
    config = {"d_model": 32, "num_layers": 2, "num_heads": 4}
    lm = fastattn.nn.CausalLM(fastattn.nn.CausalLMConfig(vocab_size=11, **config)).to(device).eval()
    prompt = torch.randint(11, (2, 4), device=device)
    new = fastattn.generate(lm, prompt, 3).tokens
    assert torch.equal(new, lm(torch.cat([prompt, new], dim=1))[:, 3:-1].argmax(-1))
    stack = fastattn.nn.TransformerConfig(**config)
    both = fastattn.nn.EncoderDecoderConfig(encoder=stack, decoder=stack, source_vocab_size=11)
    answers = fastattn.nn.EncoderDecoder(both).to(device).eval()
    new = fastattn.generate(answers, prompt, 3, start=1).tokens
    target = torch.cat([torch.ones_like(new[:, :1]), new], dim=1)
    assert torch.equal(new, answers(prompt, target)[:, :-1].argmax(-1))


@feature("PyTorch's own attention, rerouted and restored", "yes, `activate()`")
def check_activate(device):
    q, k, v = make_qkv(device, (20, 20), dtype=SINGLE)

    def call(dtype=SINGLE):
        return torch.nn.functional.scaled_dot_product_attention(*(t.to(dtype) for t in (q, k, v)), is_causal=True)

    before = call()
    with fastattn.activate(backend="reference"):
        assert_parity(call(), call(torch.float64), before)
    assert torch.equal(call(), before)


@feature("measured on a GPU", "**not yet**")
def check_not_measured(device):
    assert "**Nothing has run on any GPU yet.**" in (ROOT / "docs" / "status.md").read_text()


def table() -> dict[str, str]:
    """First column -> second column."""
    found = rows(FEATURES_PAGE.read_text())
    return {name: cells[0] for name, cells in found.items() if name}


def test_every_row_has_a_check_and_every_check_a_row():
    assert table() == CHECKED


@pytest.mark.parametrize("row", FEATURES)
def test_feature(row, device):
    FEATURES[row](device)

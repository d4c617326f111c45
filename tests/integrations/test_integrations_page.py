"""docs/integrations.md: every line against the real package, where it is installed."""

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import backends, ops
from fastattn.functional import remembered
from fastattn.integrations import diffusers
from tests.support import code_blocks

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a network

BLOCKS = code_blocks.blocks(Path(__file__).resolve().parents[2] / "docs" / "integrations.md")
INSTALL = {"open_clip": "open_clip_torch"}
WITH_TORCHVISION = {"open_clip", "timm", "torchvision"}


def packages(block):
    """The other projects that a block imports."""
    names = set()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return sorted(names - {"fastattn", "torch"} - sys.stdlib_module_names)


def require(name):
    """Skip, saying how to run it, where a package is not there or does not fit this PyTorch."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a torchvision of another PyTorch fails with a RuntimeError
        fitting = " and the torchvision of this PyTorch" if name in WITH_TORCHVISION else ""
        pytest.skip(f"pip install {INSTALL.get(name, name)}{fitting}, then run this again: {error}")


def test_the_page_names_every_library():
    found = {name for block in BLOCKS for name in packages(block)}
    assert found == {
        "accelerate", "diffusers", "lightning", "open_clip", "peft", "timm", "torchvision", "transformers"
    }  # fmt: skip


NUMBERED = [pytest.param(block, id="-".join([*packages(block), str(block.line)])) for block in BLOCKS]


@pytest.mark.parametrize("block", NUMBERED)
@pytest.mark.filterwarnings("ignore")  # of the other packages
def test_block(block, monkeypatch):
    """It runs, and attention comes from fastattn: a line that changes nothing would pass every comparison."""
    for name in packages(block):
        require(name)
    chosen, choose = [], backends.choose
    torch.manual_seed(0)
    monkeypatch.setattr(backends, "choose", lambda *args, **options: chosen.append(1) or choose(*args, **options))
    monkeypatch.setattr(remembered, "_calls", {})  # calls that were chosen for before
    original = torch.nn.functional.scaled_dot_product_attention
    try:
        block.run({})
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    assert chosen


HELD = ("accelerate", "lightning", "peft", "transformers")


@pytest.mark.parametrize("block", [p for p in NUMBERED if {*HELD} & {*packages(p.values[0])}])
@pytest.mark.filterwarnings("ignore")
def test_a_block_notices_a_wrong_output(block, monkeypatch):
    """Of five percent: that a block runs would prove nothing."""
    for name in packages(block):
        require(name)
    attention, cached = ops.attention, ops.attention_kvcache
    monkeypatch.setattr(ops, "attention", lambda *args: wrong(*attention(*args)))
    monkeypatch.setattr(ops, "attention_kvcache", lambda *args: wrong(*cached(*args)))
    monkeypatch.setattr(remembered, "attention", lambda *args: (None, None))
    with pytest.raises(AssertionError):
        block.run({})


def wrong(out, lse):
    return 1.05 * out, lse


def test_diffusers_arguments():
    """Called with what is not in the block: masks of the keys, and what is refused."""
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 4, 8)
    keys = torch.arange(7) < torch.tensor([[7], [3]])
    out = diffusers.attention_forward(q, k, k, keys, scale=0.5)
    heads = [x.transpose(1, 2) for x in (q, k, k)]
    expected = fastattn.attention(*heads, mask=keys[:, None, None], scale=0.5).transpose(1, 2)
    assert torch.equal(out, expected)
    with pytest.raises(
        ValueError, match=r"return_lse: expected none with set_attention_backend\('fastattn'\), got one"
    ):
        diffusers.attention_forward(q, k, k, return_lse=True)
    with pytest.raises(ValueError, match="_parallel_config: expected none"):
        diffusers.attention_forward(q, k, k, _parallel_config=object())


def test_without_diffusers(monkeypatch):
    for name in ("diffusers", "diffusers.models.attention_dispatch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"diffusers: expected 0\.35 or later"):
        diffusers.register()

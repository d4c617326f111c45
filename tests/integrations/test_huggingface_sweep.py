"""Models of transformers, small and random, on fastattn against their own eager code: a choice here, all if `slow`."""

import os

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")

from benchmarks.tools import huggingface_sweep as sweep
from fastattn.integrations import huggingface

# Those whose attention does not speak as transformers' interface expects, and one of each common kind.
CHOSEN = (
    "align (text)", "bert", "bigbird_pegasus", "clap (text)", "deepseek_v4", "gemma (both sides)", "gemma2",
    "gemma2 (both sides)", "gemma3", "git", "hunyuan_v1_dense", "lfm3_vl_vision", "llama (both sides)", "modernbert",
    "nllb-moe", "paligemma", "pegasus_x", "splinter", "t5",
)  # fmt: skip
# Their eager text model adds a boolean mask to the scores as numbers; with SDPA it forbids, as here.
# The decoder of DiffusionGemma is not told here what of the prompt is padding. A query of the padding sees no key:
# eager code gives it the mean of all values, SDPA gives 0, as here.
AS_SDPA = {"diffusion_gemma", "grounding-dino", "mm-grounding-dino"}
# Own attention: equal too, but no layer calls ours.
RIGHT = ("equal", "as sdpa", "own attention", "refused", "not built")
SHARDS = 8


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):  # undone after this: what is unregistered is what was registered
    yield
    huggingface.unregister()


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen(name):
    row = sweep.examine(name)
    assert row["result"] == ("own attention" if name == "git" else "equal") and not row["reason"].startswith("not ")


@pytest.mark.slow
@pytest.mark.skipif("FASTATTN_SWEEP" not in os.environ, reason="minutes: set FASTATTN_SWEEP=1 to run all models")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_all(shard):
    """As the stored table says, and none that differs."""
    expected = {row["architecture"]: row["result"] for row in sweep.stored()}
    rows = [sweep.examine(name) for name in sweep.architectures()[shard::SHARDS]]
    wrong = [row for row in rows if row["result"] != expected.get(row["architecture"], "equal")]
    packages = ("ImportError", "ModuleNotFoundError")  # which the table was made with, and are not installed here
    print(*rows, sep="\n")
    assert not [row for row in wrong if not (row["result"] == "not built" and row["reason"].startswith(packages))]


def test_stored_table_has_no_model_that_differs():
    rows = sweep.stored()
    assert len(rows) > 500 and all(row["result"] in RIGHT for row in rows)
    assert sum(row["result"] == "not built" for row in rows) <= 38  # what can be called small, is
    assert {row["architecture"] for row in rows if row["result"] == "as sdpa"} == AS_SDPA
    assert all(row["reason"] for row in rows if row["result"] in ("refused", "not built"))


def test_a_wrong_mask_is_noticed(monkeypatch):
    """Layers that see the future, or padding."""
    original = huggingface.attention_forward

    def without(module, query, key, value, attention_mask, **kwargs):
        return original(module, query, key, value, None, **kwargs)

    monkeypatch.setattr(huggingface, "attention_forward", without)
    assert sweep.examine("llama")["result"] == "differs"
    assert "padding right" in sweep.examine("bert")["reason"]
    assert torch.is_grad_enabled()

"""A training step of transformers' models with many forbidden pairs: left padding, sliding windows, packed documents.

The same model, weights and inputs run with each attention. transformers' own "sdpa" and "eager" get a dense mask if
anything but causal order forbids pairs. A step is a forward and backward pass, without an optimiser. A row's note says
which part of the L x L scores is allowed.
"""

import copy
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.device import Call, DryRun
from benchmarks.harness.models import Float64
from benchmarks.harness.problems import DTYPES, document_lengths
from benchmarks.harness.runner import Bench, Cell
from fastattn.testing import assert_parity

DEVICES = ("cuda", "cpu")
PROVIDERS = ("fastattn", "sdpa", "eager")


@dataclass(frozen=True)
class Size:
    """Grouped heads and a gated feed-forward, as Llama and Gemma 3 have them; few tokens in the vocabulary."""

    width: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window: int
    dtype: str
    lengths: tuple[int, ...]


SIZES = {
    "cpu": Size(512, 1376, 8, 2, 64, 1024, 512, "fp32", (4096, 2048)),
    "cuda": Size(2048, 5632, 16, 4, 128, 8192, 1024, "bf16", (8192, 4096)),
}
TINY = Size(32, 48, 4, 2, 8, 64, 4, "fp32", (24,))

Rows = list[list[int]]
"""The lengths of the documents of each batch entry."""


@dataclass(frozen=True)
class Case:
    model: str
    layers: tuple[str, ...]
    """The attention of each layer: "full" or "sliding"."""
    rows: Callable[[int], Rows]
    """The length of a sequence; places that documents do not fill are padding on the left."""


CASES = {
    "Llama, left padding": Case("Llama", ("full",) * 2, lambda length: [[3 * length // 4], [length // 2]]),
    "Llama, packed documents": Case("Llama", ("full",) * 2, lambda length: [document_lengths(length)]),
    "Gemma 3, window": Case("Gemma3", ("sliding",) * 5 + ("full",), lambda length: [[length]]),
}


def make_model(case: Case, size: Size, length: int) -> nn.Module:
    """A random model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    options: dict[str, Any] = {
        "vocab_size": size.vocabulary, "hidden_size": size.width, "intermediate_size": size.hidden,
        "num_hidden_layers": len(case.layers), "num_attention_heads": size.q_heads,
        "num_key_value_heads": size.kv_heads, "head_dim": size.head_dim, "max_position_embeddings": length,
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if case.model == "Llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    options |= {"layer_types": [f"{kind}_attention" for kind in case.layers], "sliding_window": size.window}
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**options, query_pre_attn_scalar=size.head_dim)
    )  # fmt: skip


def make_inputs(case: Case, size: Size, length: int, device: str) -> dict[str, Tensor]:
    """Arguments of the model; the loss counts tokens, not padding."""
    rows = case.rows(length)
    ids = torch.randint(size.vocabulary, (len(rows), length), device=device)
    starts = torch.tensor([length - sum(row) for row in rows], device=device)
    tokens = torch.arange(length, device=device) >= starts[:, None]
    inputs = {"input_ids": ids, "labels": ids.masked_fill(~tokens, -100)}
    if not tokens.all():
        inputs["attention_mask"] = tokens.long()
    elif len(rows[0]) > 1:
        inputs["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows]).to(device)
    return inputs


def allowed(case: Case, size: Size, length: int) -> float:
    """The allowed part of the scores of all layers."""

    def pairs(n: int, window: int) -> int:
        window = min(window, n)
        return window * (window + 1) // 2 + (n - window) * window

    rows = case.rows(length)
    windows = [size.window if kind == "sliding" else length for kind in case.layers]
    total = sum(pairs(n, window) for row in rows for n in row for window in windows)
    return total / (len(rows) * len(windows) * length**2)


@torch.no_grad()
def check(model: Any, inputs: dict[str, Tensor]) -> None:
    """Check the logits of the last batch entry by the parity rule; transformers with "sdpa" is the eager peer."""
    one = {name: x[-1:] for name, x in inputs.items()}
    tokens = one["labels"] >= 0
    logits = {}
    for name in ("fastattn", "sdpa"):
        model.set_attn_implementation(name)
        logits[name] = model(**one, use_cache=False).logits[tokens]
    with Float64():
        exact = copy.deepcopy(model).double()(**one, use_cache=False).logits[tokens]
    assert_parity(logits["fastattn"], exact, logits["sdpa"], "logits", intermediate=float(exact.abs().max()))


def measure(bench: Bench, name: str, length: int) -> None:
    """Measure the time and memory of a step on each implementation."""
    if importlib.util.find_spec("transformers") is None:
        bench.skipped["transformers"] = "not installed"
        return
    from fastattn.integrations import huggingface

    device = bench.device.torch_device
    case, size, actual = CASES[name], SIZES[device], length
    note = f"{allowed(case, size, length):.0%} of the scores allowed"
    label = f"{name} {size.window}" if "sliding" in case.layers else name
    key = {
        "case": f"{label}, {len(case.layers)} layers, d {size.width}", "mode": "train", "dtype": size.dtype,
        "batch": len(case.rows(length)), "q_heads": size.q_heads, "kv_heads": size.kv_heads, "q_len": length,
        "kv_len": length, "head_dim": size.head_dim, "causal": True,
    }  # fmt: skip
    if isinstance(bench.device, DryRun):
        size, actual = TINY, TINY.lengths[0]
        case = replace(case, layers=case.layers[-2:])
    huggingface.register()
    torch.manual_seed(0)
    model: Any = make_model(case, size, actual).to(device, DTYPES[size.dtype])
    inputs = make_inputs(case, size, actual, device)
    if bench.wants("fastattn"):
        check(model, inputs)

    def step(provider: str) -> None:
        model.set_attn_implementation(provider)
        model.zero_grad(set_to_none=True)
        model(**inputs, use_cache=False).loss.backward()

    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    for provider in PROVIDERS:
        if not bench.wants(provider, provider == "fastattn"):
            continue
        call = functools.partial(step, provider)
        try:
            model.zero_grad(set_to_none=True)
            peaks[provider] = bench.device.peak_memory(call)  # and compiles
        except Exception as error:
            bench.refused("huggingface", key | {"provider": provider}, error)
        else:
            calls[provider] = lambda _, call=call: call()
    tokens = float((inputs["labels"] >= 0).sum())
    for provider, timing in bench.device.time_long(calls, seconds=10.0).items():
        bench.record(
            "huggingface", key | {"provider": provider}, timing, tokens=tokens, peak_mib=peaks[provider], note=note
        )


def cells() -> list[Cell]:
    lengths = SIZES["cuda" if torch.cuda.is_available() else "cpu"].lengths
    return [
        Cell("huggingface", f"{name} L={length}", functools.partial(measure, name=name, length=length), 1 + place,
             ("huggingface", name))
        for place, length in enumerate(lengths) for name in CASES
    ]  # fmt: skip

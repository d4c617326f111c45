"""Layers against torch.nn and torch.compile of it, and whole training steps of two decoder models."""

import copy
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fastattn
from benchmarks.harness.device import Call, DryRun
from benchmarks.harness.models import ATTEND, MODELS, TINY, training_step
from benchmarks.harness.peers import compiled
from benchmarks.harness.problems import DTYPES
from benchmarks.harness.runner import Bench, Cell

DEVICES = ("cuda",)
TOKENS, WIDTH, HEADS = 16384, 1024, 16
LENGTHS = (4096, 1024, 2048, 512)
LAYERS = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
COMPILED_LENGTHS = (4096, 1024)


def make_layer(kind: str, width: int, dropout: float = 0.0) -> nn.Module:
    """A layer of torch.nn, or an encoder of two."""
    if kind == "MultiheadAttention":
        return nn.MultiheadAttention(width, HEADS, dropout, batch_first=True)
    if kind == "TransformerEncoder":  # post-norm: only there torch.nn leaves padding out
        layer = nn.TransformerEncoderLayer(width, HEADS, 4 * width, dropout=dropout, batch_first=True)
        return nn.TransformerEncoder(layer, 2)
    return getattr(nn, kind)(width, HEADS, 4 * width, dropout=dropout, batch_first=True, norm_first=True)


def apply(kind: str, layer: nn.Module, x: Tensor, padding: Tensor | None, causal_mask: Tensor) -> Tensor:
    """Call a layer as its user would: self-attention; the decoder causal, over a memory of the same length."""
    if kind == "MultiheadAttention":
        return layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    if kind in ("TransformerEncoderLayer", "TransformerEncoder"):
        return layer(x, src_key_padding_mask=padding)
    options = {"tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
    return layer(x, x, tgt_mask=causal_mask, tgt_is_causal=True, **options)


def measure_layer(
    bench: Bench, suite: str, kind: str, length: int, mode: str, padded: bool, providers: Sequence[str],
    dtype: str = "bf16", tokens: int = TOKENS, width: int = WIDTH, dropout: float = 0.0,
) -> None:  # fmt: skip
    """Time one layer on each provider: "fastattn", "torch" and "torch-compile"; mode "train" or "eval"."""
    key = {
        "case": kind + (", padded" if padded else "") + (f", dropout {dropout:g}" if dropout else ""),
        "mode": mode, "dtype": dtype, "batch": tokens // length,
        "q_heads": HEADS, "kv_heads": HEADS, "q_len": length, "kv_len": length, "head_dim": width // HEADS,
        "causal": kind == "TransformerDecoderLayer",
    }  # fmt: skip
    batch, actual_dtype = tokens // length, DTYPES[dtype]
    if isinstance(bench.device, DryRun):
        batch, length, width, actual_dtype = 2, 12, 64, torch.float32
    device = torch.device(bench.device.torch_device)
    torch.manual_seed(0)
    base = make_layer(kind, width, dropout).to(device, actual_dtype).train(mode == "train")
    options = {"device": device, "dtype": actual_dtype}
    inputs = [torch.randn(batch, length, width, **options) for _ in range(bench.device.input_sets)]
    dout = torch.randn(batch, length, width, **options)
    limits = torch.randint(length // 2, length + 1, (batch,), device=device)
    padding = torch.arange(length, device=device) >= limits[:, None] if padded else None
    causal_mask = nn.Transformer.generate_square_subsequent_mask(length, device=device, dtype=actual_dtype)

    def call_of(run: Callable[..., Tensor], layer: nn.Module) -> Call:
        def evaluate(repeat: int) -> None:
            with torch.no_grad():
                run(kind, layer, inputs[repeat % len(inputs)], padding, causal_mask)

        def train(repeat: int) -> None:
            out = run(kind, layer, inputs[repeat % len(inputs)], padding, causal_mask)
            torch.autograd.grad(out, list(layer.parameters()), dout)

        return train if mode == "train" else evaluate

    calls: dict[str, Call] = {}
    for name in providers:
        if not bench.wants(name, name != "torch"):
            continue
        layer, run = copy.deepcopy(base), apply
        if name == "fastattn":
            fastattn.convert(layer)
        elif name == "torch-compile" and device == "cuda":
            run = compiled(apply)
        try:
            calls[name] = call_of(run, layer)
            calls[name](0)
        except Exception as error:
            calls.pop(name, None)
            bench.refused(suite, key | {"provider": name}, error)
    for name, timing in bench.time(calls).items():
        bench.record(suite, key | {"provider": name}, timing, tokens=float(tokens))


def measure_step(bench: Bench, name: str) -> None:
    """Measure the time and memory of a training step with each attention."""
    config = TINY if isinstance(bench.device, DryRun) else MODELS[name]
    stored, dtype = MODELS[name], torch.float32 if isinstance(bench.device, DryRun) else torch.bfloat16
    key = {
        "case": f"{name} training step", "mode": "train", "dtype": "bf16", "batch": stored.batch,
        "q_heads": stored.q_heads, "kv_heads": stored.kv_heads, "q_len": stored.length, "kv_len": stored.length,
        "head_dim": stored.width // stored.q_heads, "causal": True,
    }  # fmt: skip
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    for provider in ATTEND:
        if not bench.wants(provider, provider == "fastattn"):
            continue
        try:
            step = training_step(config, provider, bench.device.torch_device, dtype)
            step(0)  # compiles, and makes the optimiser's state
            peaks[provider] = bench.device.peak_memory(lambda step=step: step(1))
            calls[provider] = step
        except Exception as error:
            bench.refused("layers", key | {"provider": provider}, error)
    for provider, timing in bench.time(calls, seconds=10 * bench.seconds).items():
        bench.record(
            "layers", key | {"provider": provider}, timing, tokens=float(stored.batch * stored.length),
            peak_mib=peaks[provider],
        )  # fmt: skip


def cells() -> list[Cell]:
    found = [
        Cell("layers", f"{name} training step", functools.partial(measure_step, name=name), 1, ("layers", name))
        for name in MODELS
    ]
    for length, kind, mode, padded in itertools.product(LENGTHS, LAYERS, ("train", "eval"), (True, False)):
        label = f"{kind} L={length} {mode}{', padded' if padded else ''}"
        compiled = length in COMPILED_LENGTHS
        run = functools.partial(measure_layer, suite="layers", kind=kind, length=length, mode=mode, padded=padded)
        providers = ("fastattn", "torch", "torch-compile") if compiled else ("fastattn", "torch")
        compiles = ("layers", kind, mode, padded, length if compiled else 0)
        run = functools.partial(run, providers=providers)
        telling = length == 4096 and mode == "train" and padded
        found.append(Cell("layers", label, run, 0 if telling else 1 if length >= 1024 and compiled else 2, compiles))
    return found

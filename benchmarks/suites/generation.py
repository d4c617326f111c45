"""Step-by-step generation: `fastattn.generate` against transformers, and against torch.nn without a cache.

The model of transformers is a Llama with our weights. torch.nn has no cache: its only decoder-only stack is an encoder
under a causal mask, which computes the whole text again for every token. A second case compares torch.nn's decoder with
cross-attention with our replacement of it, on the same weights.
"""

import copy
import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from benchmarks.harness.device import Call, DryRun
from benchmarks.harness.peers import Cannot
from benchmarks.harness.problems import DTYPES
from benchmarks.harness.runner import Bench, Cell
from fastattn.nn import CausalLM, CausalLMConfig
from fastattn.testing import assert_parity

DEVICES = ("cuda", "cpu")
BATCHES = (1, 8)
NEW_TOKENS = (64, 512)
PROMPT = 16
PROVIDERS = ("fastattn", "transformers", "transformers-static", "torch")


@dataclass(frozen=True)
class Size:
    """A Llama: RMSNorm, RoPE, a gated feed-forward, no biases."""

    layers: int
    width: int
    q_heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    dtype: str

    @property
    def case(self) -> str:
        return f"Llama, {self.layers} layers, d {self.width}"


SIZES = {
    "cpu": Size(4, 256, 8, 4, 688, 4096, "fp32"),
    "cuda": Size(8, 1024, 16, 8, 2752, 32000, "bf16"),
}
TINY = Size(1, 32, 4, 2, 48, 64, "fp32")


def make_own(size: Size) -> CausalLM:
    config = CausalLMConfig(
        vocab_size=size.vocabulary, d_model=size.width, num_layers=size.layers, num_heads=size.q_heads,
        num_kv_heads=size.kv_heads, dim_feedforward=size.hidden, tie_embeddings=False,
    )  # fmt: skip
    return CausalLM(config).eval()


def make_transformers(size: Size, own: CausalLM, length: int) -> nn.Module:
    """The Llama of transformers with our weights, on the device and in the dtype of `own`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    from fastattn.integrations import huggingface_weights

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.q_heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=length, rms_norm_eps=own.config.norm_eps, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(own.head.weight.device, own.head.weight.dtype).eval()
    huggingface_weights.export(own, model)
    return model


class Uncached(nn.Module):
    """torch.nn's stack with an embedding and an output projection."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, size.q_heads, size.hidden, dropout=0.0, batch_first=True, norm_first=True, bias=False
        )
        self.stack = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    @torch.no_grad()
    def generate(self, tokens: Tensor, new: int) -> Tensor:
        for _ in range(new):
            length, x = tokens.shape[1], self.embedding(tokens)
            mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)
            x = self.stack(x, mask=mask, is_causal=True)
            tokens = torch.cat([tokens, self.head(x[:, -1]).argmax(1, keepdim=True)], 1)
        return tokens


@torch.no_grad()
def check(own: CausalLM, theirs: nn.Module | None, prompt: Tensor) -> None:
    """Check our logits, which use the cache, by the parity rule; transformers is the eager peer."""
    expected = copy.deepcopy(own).double()(prompt)[:, -1]
    cache = own.make_cache(prompt.shape[0], prompt.shape[1])
    own.prefill(prompt[:, :-1], cache)
    actual = own(prompt[:, -1:], cache=cache)[:, -1]
    eager = own(prompt)[:, -1] if theirs is None else theirs(prompt).logits[:, -1]
    assert_parity(actual, expected, eager, "logits", intermediate=float(expected.abs().max()))


def call_of(provider: str, size: Size, own: CausalLM, theirs: nn.Module | None, prompt: Tensor) -> Callable[[int], Any]:
    """Greedy search for this many new tokens."""
    if provider == "fastattn":
        return lambda new: fastattn.generate(own, prompt, new)
    if provider == "torch":
        model = Uncached(size).to(prompt.device, own.head.weight.dtype).eval()
        return lambda new: model.generate(prompt, new)
    if theirs is None:
        raise Cannot("transformers is not installed")
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    if provider == "transformers-static":
        options["cache_implementation"] = "static"
    return lambda new: theirs.generate(prompt, max_new_tokens=new, **options)  # pyright: ignore


def measure_generation(bench: Bench, batch: int, new: int) -> None:
    """Measure the time and memory of all providers on one prompt length."""
    device = bench.device.torch_device
    stored, size = SIZES[device], SIZES[device]
    key = {
        "case": f"{stored.case}, batch {batch}", "mode": "generate", "dtype": stored.dtype, "batch": batch,
        "q_heads": stored.q_heads, "kv_heads": stored.kv_heads, "q_len": new, "kv_len": PROMPT + new,
        "head_dim": stored.width // stored.q_heads, "causal": True,
    }  # fmt: skip
    actual = new
    if isinstance(bench.device, DryRun):
        size, actual = TINY, 4
    torch.manual_seed(0)
    own = make_own(size).to(device, DTYPES[size.dtype])
    prompt = torch.randint(size.vocabulary, (batch, PROMPT), device=device)
    theirs = None
    try:
        theirs = make_transformers(size, own, PROMPT + new)
    except ImportError:
        bench.skipped["transformers"] = "not installed"
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    for provider in PROVIDERS:
        if (theirs is None and provider.startswith("transformers")) or not bench.wants(provider, provider != "torch"):
            continue
        try:
            if provider == "fastattn":
                check(own, theirs, prompt)
            call = call_of(provider, size, own, theirs, prompt)
            peaks[provider] = bench.device.peak_memory(functools.partial(call, actual))  # and compiles
        except Exception as error:
            bench.refused("generation", key | {"provider": provider}, error)
        else:
            calls[provider] = lambda _, call=call: call(actual)
    for provider, timing in bench.device.time_long(calls).items():
        bench.record(
            "generation", key | {"provider": provider}, timing, tokens=float(batch * new), peak_mib=peaks[provider]
        )


DECODER = {"d_model": 128, "nhead": 4, "batch_first": True}  # and torch.nn's default feed-forward of 2048
DECODER_LAYERS, DECODER_BATCH, MEMORY = 2, 4, 32


@torch.no_grad()
def decode(decoder: nn.TransformerDecoder, memory: Tensor, new: int) -> Tensor:
    """Decoding with the whole sequence in each step."""
    x = memory[:, :1]
    for _ in range(new):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        x = torch.cat([x, decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)[:, -1:]], 1)
    return x


@torch.no_grad()
def decode_by_steps(decoder: fastattn.nn.TransformerDecoder, memory: Tensor, new: int) -> Tensor:
    """Decoding with a cache."""
    cache, steps = decoder.make_cache(memory, new), [memory[:, :1]]
    for _ in range(new):
        steps.append(decoder.step(steps[-1], cache))
    return torch.cat(steps, 1)


def measure_decoder(bench: Bench, new: int) -> None:
    """torch.nn.TransformerDecoder, converted and not."""
    device = bench.device.torch_device
    key = {
        "case": f"torch.nn.TransformerDecoder, {DECODER_LAYERS} layers, d 128, batch {DECODER_BATCH}",
        "mode": "generate", "dtype": "fp32", "batch": DECODER_BATCH, "q_heads": 4, "kv_heads": 4, "q_len": new,
        "kv_len": new, "head_dim": 32, "causal": True,
    }  # fmt: skip
    actual = 4 if isinstance(bench.device, DryRun) else new
    torch.manual_seed(0)
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(**DECODER), DECODER_LAYERS).to(device).eval()
    ours: Any = copy.deepcopy(theirs)
    fastattn.convert(ours)
    memory = torch.randn(DECODER_BATCH, MEMORY, 128, device=device)
    few = min(actual, 16)
    exact = decode(copy.deepcopy(theirs).double(), memory.double(), few)
    assert_parity(decode_by_steps(ours, memory, few), exact, decode(theirs, memory, few), "steps")
    runs = {"fastattn": functools.partial(decode_by_steps, ours), "torch": functools.partial(decode, theirs)}
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    for provider, run in runs.items():
        if bench.wants(provider, provider != "torch"):
            call = functools.partial(run, memory, actual)
            peaks[provider] = bench.device.peak_memory(call)
            calls[provider] = lambda _, call=call: call()
    for provider, timing in bench.device.time_long(calls).items():
        tokens = float(DECODER_BATCH * new)
        bench.record("generation", key | {"provider": provider}, timing, tokens=tokens, peak_mib=peaks[provider])


def cells() -> list[Cell]:
    found = [
        Cell("generation", f"decoder, {new} tokens", functools.partial(measure_decoder, new=new), 3, ("generation",))
        for new in NEW_TOKENS
    ]
    for new, batch in itertools.product(NEW_TOKENS, BATCHES):
        run = functools.partial(measure_generation, batch=batch, new=new)
        found.append(Cell("generation", f"batch {batch}, {new} tokens", run, 1 if new == 64 else 3, ("generation",)))
    return found

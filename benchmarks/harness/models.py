"""Two small decoder models that take an attention function, for timing a whole training step, also in float64."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import fastattn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_fastattn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fastattn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attend_sdpa_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return attend_sdpa(q, k, v)


ATTEND: dict[str, Attend] = {"fastattn": attend_fastattn, "sdpa": attend_sdpa, "sdpa-flash": attend_sdpa_flash}


@dataclass(frozen=True)
class ModelConfig:
    vocabulary: int
    layers: int
    width: int
    q_heads: int
    kv_heads: int
    hidden: int
    length: int
    batch: int
    llama: bool
    """RMSNorm, rotary positions and a gated feed-forward instead of LayerNorm, learned positions and GELU."""


MODELS = {
    "GPT-2 small": ModelConfig(50257, 12, 768, 12, 12, 3072, 1024, 16, llama=False),
    "Llama-like 0.9B": ModelConfig(32000, 16, 2048, 32, 8, 5632, 4096, 2, llama=True),
}
TINY = ModelConfig(64, 1, 32, 4, 2, 48, 16, 2, llama=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, arXiv:2104.09864): rotates pairs of halves by an angle per position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.config, self.attend = config, attend
        self.head_dim = config.width // config.q_heads
        norm = nn.RMSNorm if config.llama else nn.LayerNorm
        linear = functools.partial(nn.Linear, bias=not config.llama)
        self.norm1, self.norm2 = norm(config.width), norm(config.width)
        self.qkv = linear(config.width, (config.q_heads + 2 * config.kv_heads) * self.head_dim)
        self.out = linear(config.width, config.width)
        self.up = linear(config.width, config.hidden * (2 if config.llama else 1))
        self.down = linear(config.hidden, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config = self.config
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split((config.q_heads, config.kv_heads, config.kv_heads), dim=1)
        if config.llama:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        hidden = self.up(self.norm2(x))
        if config.llama:
            gate, hidden = hidden.chunk(2, dim=-1)
            return x + self.down(F.silu(gate) * hidden)
        return x + self.down(F.gelu(hidden, approximate="tanh"))


class Decoder(nn.Module):
    """A language model without dropout; its output is the mean cross-entropy of the next token."""

    def __init__(self, config: ModelConfig, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.position = None if config.llama else nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = (nn.RMSNorm if config.llama else nn.LayerNorm)(config.width)
        head_dim = config.width // config.q_heads
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(config.length)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        if self.position is not None:
            x = x + self.position.weight
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)  # tied
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def training_step(config: ModelConfig, provider: str, device: str, dtype: torch.dtype) -> Callable[[int], None]:
    """One optimiser step on random tokens, as a call to time."""
    torch.manual_seed(0)
    model = Decoder(config, ATTEND[provider]).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    batches = torch.randint(config.vocabulary, (4, config.batch, config.length + 1), device=device)

    def step(repeat: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batches[repeat % 4]).backward()
        optimizer.step()

    return step


class Float64(TorchFunctionMode):
    """Float64 throughout: models of transformers ask for float32 in norms and softmax whatever their own dtype is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        if func is torch.full and len(args) > 1 and isinstance(args[1], float):  # whose dtype would be float32
            kwargs = {"dtype": torch.float64} | (kwargs or {})
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)

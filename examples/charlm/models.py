"""The two models, as configurations of `fastattn.nn.CausalLM`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastattn.nn import CausalLMConfig, Learned, RoPE

Kind = Literal["gpt", "modern"]
KINDS: tuple[Kind, ...] = ("gpt", "modern")


@dataclass(frozen=True)
class Shape:
    """Size of a model. The defaults are nanoGPT's for a CPU."""

    kind: Kind
    block: int = 64  # characters that it sees
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0

    def config(self, vocab_size: int) -> CausalLMConfig:
        """Both kinds have equally many parameters, within one percent, at the same size."""
        size = {
            "vocab_size": vocab_size,
            "d_model": self.width,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "dropout": self.dropout,
        }
        if self.kind == "gpt":  # nanoGPT's; it shares with the other one: pre-norm, no biases, tied embeddings
            return CausalLMConfig(**size, norm="layer", activation="gelu", position=Learned(self.block))
        return CausalLMConfig(**size, norm="rms", activation="swiglu", position=RoPE(), qk_norm=True)

"""The frozen configuration that describes a Transformer; every layer reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, TypeVar

from fastattn import _check as check
from fastattn.nn import keywords
from fastattn.nn.position import ALiBi, Learned, LinearScaling, Llama3Scaling, RoPE, Sinusoidal, YarnScaling

__all__ = ["CausalLMConfig", "EncoderDecoderConfig", "TransformerConfig"]

Config = TypeVar("Config", bound="_Data")

GATED = ("swiglu", "geglu")
_ROPE = RoPE()
PLAIN = ("relu", "gelu", "gelu_tanh", "silu")


class _Data:
    """A description that can be written as JSON and read back."""

    def to_dict(self) -> dict[str, Any]:
        """All settings as numbers, strings, lists and dicts; each dict names its class under "kind"."""
        return _as_data(self)

    @classmethod
    def from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
        """The description that `to_dict` wrote.

        Raises:
            TypeError, ValueError: a setting is unknown, out of range or of another class; the text names it.
        """
        value = _from_data(data, cls.__name__)
        if type(value) is not cls:
            raise TypeError(f"data: expected the kind {cls.__name__}, got {type(value).__name__}")
        return value


@keywords.of_config
@dataclass(frozen=True, kw_only=True)
class TransformerConfig(_Data):
    """One stack of blocks. The defaults are today's: pre-norm, RMSNorm, SwiGLU, RoPE, no biases.

    `TransformerConfig(norm="layer", norm_first=False, activation="relu", bias=True, position=Sinusoidal())` is
    Vaswani et al. 2017; `TransformerConfig(norm="layer", activation="gelu_tanh", bias=True, position=Learned(1024))`
    is GPT-2.

    Args:
        d_model: size of an element.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads. Fewer than num_heads make grouped-query attention
            (Ainslie et al. 2023, arXiv:2305.13245); 1 makes multi-query attention. None: num_heads.
        head_dim: None: d_model / num_heads.
        dim_feedforward: width of the feed-forward network. None: 4 d_model. With a gate: 8/3 d_model, rounded up to a
            multiple of 8, which keeps the number of parameters about the same.
        activation: "relu", "gelu", "gelu_tanh", "silu"; or with a gate "swiglu", "geglu" (Shazeer 2020,
            arXiv:2002.05202).
        norm: "rms" (`torch.nn.RMSNorm`) or "layer" (`torch.nn.LayerNorm`).
        norm_first: normalise the input of each part (pre-norm); False: the result of each residual sum (post-norm).
        final_norm: normalise the output of the stack. None: with pre-norm.
        norm_eps: epsilon of all norms.
        bias: whether linear layers and LayerNorm have biases.
        position: `RoPE`, `ALiBi`, `Learned`, `Sinusoidal` or None. It applies to self-attention; cross-attention has
            no positions.
        qk_norm: RMSNorm of each head's query and key before RoPE (Henry et al. 2020, arXiv:2010.04245).
        window: (left, right) as in `fastattn.attention`, for self-attention.
        softcap: as in `fastattn.attention`.
        sinks: one learned logit per query head. It takes part in the softmax but has no value (Xiao et al. 2023,
            arXiv:2309.17453). They start at 0.
        dropout: of attention weights, of each part's output before the residual sum, and of embeddings.
        init_std: weights start as N(0, init_std), biases at 0, norms at 1. A projection that ends in one of the stack's
            R residual sums starts as N(0, init_std / sqrt(R)), so that the sum does not grow with depth (Radford et al.
            2019, GPT-2).
        checkpoint: in training, keep only the input of each block and compute it again for the backward.
    """

    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dim_feedforward: int | None = None
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_first: bool = True
    final_norm: bool | None = None
    norm_eps: float = 1e-5
    bias: bool = False
    position: RoPE | ALiBi | Learned | Sinusoidal | None = _ROPE
    qk_norm: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads"):
            check.integer(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim", "dim_feedforward"):
            if getattr(self, name) is not None:
                check.integer(name, getattr(self, name))
        for name, allowed in (("activation", PLAIN + GATED), ("norm", ("rms", "layer"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}"
                )
        for name in ("norm_first", "bias", "qk_norm", "sinks", "checkpoint"):
            check.flag(name, getattr(self, name))
        check.instance("final_norm", self.final_norm, bool, type(None))
        check.instance("position", self.position, RoPE, ALiBi, Learned, Sinusoidal, type(None))
        check.number("norm_eps", self.norm_eps)
        check.number("init_std", self.init_std)
        check.number("dropout", self.dropout, "[0, 1)")
        if self.softcap is not None:
            check.number("softcap", self.softcap)
        check.window("window", self.window)
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(f"d_model: expected a multiple of num_heads == {self.num_heads}, got {self.d_model}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads == {self.num_heads}, got {self.kv_heads}")
        if isinstance(self.position, RoPE) and self.dim_per_head % 2:
            raise ValueError(f"head_dim: expected an even number for RoPE, got {self.dim_per_head}")

    @property
    def kv_heads(self) -> int:
        """num_kv_heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def dim_per_head(self) -> int:
        """head_dim, resolved."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate."""
        return self.activation in GATED

    @property
    def ff_dim(self) -> int:
        """dim_feedforward, resolved."""
        if self.dim_feedforward is not None:
            return self.dim_feedforward
        return -(-8 * self.d_model // 24) * 8 if self.gated else 4 * self.d_model


@keywords.of_config
@dataclass(frozen=True, kw_only=True)
class CausalLMConfig(TransformerConfig):
    """A decoder-only language model: the fields of `TransformerConfig`, and these.

    Args:
        vocab_size: number of tokens.
        tie_embeddings: the output projection is the embedding (Press and Wolf 2017, arXiv:1608.05859).
        scale_embeddings: multiply embeddings by sqrt(d_model) (Vaswani et al. 2017, section 3.4).
    """

    vocab_size: int
    tie_embeddings: bool = True
    scale_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check.integer("vocab_size", self.vocab_size)
        check.flag("tie_embeddings", self.tie_embeddings)
        check.flag("scale_embeddings", self.scale_embeddings)


@keywords.of_config
@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(_Data):
    """A sequence-to-sequence model: two stacks with the same d_model, and a vocabulary each.

    Args:
        encoder, decoder: the two stacks.
        source_vocab_size: number of source tokens.
        target_vocab_size: number of target tokens. None: the source's tokens, and both share one embedding.
        tie_embeddings: the output projection is the target's embedding.
        scale_embeddings: multiply embeddings by sqrt(d_model) (Vaswani et al. 2017, section 3.4).
    """

    encoder: TransformerConfig
    decoder: TransformerConfig
    source_vocab_size: int
    target_vocab_size: int | None = None
    tie_embeddings: bool = True
    scale_embeddings: bool = False

    def __post_init__(self) -> None:
        check.instance("encoder", self.encoder, TransformerConfig)
        check.instance("decoder", self.decoder, TransformerConfig)
        check.integer("source_vocab_size", self.source_vocab_size)
        if self.target_vocab_size is not None:
            check.integer("target_vocab_size", self.target_vocab_size)
        check.flag("tie_embeddings", self.tie_embeddings)
        check.flag("scale_embeddings", self.scale_embeddings)
        if self.encoder.d_model != self.decoder.d_model:
            raise ValueError(
                f"decoder.d_model: expected encoder.d_model == {self.encoder.d_model}, got {self.decoder.d_model}"
            )


_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        TransformerConfig, CausalLMConfig, EncoderDecoderConfig, RoPE, ALiBi, Learned, Sinusoidal, LinearScaling,
        Llama3Scaling, YarnScaling,
    )
}  # fmt: skip


def _as_data(value: Any) -> Any:
    if is_dataclass(value):
        settings = {field.name: _as_data(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **settings}
    return list(value) if isinstance(value, tuple) else value


def _from_data(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    kind = _KINDS.get(value.get("kind", ""))
    if kind is None:
        raise ValueError(f"{where}: expected a kind among {', '.join(_KINDS)}, got {value.get('kind')!r}")
    known = [field.name for field in fields(kind)]
    unknown = sorted(value.keys() - {"kind", *known})
    if unknown:
        raise ValueError(f"{where}: expected settings among {', '.join(known)}, got {', '.join(unknown)}")
    return kind(**{name: _from_data(value[name], f"{where}.{name}") for name in known if name in value})

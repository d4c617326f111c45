"""Token embedding and position encodings.

`InputEmbedding` and `PositionalEncoding` are modules for use before the first layer. `TransformerConfig.position` takes
`Sinusoidal`, `Learned`, `RoPE` or `ALiBi`. For continuous input, such as a time series, use `torch.nn.Linear(features,
d_model)` in place of `InputEmbedding`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastattn import _check as check
from fastattn.functional import divided, rotary

__all__ = [
    "ALiBi",
    "InputEmbedding",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "PositionalEncoding",
    "RoPE",
    "Sinusoidal",
    "YarnScaling",
    "rotate",
]


class InputEmbedding(nn.Embedding):
    """Token embedding times sqrt(d_model) (Vaswani et al. 2017, section 3.4).

    The weights start as N(0, 1 / d_model), not torch's N(0, 1). After scaling, an embedding has unit variance, like the
    position encoding that is added to it, and `weight` can also serve as the output projection. The row of
    `padding_idx` is zero and gets no gradient.

    Shapes: tokens (...) of int32 or int64 -> (..., d_model) of the weight's dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        d_model: int,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, d_model, padding_idx, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(self.embedding_dim)


class PositionalEncoding(nn.Module):
    """Adds to each element of a sequence a vector that depends on its position, then applies dropout.

    Args:
        d_model: size of an element.
        max_len: number of positions; a longer input is an error.
        dropout: probability of zeroing an entry of the sum.
        kind: "sinusoidal": sin and cos at wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al. 2017, section 3.5);
            fixed and computed. The state dict does not hold it, a module made on the meta device needs no other care,
            and values are exact in the dtype of the input, whatever the argument of `to()`. "learned": a parameter
            `table` (max_len, d_model), which starts as N(0, 0.02) (as in Devlin et al. 2018, BERT).
        batch_first: sequence dimension of a 3-D input, as in the layers.
    """

    table: Tensor  # (max_len, d_model)

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        dropout: float = 0.1,
        kind: Literal["sinusoidal", "learned"] = "sinusoidal",
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("sinusoidal", "learned"):
            raise ValueError(f"kind: expected 'sinusoidal' or 'learned', got {kind!r}")
        check.integer("d_model", d_model)
        check.integer("max_len", max_len)
        self.kind = kind
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        table = torch.empty(max_len, d_model, device=device, dtype=dtype)
        if kind == "learned":
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", _sinusoids(table), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill a learned table. Call it after `to_empty()` on a module that was made on the meta device."""
        if self.kind == "learned":
            nn.init.normal_(self.table, std=0.02)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.kind == "learned":
            return super()._apply(fn, recurse)
        # to(), cuda(), to_empty(), ... would move the table and round or lose its values, so this computes it anew.
        table = self._buffers.pop("table")
        super()._apply(fn, recurse)
        assert table is not None
        probe = fn(torch.empty((), device="cpu" if table.is_meta else table.device, dtype=table.dtype))
        self._buffers["table"] = _sinusoids(table.to(probe.dtype), probe.device)
        return self

    def _exact_table(self, like: Tensor) -> Tensor:
        """The table on the device of `like`, with values that are exact in the dtype of `like`."""
        table = self.table
        if self.kind == "learned":
            return table
        if table.device != like.device or torch.promote_types(table.dtype, like.dtype) != table.dtype:
            table = _sinusoids(table.to(like.dtype), like.device)
            if not torch.compiler.is_compiling():
                self.table = table
        return table

    def at(self, positions: Tensor, like: Tensor) -> Tensor:
        """The encoding of each of `positions` (...), integer, to add to `like`: (..., d_model), of like's dtype."""
        return self._exact_table(like)[positions].to(like.dtype)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Add the encoding of positions offset, offset + 1, ...; returns a tensor of x's shape and dtype.

        Args:
            x: (N, L, d_model) with `batch_first`, else (L, N, d_model); or (L, d_model) unbatched. Floating.
            offset: position of the first element, for decoding step by step.
        """
        max_len, d_model = self.table.shape
        if x.dim() not in (2, 3) or x.shape[-1] != d_model:
            raise ValueError(f"x.shape: expected 2 or 3 dimensions, the last of {d_model}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x.dtype: expected a floating dtype, got {x.dtype}; InputEmbedding embeds tokens")
        seq_dim = 1 if x.dim() == 3 and self.batch_first else 0
        L = x.shape[seq_dim]
        division = divided.current()
        whole = L if division is None else division.whole(L)
        if offset < 0 or offset + whole > max_len:
            raise ValueError(
                f"offset: expected 0 or more, and offset + length <= max_len == {max_len}, got {offset} + {whole}"
            )
        if division is None:
            encoding = self._exact_table(x)[offset : offset + L].to(x.dtype)  # (L, d_model)
        else:
            encoding = self.at(division.positions(L, x.device) + offset, x)
        if x.dim() == 3 and not self.batch_first:
            encoding = encoding.unsqueeze(1)  # (L, 1, d_model)
        return self.dropout(x + encoding)

    def extra_repr(self) -> str:
        max_len, d_model = self.table.shape
        return f"{d_model}, max_len={max_len}, kind={self.kind!r}, batch_first={self.batch_first}"


@torch.no_grad()
def _sinusoids(like: Tensor, device: torch.device | None = None) -> Tensor:
    """The sinusoidal table of the shape and device of `like`, in its dtype, but float32 at least."""
    device = like.device if device is None else device
    max_len, d_model = like.shape
    table = torch.empty(max_len, d_model, device=device, dtype=torch.promote_types(like.dtype, torch.float32))
    options: dict[str, Any] = {"device": device, "dtype": torch.float64}  # float32 angles are off by 1e-4 at 5000
    position = torch.arange(max_len, **options)
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, **options) / d_model)
    angle = position[:, None] * frequency  # (max_len, ceil(d_model / 2))
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : d_model // 2].cos()
    return table


@dataclass(frozen=True)
class Sinusoidal:
    """Fixed sines and cosines added to the input of the first layer; see `PositionalEncoding`."""

    max_len: int = 5000

    def __post_init__(self) -> None:
        check.integer("max_len", self.max_len)


@dataclass(frozen=True)
class Learned:
    """A learned vector per position added to the input of the first layer; see `PositionalEncoding`."""

    max_len: int

    def __post_init__(self) -> None:
        check.integer("max_len", self.max_len)


@dataclass(frozen=True)
class ALiBi:
    """Scores decrease linearly with distance, with a slope per head (Press et al. 2022, arXiv:2108.12409).

    Args:
        learned: the slopes are parameters that start at the paper's values.
    """

    learned: bool = False

    def __post_init__(self) -> None:
        check.flag("learned", self.learned)

    def slopes(self, num_heads: int, device: torch.device | str | None = None) -> Tensor:
        """The paper's geometric sequence, (num_heads,) of float32; 8 heads have 1/2, 1/4, ..., 1/256."""
        power = 2 ** (num_heads.bit_length() - 1)  # heads beyond a power of two take every other slope of the double
        steps = torch.arange(1, power + 1, device=device) * (8.0 / power)
        between = (2 * torch.arange(num_heads - power, device=device) + 1) * (4.0 / power)
        return torch.exp2(-torch.cat([steps, between]))


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    magnitude: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check.number("factor", self.factor)

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        """`frequency` (head_dim / 2,) in radians per position -> the same, scaled."""
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Stretches long wavelengths by `factor`, keeps short ones and blends those between (Llama 3.1).

    Args:
        factor: how many times longer the context is than it was in training.
        original_max_len: the context of training.
        low, high: wavelengths longer than original_max_len / low stretch fully, those shorter than original_max_len /
            high not at all.
    """

    factor: float = 8.0
    original_max_len: int = 8192
    low: float = 1.0
    high: float = 4.0

    magnitude: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check.number("factor", self.factor)
        check.integer("original_max_len", self.original_max_len)
        check.number("low", self.low)
        check.number("high", self.high, f"({self.low}, inf)")

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        turns = self.original_max_len * frequency / (2 * math.pi)  # over the context of training
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: blends frequencies by their number of turns and sharpens scores (Peng et al. 2023, arXiv:2309.00071).

    Args:
        factor: how many times longer the context is than it was in training.
        original_max_len: the context of training.
        slow, fast: frequencies with at most `slow` turns over that context stretch fully, those with at least `fast`
            turns not at all.
        attention_factor: magnitude of the rotated vectors; its square sharpens the scores. None: the paper's
            0.1 ln(factor) + 1.
    """

    factor: float
    original_max_len: int
    slow: float = 1.0
    fast: float = 32.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        check.number("factor", self.factor)
        check.integer("original_max_len", self.original_max_len)
        check.number("slow", self.slow)
        check.number("fast", self.fast, f"({self.slow}, inf)")
        if self.attention_factor is not None:
            check.number("attention_factor", self.attention_factor)

    @property
    def magnitude(self) -> float:
        """attention_factor, resolved."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def scale(self, frequency: Tensor, theta: float) -> Tensor:
        half = frequency.shape[0]

        def index(turns: float) -> float:  # of the frequency with this many turns
            return half * math.log(self.original_max_len / (2 * math.pi * turns)) / math.log(theta)

        first, last = max(math.floor(index(self.fast)), 0), min(math.ceil(index(self.slow)), 2 * half - 1)
        ramp = (torch.arange(half, device=frequency.device, dtype=frequency.dtype) - first) / max(last - first, 1e-3)
        stretch = ramp.clamp(0, 1)
        return frequency * (1 - stretch + stretch / self.factor)


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding: queries and keys turn with position (Su et al. 2021, arXiv:2104.09864).

    Dimension i turns with dimension i + head_dim / 2, as in GPT-NeoX and in the Llama weights of Hugging Face.

    Args:
        theta: dimension pair i turns by theta^(-2 i / head_dim) radians per position.
        scaling: how to extend the context beyond that of training.
    """

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        check.number("theta", self.theta, "(1, inf)")
        check.instance("scaling", self.scaling, LinearScaling, Llama3Scaling, YarnScaling, type(None))

    def tables(self, positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin for `rotate`: positions (...) integer -> two of (..., head_dim / 2).

        `dtype` is that of the tensor to rotate. The tables are float64 if it is, else float32.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim: expected an even number for RoPE, got {head_dim}")
        dtype = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
        frequency = 1.0 / self.theta**exponent
        magnitude = 1.0
        if self.scaling is not None:
            frequency, magnitude = self.scaling.scale(frequency, self.theta), self.scaling.magnitude
        angle = positions[..., None] * frequency
        cos, sin = angle.cos(), angle.sin()
        return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (..., L, heads, D) by the angles of `RoPE.tables` (..., L, D / 2), in at least float32.

    Returns a tensor of x's shape and dtype.
    """
    if rotary.served(x, tables):
        return rotary.rotate(x, tables)
    cos, sin = (table.unsqueeze(-2) for table in tables)  # the same for all heads
    first, second = x.chunk(2, dim=-1)  # float32 tables promote half precision
    return torch.cat(rotary.turn_pair(first, second, cos, sin), dim=-1).to(x.dtype)


def rotate_both(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys that stand at the same positions, whose heads may differ in number."""
    if rotary.served(q, tables) and rotary.served(k, tables):
        return rotary.rotate(q, tables), rotary.rotate(k, tables)
    both = rotate(torch.cat([q, k], dim=-2), tables)  # in one go: a decode step is made of small operations
    q, k = both.split((q.shape[-2], k.shape[-2]), dim=-2)
    return q, k

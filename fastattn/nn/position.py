"""What stands before the first layer of a Transformer: token embedding and position encoding.

For continuous input, such as a time series, use `torch.nn.Linear(features, d_model)` in place of `InputEmbedding`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["InputEmbedding", "PositionalEncoding"]


class InputEmbedding(nn.Embedding):
    """Token embedding times sqrt(d_model) (Vaswani et al. 2017, section 3.4).

    The weights start as N(0, 1 / d_model), not torch's N(0, 1): scaled, an embedding then has unit variance, the size
    of the position encoding that is added to it, and `weight` can also serve as the output projection. The row of
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
            fixed, and not in the state dict. "learned": a parameter `table` (max_len, d_model), which starts
            as N(0, 0.02) (as in Devlin et al. 2018, BERT).
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
            raise ValueError(f"expected kind to be 'sinusoidal' or 'learned', got {kind!r}")
        if d_model <= 0 or max_len <= 0:
            raise ValueError(f"expected d_model and max_len to be positive, got {d_model} and {max_len}")
        self.kind = kind
        self.batch_first = batch_first
        self.dropout = nn.Dropout(dropout)
        table = torch.empty(max_len, d_model, device=device, dtype=dtype)
        if kind == "learned":
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table. Call it after `to_empty()` on a module that was made on the meta device."""
        if self.kind == "learned":
            nn.init.normal_(self.table, std=0.02)
            return
        max_len, d_model = self.table.shape
        options = {"device": self.table.device, "dtype": torch.float64}  # float32 angles are off by 1e-4 at 5000
        position = torch.arange(max_len, **options)
        frequency = 10000.0 ** (-torch.arange(0, d_model, 2, **options) / d_model)
        angle = position[:, None] * frequency  # (max_len, ceil(d_model / 2))
        self.table[:, 0::2] = angle.sin().to(self.table.dtype)
        self.table[:, 1::2] = angle[:, : d_model // 2].cos().to(self.table.dtype)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Add the encoding of positions offset, offset + 1, ...; returns a tensor of x's shape and dtype.

        Args:
            x: (N, L, d_model) with `batch_first`, else (L, N, d_model); or (L, d_model) unbatched. Floating.
            offset: position of the first element, for decoding step by step.
        """
        max_len, d_model = self.table.shape
        if x.dim() not in (2, 3) or x.shape[-1] != d_model:
            raise ValueError(f"expected x to be 2-D or 3-D with x.shape[-1] == {d_model}, got {tuple(x.shape)}")
        seq_dim = 1 if x.dim() == 3 and self.batch_first else 0
        L = x.shape[seq_dim]
        if offset < 0 or offset + L > max_len:
            raise ValueError(f"expected 0 <= offset and offset + length <= max_len == {max_len}, got {offset} + {L}")
        encoding = self.table[offset : offset + L].to(x.dtype)  # (L, d_model)
        if x.dim() == 3 and not self.batch_first:
            encoding = encoding.unsqueeze(1)  # (L, 1, d_model)
        return self.dropout(x + encoding)

    def extra_repr(self) -> str:
        max_len, d_model = self.table.shape
        return f"{d_model}, max_len={max_len}, kind={self.kind!r}, batch_first={self.batch_first}"

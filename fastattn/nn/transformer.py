"""The Transformer (Vaswani et al. 2017) with torch.nn's interface, on fastattn's multi-head attention.

The classes extend those of the same names in torch.nn, so constructors, parameter names, initialisation and
`isinstance` checks are torch.nn's own. Two things change: attention is `fastattn.nn.MultiheadAttention`, and the same
code runs in training and evaluation. torch.nn's layers have a second implementation for evaluation, which skips
overridden methods. `make_cache` and `step` are new: they decode a sequence step by step and compute only the new
elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import keywords
from fastattn.nn.tracing import fx_leaf, refuse_torchscript
from fastattn.nn.transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from fastattn.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


class Transformer(nn.Transformer):
    """Drop-in replacement for `torch.nn.Transformer`: an encoder and a decoder, without embeddings.

    Shapes and masks of `forward(src, tgt, ...)` are those of `TransformerEncoder` and `TransformerDecoder`.
    A custom encoder or decoder is used as it is.
    """

    @keywords.transformer
    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer_args = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip

        def final_norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*layer_args)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, final_norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*layer_args)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, final_norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    forward = fx_leaf(keywords.translate(nn.Transformer.forward))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

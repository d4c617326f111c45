"""A model of equally many parameters with torch.nn's layers, which lack some parts of ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.nn import EncoderDecoder, PositionalEncoding, TransformerConfig


class OnTorch(nn.Module):
    """Takes the arguments of `model` in training and returns logits: another function, with its own weights.

    Instead of RMSNorm, SwiGLU and RoPE it has LayerNorm, ReLU between wider layers, and sinusoids.
    """

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        sizes = model.config.decoder

        def layer(kind: type[nn.Module], config: TransformerConfig) -> nn.Module:
            hidden = config.ff_dim * 3 // 2  # as many parameters in two matrices as SwiGLU has in three
            return kind(
                config.d_model, config.num_heads, hidden, config.dropout, batch_first=True, norm_first=True,
                bias=config.bias,
            )  # fmt: skip

        def norm() -> nn.Module:
            return nn.LayerNorm(sizes.d_model, bias=sizes.bias)

        encoder, layers = layer(nn.TransformerEncoderLayer, model.config.encoder), model.config.encoder.num_layers
        self.encoder = nn.TransformerEncoder(encoder, layers, norm(), enable_nested_tensor=False)  # pyright: ignore
        decoder = layer(nn.TransformerDecoderLayer, sizes)
        self.decoder = nn.TransformerDecoder(decoder, sizes.num_layers, norm())  # pyright: ignore
        self.source_embedding = nn.Embedding(model.source_embedding.num_embeddings, sizes.d_model)
        self.target_embedding = nn.Embedding(model.target_embedding.num_embeddings, sizes.d_model)
        self.position = PositionalEncoding(sizes.d_model, dropout=sizes.dropout, batch_first=True)
        self.head = nn.Linear(sizes.d_model, self.target_embedding.num_embeddings, bias=False)
        self.head.weight = self.target_embedding.weight

    def forward(self, source: Tensor, target: Tensor, *, source_lengths: Tensor) -> Tensor:
        """(N, S) and (N, T) -> logits (N, T, V)."""
        padding = torch.arange(source.shape[1], device=source.device) >= source_lengths[:, None]
        later = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        memory = self.encoder(self.position(self.source_embedding(source)), src_key_padding_mask=padding)
        hidden = self.decoder(
            self.position(self.target_embedding(target)), memory, tgt_mask=later, tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )  # fmt: skip
        return self.head(hidden)

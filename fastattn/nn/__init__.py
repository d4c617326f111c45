"""Layers on the fused attention operator: drop-in replacements for torch.nn's, and the embeddings they need."""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.position import InputEmbedding, PositionalEncoding
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "InputEmbedding",
    "MultiheadAttention",
    "PositionalEncoding",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]

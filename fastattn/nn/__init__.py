"""Layers on the fused attention operator: drop-in replacements for torch.nn's, and today's Transformers.

`MultiheadAttention` and the `Transformer...` classes have torch.nn's interface and another engine. A
`TransformerConfig` describes `Attention`, `FeedForward`, `Block`, `Encoder`, `Decoder`, `CausalLM` and
`EncoderDecoder`.
"""

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.block import Attention, Block, FeedForward
from fastattn.nn.cache import DynamicCache, KVCache
from fastattn.nn.config import CausalLMConfig, EncoderDecoderConfig, TransformerConfig
from fastattn.nn.model import CausalLM, EncoderDecoder
from fastattn.nn.paged_cache import PagedCache, SlidingWindowCache
from fastattn.nn.position import (
    ALiBi,
    InputEmbedding,
    Learned,
    LinearScaling,
    Llama3Scaling,
    PositionalEncoding,
    RoPE,
    Sinusoidal,
    YarnScaling,
)
from fastattn.nn.stack import Decoder, Encoder
from fastattn.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fastattn.nn.weights import from_torch, load_torch_state_dict, torch_state_dict

__all__ = [
    "ALiBi",
    "Attention",
    "Block",
    "CausalLM",
    "CausalLMConfig",
    "Decoder",
    "DynamicCache",
    "Encoder",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FeedForward",
    "InputEmbedding",
    "KVCache",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "MultiheadAttention",
    "PagedCache",
    "PositionalEncoding",
    "RoPE",
    "Sinusoidal",
    "SlidingWindowCache",
    "Transformer",
    "TransformerConfig",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "YarnScaling",
    "from_torch",
    "load_torch_state_dict",
    "torch_state_dict",
]

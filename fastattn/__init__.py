"""fastattn: one fused attention operator for PyTorch, the layers built on it, and the proof that both are right."""

from . import flops, nn
from .activate import activate, deactivate
from .backends import Explanation
from .block_mask import BlockMask
from .convert import ConversionReport, convert, revert
from .functional import attention, attention_varlen, explain, scaled_dot_product_attention
from .generation import BeamSearch, Generated, Sampling, generate, stream
from .kvcache import attention_with_kvcache

__version__ = "0.1.0"

__all__ = [
    "BeamSearch",
    "BlockMask",
    "ConversionReport",
    "Explanation",
    "Generated",
    "Sampling",
    "activate",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "convert",
    "deactivate",
    "explain",
    "flops",
    "generate",
    "nn",
    "revert",
    "scaled_dot_product_attention",
    "stream",
]

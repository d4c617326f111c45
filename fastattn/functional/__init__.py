"""The public functions: validate, choose a backend, call it."""

from fastattn.functional.attention import (
    Backend,
    attention,
    attention_varlen,
    explain,
    scaled_dot_product_attention,
)
from fastattn.functional.kvcache import attention_with_kvcache

__all__ = [
    "Backend",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "explain",
    "scaled_dot_product_attention",
]

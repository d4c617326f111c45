"""The public functions: validate, choose a backend, call it."""

from fastattn.functional.attention import Backend, attention, explain
from fastattn.functional.kvcache import attention_with_kvcache, explain_with_kvcache
from fastattn.functional.merge import merge
from fastattn.functional.torch_signature import scaled_dot_product_attention
from fastattn.functional.varlen import attention_varlen, explain_varlen
from fastattn.ops import decompositions

__all__ = [
    "Backend",
    "attention",
    "attention_varlen",
    "attention_with_kvcache",
    "decompositions",
    "explain",
    "explain_varlen",
    "explain_with_kvcache",
    "merge",
    "scaled_dot_product_attention",
]

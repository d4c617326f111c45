"""The description of a call, validated and normalised once. Backends read nothing else."""

from fastattn.spec.attention import AttentionSpec, make_spec
from fastattn.spec.cache import UNDIVIDED, CacheSpec, make_cache_spec
from fastattn.spec.cache_operands import QUANTISED
from fastattn.spec.checks import FLOAT_DTYPES, check_flag, is_dtensor, known
from fastattn.spec.operands import Gradients, Inputs, Learned, Operands, Options, Rotary

__all__ = [
    "FLOAT_DTYPES",
    "QUANTISED",
    "UNDIVIDED",
    "AttentionSpec",
    "CacheSpec",
    "Gradients",
    "Inputs",
    "Learned",
    "Operands",
    "Options",
    "Rotary",
    "check_flag",
    "is_dtensor",
    "known",
    "make_cache_spec",
    "make_spec",
]

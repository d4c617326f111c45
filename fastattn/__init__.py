"""fastattn: one fused attention operator for PyTorch, the layers built on it, and the proof that both are right."""

import importlib
from typing import TYPE_CHECKING, Any

from . import flops, nn
from .backends import Explanation
from .backends import reference as reference
from .block_mask import BlockMask
from .functional import (
    attention,
    attention_varlen,
    attention_with_kvcache,
    decompositions,
    explain,
    explain_varlen,
    explain_with_kvcache,
    merge,
    scaled_dot_product_attention,
)
from .inference import BeamSearch, Generated, Sampling, generate, stream
from .integrations.activate import activate, deactivate
from .integrations.convert import ConversionReport, convert, revert

if TYPE_CHECKING:  # a type checker would take any name, if it saw __getattr__
    from . import compat as compat
    from . import distributed as distributed
    from . import testing as testing
else:

    def __getattr__(name: str) -> Any:
        """Packages that are imported when first used."""
        if name in ("compat", "distributed", "testing"):
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "decompositions",
    "explain",
    "explain_varlen",
    "explain_with_kvcache",
    "flops",
    "generate",
    "merge",
    "nn",
    "revert",
    "scaled_dot_product_attention",
    "stream",
]

"""fastattn inside other libraries. Each module imports its library on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a type checker would take any name, if it saw __getattr__
    from . import diffusers as diffusers
    from . import huggingface as huggingface
    from . import huggingface_weights as huggingface_weights
else:

    def __getattr__(name: str) -> Any:
        """Modules that are imported when first used."""
        if name in ("diffusers", "huggingface", "huggingface_weights"):
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

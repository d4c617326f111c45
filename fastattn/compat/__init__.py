"""The functions of other packages, with their signatures, on fastattn."""

import contextlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from fastattn.compat import flash_attn, flex_attention

__all__ = ["flash_attn", "flex_attention", "install", "uninstall"]

VERSION = "2.8+fastattn"
"""``flash_attn.__version__`` while installed: the version whose signatures are served, and by whom."""

_NAMES = ("flash_attn", "flash_attn.flash_attn_interface")


def install() -> contextlib.AbstractContextManager[object]:
    """Let ``import flash_attn`` in this process be `fastattn.compat.flash_attn`, until `uninstall`.

    For code that imports flash-attention by name and that you do not want to edit. ``flash_attn.flash_attn_interface``
    is answered too; layers and other submodules of flash-attention are not. Only imports that come later are served. A
    second call changes nothing.

    Returns:
        A context manager, for ``with fastattn.compat.install():``, at whose end `uninstall` is called. Without ``with``
        it may be dropped.

    Raises:
        RuntimeError: flash-attention itself is installed; it is never hidden.
    """
    end = contextlib.ExitStack()
    end.callback(uninstall)
    if _ours():
        return end
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError(
            "fastattn.compat.install: expected no package flash_attn, found one; "
            "import fastattn.compat.flash_attn by its own name instead"
        )
    for name in _NAMES:
        module = ModuleType(name, flash_attn.__doc__)
        module.__spec__ = ModuleSpec(name, None, is_package=name == "flash_attn")
        vars(module).update({public: getattr(flash_attn, public) for public in flash_attn.__all__})
        vars(module).update(__version__=VERSION, __all__=list(flash_attn.__all__))
        sys.modules[name] = module
    vars(sys.modules["flash_attn"]).update(__path__=[], flash_attn_interface=sys.modules[_NAMES[1]])
    return end


def uninstall() -> None:
    """Undo `install`; without it, nothing. Names that were imported meanwhile stay what they are."""
    if _ours():
        for name in _NAMES:
            sys.modules.pop(name, None)


def _ours() -> bool:
    return getattr(sys.modules.get("flash_attn"), "__version__", None) == VERSION

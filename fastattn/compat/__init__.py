"""The functions of other packages, with their signatures, on fastattn."""

import contextlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Literal

from fastattn.compat import flash_attn, flex_attention, xformers

__all__ = ["flash_attn", "flex_attention", "install", "uninstall", "xformers"]

VERSIONS = {"flash_attn": "2.8+fastattn", "xformers": "0.0.35+fastattn"}
"""``__version__`` of each package while installed: the version with these signatures, and a mark of fastattn."""

# The modules of a package that `install` provides, and the modules that serve them.
_MODULES: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "flash_attn": (flash_attn, ("flash_attn", "flash_attn.flash_attn_interface")),
    "xformers": (xformers, ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")),
}


def install(package: Literal["flash_attn", "xformers"] = "flash_attn") -> contextlib.AbstractContextManager[object]:
    """Make ``import flash_attn``, or ``import xformers``, give fastattn's functions in this process, until `uninstall`.

    Use it for code that imports a package by name and that you do not want to edit. It also provides
    ``flash_attn.flash_attn_interface``, ``xformers.ops``, ``xformers.ops.fmha`` and ``xformers.ops.fmha.attn_bias``,
    but no layers and other submodules. It affects later imports only. A second call changes nothing.

    Args:
        package: which one.

    Returns:
        A context manager, for ``with fastattn.compat.install():``, whose end removes this package. Without ``with``,
        ignore it.

    Raises:
        RuntimeError: the package itself is installed; `install` never hides it.
        ValueError: fastattn does not provide this package.
    """
    if package not in _MODULES:
        raise ValueError(f"package: expected one of {', '.join(_MODULES)}, got {package!r}")
    end = contextlib.ExitStack()
    end.callback(_give_up, package)
    if _ours(package):
        return end
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        raise RuntimeError(
            f"fastattn.compat.install: expected no package {package}, found one; "
            f"import fastattn.compat.{package} by its own name instead"
        )
    source, names = _MODULES[package]
    for name in names:
        module = ModuleType(name, source.__doc__)
        has_more = any(other.startswith(f"{name}.") for other in names)
        module.__spec__ = ModuleSpec(name, None, is_package=has_more)
        vars(module).update({public: getattr(source, public) for public in source.__all__})
        vars(module).update(__version__=VERSIONS[package], __all__=list(source.__all__))
        sys.modules[name] = module
        above, _, own = name.rpartition(".")
        if has_more:
            module.__path__ = []
        if above:
            setattr(sys.modules[above], own, module)
    return end


def uninstall() -> None:
    """Undo every `install`, if there is any. Names that code has imported meanwhile do not change."""
    for package in _MODULES:
        _give_up(package)


def _give_up(package: str) -> None:
    if _ours(package):
        for name in _MODULES[package][1]:
            sys.modules.pop(name, None)


def _ours(package: str) -> bool:
    return getattr(sys.modules.get(package), "__version__", None) == VERSIONS[package]

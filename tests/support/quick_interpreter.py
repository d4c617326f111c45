"""Triton's interpreter in about half the time.

Whenever an interpreted kernel calls a helper, the interpreter looks through all of `triton.language` for what it has to
replace, and replaces it again. Within one launch the first time is enough.
"""

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's `_patch_lang`, which is kept as its `__wrapped__`."""
    replace: Any = interpreter._patch_lang
    modules: dict[int, tuple[Any, frozenset[Any]]] = {}  # by the globals of a function, which are kept: what it sees
    replaced: set[Any] = set()  # during a launch

    @functools.wraps(replace)
    def patch_lang(fn: Any) -> Any:
        names = fn.__globals__
        if id(names) not in modules:
            values = [value for value in names.values() if inspect.ismodule(value)]
            modules[id(names)] = names, frozenset(value for value in values if value in (tl, tl.core))
        _, seen = modules[id(names)]
        if seen and seen <= replaced:
            return interpreter._LangPatchScope()
        outermost, scope = not replaced, replace(fn)
        replaced.update(seen)
        if outermost:
            restore = scope.restore

            def restore_and_forget() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_lang

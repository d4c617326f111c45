"""Turn the attention modules of an existing model into fastattn's, in place, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

import fastattn.nn as fnn
from fastattn.nn.attention import adopt
from fastattn.nn.hooks import unblock_fast_path

__all__ = ["ConversionReport", "ModuleRecord", "convert", "revert"]

_PAIRS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: fnn.MultiheadAttention,
    nn.TransformerEncoderLayer: fnn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer: fnn.TransformerDecoderLayer,
    nn.TransformerEncoder: fnn.TransformerEncoder,
    nn.TransformerDecoder: fnn.TransformerDecoder,
    nn.Transformer: fnn.Transformer,
}


class ModuleRecord(NamedTuple):
    """One attention or Transformer module, and what became of it."""

    name: str  # as in model.named_modules(); "" is the model itself
    kind: str  # its class before the call
    note: str  # its class after it, or why it was skipped


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `revert` did. `print(report)` shows it as a table.

    Attributes:
        converted: modules that changed their class.
        skipped: attention and Transformer modules that kept theirs, each with the reason; and modules of other
            classes whose code calls `torch.nn.functional.scaled_dot_product_attention`.
        untouched: number of all other modules.
    """

    converted: tuple[ModuleRecord, ...]
    skipped: tuple[ModuleRecord, ...]
    untouched: int

    def __str__(self) -> str:
        rows = [("", "module", "class", "now")]
        rows += [("converted", r.name or "(model)", r.kind, r.note) for r in self.converted]
        rows += [("skipped", r.name or "(model)", r.kind, r.note) for r in self.skipped]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        counts = f"{len(self.converted)} converted, {len(self.skipped)} skipped, {self.untouched} others untouched"
        return "\n".join([*(lines if len(lines) > 1 else []), counts])


def convert(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> ConversionReport:
    """Replace torch.nn's MultiheadAttention and Transformer modules in `model` by fastattn's, in place.

    A module keeps its identity and all it holds: parameters, buffers, hooks, mode. Only its class changes, so an
    optimizer made before still trains it, modules used twice stay shared, and `model` itself may be one of them.
    Subclasses of torch.nn's classes are skipped, since their code may not survive the change; modules inside them are
    converted. Run it before wrappers that change classes themselves (FSDP2's `fully_shard`, parametrizations).
    `torch.fx.symbolic_trace` records a converted layer as one call, as it does torch.nn's. `torch.jit.script` refuses
    them: script the model after `revert`, or use `torch.export`.

    Args:
        model: any module.
        filter_fn: called with each candidate and its name in `model`; False leaves it alone.

    Returns:
        The report. Converting twice is no error; the second report lists the modules as skipped.

    Raises:
        TypeError: `model` is not a module, or `filter_fn` not callable.
    """
    _check_model(model, "convert")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"convert: expected filter_fn to be callable or None, got {type(filter_fn).__name__}")
    converted, skipped, untouched = [], [], 0
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_PAIRS)):
            if _calls_sdpa(type(module)):
                skipped.append(ModuleRecord(name, _qualified_name(type(module)), _SDPA))
            else:
                untouched += 1
            continue
        kind, reason = _qualified_name(type(module)), _why_not(module)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn returned False"
        if reason is not None:
            skipped.append(ModuleRecord(name, kind, reason))
            continue
        if isinstance(module, nn.MultiheadAttention):
            adopt(module)
        else:
            module.__class__ = _PAIRS[type(module)]
        converted.append(ModuleRecord(name, kind, _qualified_name(type(module))))
    return ConversionReport(tuple(converted), tuple(skipped), untouched)


def revert(model: nn.Module) -> ConversionReport:
    """Undo `convert`: every fastattn MultiheadAttention or Transformer module in `model` gets torch.nn's class again.

    That includes modules built from `fastattn.nn` directly. Subclasses of fastattn's classes are skipped.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_model(model, "revert")
    originals = {ours: theirs for theirs, ours in _PAIRS.items()}
    converted, skipped, untouched = [], [], 0
    for name, module in model.named_modules():
        if not isinstance(module, tuple(_PAIRS)):
            untouched += 1
            continue
        cls = type(module)
        if cls not in originals:
            reason = "not a fastattn class" if cls in _PAIRS else "a subclass"
            skipped.append(ModuleRecord(name, _qualified_name(cls), reason))
            continue
        if isinstance(module, nn.MultiheadAttention):
            unblock_fast_path(module)
        module.__class__ = originals[cls]  # pyright: ignore[reportAttributeAccessIssue]
        converted.append(ModuleRecord(name, _qualified_name(cls), _qualified_name(originals[cls])))
    return ConversionReport(tuple(converted), tuple(skipped), untouched)


def _why_not(module: nn.Module) -> str | None:
    """Why `convert` must leave this module alone, or None."""
    cls = type(module)
    if parametrize.is_parametrized(module) and cls.__mro__[1] in _PAIRS:
        return (
            "it is parametrised, which made a class of its own: convert the model first, then parametrise it; or call "
            "torch.nn.utils.parametrize.remove_parametrizations before"
        )
    if isinstance(module, tuple(_PAIRS.values())):
        return "already fastattn's"
    if cls not in _PAIRS:
        base = next(c for c in cls.__mro__ if c in _PAIRS)
        return f"a subclass of {_qualified_name(base)}: it may rely on what it overrides"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


_SDPA = (
    "it calls torch.nn.functional.scaled_dot_product_attention itself: fastattn.activate() puts fastattn behind that "
    "function, or call fastattn.scaled_dot_product_attention in its place"
)


def _calls_sdpa(cls: type) -> bool:
    """Whether a method of the class, or of a base outside of torch, names that function."""
    functions = [
        function
        for base in cls.__mro__
        if not base.__module__.startswith(("torch.", "fastattn.")) and base is not object
        for function in vars(base).values()
    ]
    return any(_names(getattr(f, "__code__", None), "scaled_dot_product_attention") for f in functions)


def _names(code: CodeType | None, name: str) -> bool:
    if code is None:
        return False
    return name in code.co_names or any(_names(c, name) for c in code.co_consts if isinstance(c, CodeType))


def _check_model(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected model to be a torch.nn.Module, got {type(model).__name__}")


def _qualified_name(cls: type) -> str:
    package = cls.__module__.replace("torch.nn.modules.", "torch.nn.").rsplit(".", 1)[0]
    if cls in _PAIRS or cls in _PAIRS.values():
        return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"

"""Turn the attention modules of an existing model into fastattn's, in place, and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

import fastattn.nn as fnn
from fastattn.integrations.vision import Converted
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

# Classes of other libraries -> module and name of ours. The import happens when a model holds one: the library exists.
_IN_LIBRARIES = {
    "timm.layers.attention.Attention": ("timm", "Attention"),
    "timm.models.vision_transformer.Attention": ("timm", "Attention"),  # before timm 1.0.17
    "timm.models.swin_transformer.WindowAttention": ("timm", "WindowAttention"),
    "timm.models.swin_transformer_v2.WindowAttention": ("timm", "WindowAttentionV2"),
    "timm.models.maxxvit.AttentionCl": ("timm", "AttentionCl"),
    "timm.models.maxxvit.Attention2d": ("timm", "Attention2d"),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("torchvision", "ShiftedWindowAttention"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("torchvision", "ShiftedWindowAttentionV2"),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": (
        "torchvision",
        "RelativePositionalMultiHeadAttention",
    ),
}


class ModuleRecord(NamedTuple):
    """One attention or Transformer module, and the outcome of its conversion."""

    name: str  # as in model.named_modules(); "" is the model itself
    kind: str  # its class before the call
    note: str  # its class after it, or why it was skipped


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` or `revert` did. `print(report)` shows it as a table.

    Attributes:
        converted: modules that changed their class.
        skipped: attention and Transformer modules that kept their class, each with the reason; and modules of other
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
    """Replace the attention modules in `model` by fastattn's, in place.

    It converts torch.nn's MultiheadAttention and Transformer modules, the attention of timm's ViT, Swin, Swin V2,
    MaxViT and CoAtNet, and the attention of torchvision's Swin, Swin V2 and MaxViT.

    A module keeps its identity, parameters, buffers, hooks and mode. Only its class changes: an existing optimizer
    still trains it, modules used twice stay shared, and `model` itself may be one of them. It skips subclasses of those
    classes, because their code may depend on what they override, but converts the modules inside them. It also skips
    classes of timm or torchvision if the installed version's code reads names that ours does not know. Call it before
    wrappers that change classes themselves (FSDP2's `fully_shard`, parametrizations). `torch.fx.symbolic_trace` records
    a converted layer as one call, like torch.nn's. `torch.jit.script` refuses converted layers: script the model after
    `revert`, or use `torch.export`.

    Args:
        model: any module.
        filter_fn: called with each candidate and its name in `model`; False leaves it alone.

    Returns:
        The report. Converting twice is not an error; the second report lists the modules as skipped.

    Raises:
        TypeError: `model` is not a module, or `filter_fn` not callable.
    """
    _check_model(model, "convert")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"convert: expected filter_fn to be callable or None, got {type(filter_fn).__name__}")
    converted, skipped, untouched = [], [], 0
    for name, module in model.named_modules():
        if _known_base(type(module)) is None:
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
            module.__class__ = _ours(type(module))
        converted.append(ModuleRecord(name, kind, _qualified_name(type(module))))
    return ConversionReport(tuple(converted), tuple(skipped), untouched)


def revert(model: nn.Module) -> ConversionReport:
    """Undo `convert`: every module of a fastattn class in `model` gets the class that it replaces.

    This includes modules built from `fastattn.nn` directly. It skips subclasses of fastattn's classes.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_model(model, "revert")
    originals = {ours: theirs for theirs, ours in _PAIRS.items()}
    converted, skipped, untouched = [], [], 0
    for name, module in model.named_modules():
        cls = type(module)
        if _known_base(cls) is None:
            untouched += 1
            continue
        original = vars(cls).get("replaces") or originals.get(cls)
        if original is None:
            reason = "not a fastattn class" if _is_known(cls) else "a subclass"
            skipped.append(ModuleRecord(name, _qualified_name(cls), reason))
            continue
        if isinstance(module, nn.MultiheadAttention):
            unblock_fast_path(module)
        module.__class__ = original  # pyright: ignore[reportAttributeAccessIssue]
        converted.append(ModuleRecord(name, _qualified_name(cls), _qualified_name(original)))
    return ConversionReport(tuple(converted), tuple(skipped), untouched)


def _why_not(module: nn.Module) -> str | None:
    """Why `convert` must leave this module alone, or None."""
    cls = type(module)
    if parametrize.is_parametrized(module) and _is_known(cls.__mro__[1]):
        return (
            "its parametrization gave it a new class: convert the model first, then parametrise it; or call "
            "torch.nn.utils.parametrize.remove_parametrizations before"
        )
    if isinstance(module, (Converted, *_PAIRS.values())):
        return "already fastattn's"
    base = _known_base(cls)
    assert base is not None
    if cls is not base:
        return f"a subclass of {_qualified_name(base)}: it may rely on what it overrides"
    if "forward" in vars(module):
        return "the instance has its own forward"
    ours = _ours(cls)
    if issubclass(ours, Converted) and (unknown := ours.unknown()):
        return f"the forward of this version reads {', '.join(unknown)}, which fastattn's does not know"
    return None


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_known(cls: type) -> bool:
    return cls in _PAIRS or _full_name(cls) in _IN_LIBRARIES


def _known_base(cls: type) -> type | None:
    """The class itself or its nearest base that `convert` replaces."""
    return next((base for base in cls.__mro__ if _is_known(base)), None)


def _ours(known: type) -> type[nn.Module]:
    if known in _PAIRS:
        return _PAIRS[known]
    module, name = _IN_LIBRARIES[_full_name(known)]
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


_SDPA = (
    "it calls torch.nn.functional.scaled_dot_product_attention itself: fastattn.activate() makes fastattn serve that "
    "function, or call fastattn.scaled_dot_product_attention in its place"
)


def _calls_sdpa(cls: type) -> bool:
    """Whether a method of the class, or of a base outside torch, names that function."""
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
    return _full_name(cls)

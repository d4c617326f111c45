"""Triton's interpreter in a fraction of the time, with the same results bit by bit.

It spends most of its time on what does not depend on the data: it looks through all of `triton.language` whenever a
kernel calls a helper, describes the type and shape of every value anew, checks every sum of integers for an overflow
that it then tells nobody about, and copies tensors on themselves. Here it does each once, or not.
"""

import builtins
import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_REPLACED: list[tuple[Any, str, Any, Any]] = []  # object, name, Triton's own, ours


def install() -> None:
    """Change Triton's interpreter, for the whole process."""
    if not _REPLACED:
        options = interpreter.interpreter_builder.options
        if not options.debug:  # without it nothing reads what the check finds
            quick = dataclasses.replace(options, sanitize_overflow=False)
            _replace(interpreter.interpreter_builder, "options", quick)
        _replace(interpreter, "_patch_lang", _patch_language_once(interpreter._patch_lang))
        _replace(interpreter, "_get_np_dtype", _numpy_dtype_once(interpreter._get_np_dtype))
        _replace(tl.block_type, "__init__", _block_type)
        _replace(tl.block_type, "name", property(lambda self: f"<{self.shape}, {self.element_ty}>"))
        _replace(tl.block_type, "to_ir", _block_type_to_ir(tl.block_type.to_ir))
        _replace(tl.tensor, "__init__", _tensor)
        _replace(tl.dtype, "__eq__", _equal(tl.dtype.__eq__))
        if not torch.cuda.is_available():  # kernels write to the tensors themselves: nothing has to be copied back
            _replace(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
        _replace(TritonSemantic, "cast", _cast(TritonSemantic.cast))
        _replace(TritonSemantic, "broadcast_impl_value", _broadcast(TritonSemantic.broadcast_impl_value))
        _replace(TritonSemantic, "computation_type_impl", _result_type(TritonSemantic.computation_type_impl))
    for owner, name, _, ours in _REPLACED:
        setattr(owner, name, ours)


def _replace(owner: Any, name: str, ours: Any) -> None:
    _REPLACED.append((owner, name, vars(owner).get(name), ours))


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Triton's own interpreter, for a while."""
    for owner, name, own, _ in _REPLACED:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
    try:
        yield
    finally:
        install()


def _patch_language_once(patch: Any) -> Callable[[Any], Any]:
    """Within one launch the first time is enough."""
    modules: dict[int, tuple[Any, frozenset[Any]]] = {}  # by the globals of a function, which are kept: what it sees
    replaced: set[Any] = set()  # during a launch

    @functools.wraps(patch)
    def patch_language(fn: Any) -> Any:
        names = fn.__globals__
        if id(names) not in modules:
            values = [value for value in names.values() if inspect.ismodule(value)]
            modules[id(names)] = names, frozenset(value for value in values if value in (tl, tl.core))
        _, seen = modules[id(names)]
        if seen and seen <= replaced:
            return interpreter._LangPatchScope()
        outermost, scope = not replaced, patch(fn)
        replaced.update(seen)
        if outermost:
            restore = scope.restore

            def restore_and_forget() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    return patch_language


def _numpy_dtype_once(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def numpy_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if (found := known.get(scalar.name)) is None:
            found = known[scalar.name] = find(scalar)
        return found

    return numpy_dtype


_SHAPES: dict[tuple[int, ...], tuple[Any, int]] = {}
"""By the sizes of a block: its shape, one object for all blocks of this shape, and how many elements it has."""


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    shape = shape.value if isinstance(shape, tl.constexpr) else shape
    sizes = builtins.tuple([n.value if isinstance(n, tl.constexpr) else n for n in shape])
    if (found := _SHAPES.get(sizes)) is None:
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        found = _SHAPES[sizes] = tl.tuple(sizes), tl.core.validate_block_shape(sizes)
    self.element_ty = element_ty
    self.shape, self.numel = found


def _block_type_to_ir(to_ir: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def block_type_to_ir(self: Any, builder: Any) -> Any:
        return self if builder is interpreter.interpreter_builder else to_ir(self, builder)

    return block_type_to_ir


_TENSOR_SHAPES: dict[int, tuple[Any, Any, Any]] = {}
"""By the identity of a block's shape, which is kept: the same of constants, and how many elements there are."""
_SCALAR = tl.tuple([]), tl.constexpr(1)


def _tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    if not type.is_block():
        self.shape, self.numel = _SCALAR
        return
    if (found := _TENSOR_SHAPES.get(id(type.shape))) is None:
        sizes = tl.tuple([tl.constexpr(n) for n in type.shape])
        found = _TENSOR_SHAPES[id(type.shape)] = sizes, tl.constexpr(type.numel), type.shape
    self.shape, self.numel, _ = found


def _equal(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or equal(self, other)


def _cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_or_not(self: Any, input: Any, dst_ty: Any, *rounding: Any, **named: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *rounding, **named)

    return cast_or_not


def _result_type(find: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[tuple[Any, ...], Any] = {}

    def result_type(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if (found := known.get(key)) is None:
            found = known[key] = find(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return found

    return result_type


def _broadcast(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_or_not(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        blocks = left.is_block(), right.is_block()
        if blocks == (False, False) or (blocks == (True, True) and left.shape is right.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return broadcast_or_not

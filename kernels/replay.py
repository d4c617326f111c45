"""Launches that are bound once for each layout and then repeated with new addresses.

Triton binds each launch anew: it walks over all arguments, finds out what of them is compiled in, and looks the kernel
up. For kernels with as many arguments as these, that and the host code that makes the arguments cost more than a small
call computes. Of a call everything but the addresses follows from its layout: shapes, strides, dtypes, numbers, and
which addresses are multiples of 16. So a launcher marked `replayed` is watched once for each layout, and from then on
its launches are repeated: the same compiled kernels, grids and arguments, with the addresses of the call at hand.

A layout is repeated only if its launcher did nothing else: what PyTorch computes beside the launches (a copy, a sum)
would be missing. Whoever watches launches (a profiler's hooks) gets Triton's own way, as does a Triton whose launcher
is not known here.
"""

import contextlib
import functools
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import _allocation, driver

from fastattn.spec.operands import Options

from . import config
from .tiles import INTERPRETED

KNOWN_TRITONS = ((3, 6), (3, 9))
"""The oldest and the newest whose compiled kernels are launched as `Launch` does: see tests/kernels/test_replay.py."""
MOST_LAYOUTS = 1024
"""For each launcher; then all are forgotten: lengths that change with every call must not fill the memory."""

_SEEN, _TRITONS_OWN = object(), object()
_state = threading.local()
_runtime: Any = knobs.runtime
_off = False


class Launch(NamedTuple):
    """A bound launch."""

    run: Callable[..., None]
    """Triton's launcher for the compiled kernel; it allocates what scratch memory the kernel asks for."""
    programs: int
    function: int
    metadata: Any
    arguments: Callable[[Sequence[int]], tuple[Any, ...]]
    """what the kernel takes, from the addresses"""


class Plan(NamedTuple):
    """The launches of one layout."""

    launches: tuple[Launch, ...]
    scratch: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """shape and dtype of tensors that only the launches use"""


def start(kernel: Any, programs: int, arguments: tuple[Any, ...], cfg: config.LaunchConfig) -> None:
    """Launch a kernel on a grid of one dimension, Triton's own way."""
    _offer_memory()
    compiled = kernel[(programs,)](*arguments, **cfg.options())
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.launched(compiled, programs, arguments)


def scratch(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor that only the launches of the call use, of the dtype and on the device of ``like``."""
    if (recorder := getattr(_state, "recorder", None)) is None:
        return like.new_empty(shape)
    return recorder.allocate(shape, like)


def same_address(view: Tensor, of: Tensor) -> Tensor:
    """``view``, which begins where ``of`` does: an argument in another shape or dtype."""
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.slots[id(view)] = recorder.slots.get(id(of))
        recorder.held.append(view)
    return view


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.get_device())
    return _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, every launch goes Triton's own way: for measurements and for tests that catch launches."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@functools.cache
def known_triton(version: str = triton.__version__) -> bool:
    """Whether compiled kernels of this Triton are launched as `Launch` does. Warns, once, where they are not."""
    oldest, newest = KNOWN_TRITONS
    if oldest <= tuple(int(part) for part in version.split(".")[:2]) <= newest:
        return True
    warnings.warn(
        f"fastattn: the launcher of Triton {version} is not known (known: {oldest[0]}.{oldest[1]} to "
        f"{newest[0]}.{newest[1]}), so each call binds its arguments anew: right, but slower to start. Shown once.",
        RuntimeWarning,
        stacklevel=5,
    )
    return False


def replayed(launcher: Callable[..., None]) -> Callable[..., None]:
    """Repeat the launches of ``launcher`` wherever it is called with a layout that it was called with before.

    It gets tensors, None, numbers, and named groups and lists of these, starts kernels by `start` and returns nothing.
    Equal numbers make equal launches: 1 and 1.0 compile differently, so it converts those that may be either. What else
    its launches depend on belongs into `_surroundings`.
    """
    if INTERPRETED.value:
        return launcher
    layouts: dict[Any, Any] = {}

    @functools.wraps(launcher)
    def call(*arguments: Any) -> None:
        if _off or _watched() or not known_triton():
            launcher(*arguments)
            return
        tensors: list[Tensor] = []
        facts: list[Any] = []
        _survey(arguments, tensors, facts)
        addresses = [x.data_ptr() for x in tensors]
        if functools.reduce(operator.or_, addresses) % 16:
            facts.append(tuple(address % 16 == 0 for address in addresses))
        facts += _surroundings(tensors[0])
        layout = tuple(facts)
        plan = layouts.get(layout)
        if type(plan) is Plan:
            _repeat(plan, tensors[0], addresses)
        elif plan is _SEEN:  # a second time, so that watching pays
            layouts[layout] = _watch(launcher, arguments)
        else:
            if plan is None:
                if len(layouts) >= MOST_LAYOUTS:
                    layouts.clear()
                layouts[layout] = _SEEN
            launcher(*arguments)

    call.layouts = layouts  # pyright: ignore[reportAttributeAccessIssue]
    return call


def _watched() -> bool:
    """Whether somebody wants to see each launch."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)


def _survey(arguments: Any, tensors: list[Tensor], facts: list[Any]) -> None:
    """Collect the tensors, and what of the arguments a layout consists of."""
    for x in arguments:
        if x is None:
            facts.append(x)
        elif type(x) is Tensor or isinstance(x, Tensor):
            tensors.append(x)
            facts.append(x.shape)
            facts.append(x.stride())
            facts.append(x.dtype)
        elif type(x) in _PLAIN:
            facts.append(x)
        elif isinstance(x, tuple):
            _survey(x, tensors, facts)
        elif isinstance(x, list):
            facts.append(len(x))
            _survey(x, tensors, facts)
        else:
            facts.append(x)


_PLAIN = frozenset((int, float, bool, Options))
"""Types of facts that hold no tensor."""


def _surroundings(tensor: Tensor) -> tuple[Any, ...]:
    """What compiled code and launches depend on beside the arguments of the call."""
    precision = torch.backends.cuda.matmul.fp32_precision if tensor.dtype == torch.float32 else None
    return (
        tensor.get_device(), precision, config.current_override(), knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
    )  # fmt: skip


def _repeat(plan: Plan, like: Tensor, addresses: list[int]) -> None:
    _offer_memory()
    with on_device(like):
        held = [like.new_empty(shape, dtype=dtype) for shape, dtype in plan.scratch]
        addresses += [x.data_ptr() for x in held]
        active: Any = driver.active
        stream = active.get_current_stream(active.get_current_device())
        for run, programs, function, metadata, arguments in plan.launches:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments(addresses))


def _offer_memory() -> None:
    """For kernels that ask for scratch memory of their own, PyTorch's; whoever has set an allocator keeps it."""
    if _allocation._allocator.get() is _allocation._NULL_ALLOCATOR:
        triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # PyTorch aligns to 512 bytes


# Watching a launcher


def _watch(launcher: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """Run the launcher and return its plan, or `_TRITONS_OWN` where it did something that launches do not repeat."""
    tensors: list[Tensor] = []
    arguments = _alias(arguments, tensors)
    recorder = _state.recorder = _Recorder(tensors)
    try:
        with recorder:
            launcher(*arguments)
    finally:
        _state.recorder = None
    return Plan(tuple(recorder.launches), tuple(recorder.scratch)) if recorder.repeatable else _TRITONS_OWN


def _alias(x: Any, tensors: list[Tensor]) -> Any:
    """``x`` with a tensor object of its own for each tensor: one may be given twice, and not the next time."""
    if isinstance(x, Tensor):
        tensors.append(x.detach())
        return tensors[-1]
    if isinstance(x, (tuple, list)):
        items = [_alias(item, tensors) for item in x]
        return type(x)._make(items) if hasattr(x, "_make") else type(x)(items)  # pyright: ignore[reportAttributeAccessIssue]
    return x


class _Recorder(TorchDispatchMode):
    """Sees launches, and whether PyTorch computes anything beside them."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.slots: dict[int, int | None] = {id(x): number for number, x in enumerate(tensors)}
        self.tensors = len(tensors)
        self.launches: list[Launch] = []
        self.scratch: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.held: list[Tensor] = []
        self.repeatable, self.allocating = True, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or self.allocating):
            self.repeatable = False
        return func(*args, **(kwargs or {}))

    def allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        self.allocating = True
        x = like.new_empty(shape)
        self.allocating = False
        self.slots[id(x)] = self.tensors + len(self.scratch)
        self.scratch.append((shape, x.dtype))
        self.held.append(x)
        return x

    def launched(self, compiled: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        if not isinstance(compiled, triton.compiler.CompiledKernel):  # its compilation is still under way
            self.repeatable = False
            return
        constants: dict[str, Any] = {}
        expression = self._expression(arguments, constants)
        if self.repeatable:
            build = eval(f"lambda addresses: {expression}", constants)
            self.launches.append(Launch(compiled.run, programs, compiled.function, compiled.packed_metadata, build))

    def _expression(self, x: Any, constants: dict[str, Any]) -> str:
        """Python for ``x``, with an item of `addresses` for each tensor."""
        if isinstance(x, Tensor):
            slot = self.slots.get(id(x))
            if slot is None:  # made on the way
                self.repeatable = False
            return f"addresses[{slot}]"
        if isinstance(x, tuple) and any(isinstance(item, (Tensor, tuple)) for item in x):
            return f"({''.join(self._expression(item, constants) + ',' for item in x)})"
        if type(x) is int or x is None:
            return repr(x)
        name = f"constant_{len(constants)}"
        constants[name] = x
        return name

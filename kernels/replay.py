"""Bind launches once for each layout and then repeat them with new addresses.

Triton binds each launch anew: it inspects all arguments, finds the compile-time ones and looks the kernel up. These
kernels have so many arguments that this, and the host code that makes the arguments, costs more than a small call
computes. A call's layout (shapes, strides, dtypes, numbers, and which addresses are multiples of 16) determines
everything but the addresses. So this module records a launcher marked `replayed` once for each layout. Later calls
repeat its launches: the same compiled kernels, grids and arguments, with the addresses of the present call.

It repeats a layout only if the launcher did nothing else, because a repeat would miss what PyTorch computes beside the
launches (a copy, a sum). If a profiler's hooks watch launches, or the launcher of this Triton is unknown, launches go
through Triton.
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
"""The oldest and the newest Triton whose compiled kernels `Launch` can launch: see tests/kernels/test_replay.py."""
MOST_LAYOUTS = 1024
"""Layouts per launcher. Beyond this it forgets all, so that lengths that change with every call do not fill memory."""

_SEEN, _TRITONS_OWN = object(), object()
_state = threading.local()
_runtime: Any = knobs.runtime
_off = False


class Launch(NamedTuple):
    """A bound launch."""

    run: Callable[..., None]
    """Triton's launcher for the compiled kernel; it allocates the scratch memory that the kernel needs."""
    programs: int
    function: int
    metadata: Any
    arguments: Callable[[Sequence[int]], tuple[Any, ...]]
    """makes the kernel's arguments from the addresses"""


class Plan(NamedTuple):
    """The launches of one layout."""

    launches: tuple[Launch, ...]
    scratch: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """shape and dtype of tensors that only the launches use"""


def start(kernel: Any, programs: int, arguments: tuple[Any, ...], cfg: config.LaunchConfig) -> None:
    """Launch a kernel on a grid of one dimension through Triton."""
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
    """``view``, which starts at the address of ``of``: an argument in another shape or dtype."""
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.slots[id(view)] = recorder.slots.get(id(of))
        recorder.held.append(view)
    return view


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current, because Triton launches there."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.get_device())
    return _NOTHING


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside the block, every launch goes through Triton: for measurements and for tests that catch launches."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@functools.cache
def known_triton(version: str = triton.__version__) -> bool:
    """Whether `Launch` can launch compiled kernels of this Triton. It warns once if not."""
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

    It takes tensors, None, numbers, and named groups and lists of these, starts kernels by `start` and returns nothing.
    Equal numbers must make equal launches. 1 and 1.0 compile differently, so the launcher converts numbers that may be
    either. Anything else that its launches depend on belongs in `_surroundings`.
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
        elif plan is _SEEN:  # the second time, so that recording pays off
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
    """Whether a hook wants to see each launch."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)


def _survey(arguments: Any, tensors: list[Tensor], facts: list[Any]) -> None:
    """Collect the tensors, and the facts about the arguments that form a layout."""
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
    """The state, beside the arguments of the call, that compiled code and launches depend on."""
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
    """Give PyTorch's memory to kernels that need scratch memory; an allocator that is already set stays."""
    if _allocation._allocator.get() is _allocation._NULL_ALLOCATOR:
        triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # PyTorch aligns it to 512 bytes


# Watching a launcher


def _watch(launcher: Callable[..., None], arguments: tuple[Any, ...]) -> Any:
    """Run the launcher and return its plan, or `_TRITONS_OWN` if it did something that launches do not repeat."""
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
    """``x`` with a new tensor object for each tensor, because a call may pass one tensor twice and the next call
    not."""
    if isinstance(x, Tensor):
        tensors.append(x.detach())
        return tensors[-1]
    if isinstance(x, (tuple, list)):
        items = [_alias(item, tensors) for item in x]
        return type(x)._make(items) if hasattr(x, "_make") else type(x)(items)  # pyright: ignore[reportAttributeAccessIssue]
    return x


class _Recorder(TorchDispatchMode):
    """Records launches, and whether PyTorch computes anything beside them."""

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
        if not isinstance(compiled, triton.compiler.CompiledKernel):  # its compilation has not finished
            self.repeatable = False
            return
        constants: dict[str, Any] = {}
        expression = self._expression(arguments, constants)
        if self.repeatable:
            build = eval(f"lambda addresses: {expression}", constants)
            self.launches.append(Launch(compiled.run, programs, compiled.function, compiled.packed_metadata, build))

    def _expression(self, x: Any, constants: dict[str, Any]) -> str:
        """A Python expression for ``x``, with an item of `addresses` for each tensor."""
        if isinstance(x, Tensor):
            slot = self.slots.get(id(x))
            if slot is None:  # the launcher made it
                self.repeatable = False
            return f"addresses[{slot}]"
        if isinstance(x, tuple) and any(isinstance(item, (Tensor, tuple)) for item in x):
            return f"({''.join(self._expression(item, constants) + ',' for item in x)})"
        if type(x) is int or x is None:
            return repr(x)
        name = f"constant_{len(constants)}"
        constants[name] = x
        return name

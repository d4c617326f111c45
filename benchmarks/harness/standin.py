"""A GPU that only launches: Triton's whole host side for one architecture, on CPU tensors, up to the driver's launch.

Nothing is compiled and nothing computed, so results stay as they were allocated. On any machine it shows
what a call costs before the driver gets it, and which arguments the driver gets. It needs a process of its own without
TRITON_INTERPRET, because Triton decides when a kernel is defined whether it is interpreted.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastattn import backends
from fastattn.backends import triton as backend
from fastattn.kernels import launch
from fastattn.spec import cache, checks

ARCHITECTURE = "sm_90"
MULTIPROCESSORS = 132


class Launched(NamedTuple):
    """The arguments that the driver got."""

    kernel: str
    specialisation: str
    """the arguments that were compiled in"""
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    """flat: addresses in place of tensors, without what was compiled in"""


class StandIn:
    """The part of Triton's driver that the host side asks for."""

    def __init__(self) -> None:
        self.see: Callable[[Launched], None] | None = None
        """Called with each launch; None: launches do nothing at all, as for a timing."""
        self.compiled = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Kernel(CompiledKernel):
    """Stands for a compiled kernel."""

    def __init__(self, source: Any, options: dict[str, Any], device: StandIn) -> None:  # compiles and loads nothing
        self.name, self.src, self.function, self.packed_metadata = source.fn.__name__, source, 1, (4, 1, 0)
        self.module, self.hash = 1, ""
        self.device, self.specialisation = device, repr((source.signature, source.constants, source.attrs, options))
        _ = source.fn.cache_key  # as a compilation does: from here on Triton watches the globals that the kernel reads
        self._run = self.launch
        device.compiled += 1

    def launch(
        self, x: int, y: int, z: int, stream: int, function: int, metadata: Any, launch_metadata: Any, enter: Any,
        leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        if self.device.see is not None:
            flat = tuple(flatten(arguments, tuple(self.src.signature.values())))
            self.device.see(Launched(self.name, self.specialisation, (x, y, z), flat))

    def __del__(self) -> None:
        """There is no module to unload."""


def flatten(arguments: Any, signature: Any) -> Iterator[Any]:
    """The arguments after Triton's launcher has processed them."""
    for argument, kind in zip(arguments, signature, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(argument, kind)
        elif kind != "constexpr":
            yield argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


@contextlib.contextmanager
def installed() -> Iterator[StandIn]:
    """Inside, CPU tensors count as tensors of a GPU with Triton's kernels."""
    device = StandIn()

    def compile(src: Any, target: Any = None, options: dict[str, Any] | None = None, **_: Any) -> Kernel:
        return Kernel(src, options or {}, device)

    driver.set_active(device)  # pyright: ignore[reportArgumentType]  (Triton asks for no more of it here)
    with (
        mock.patch.object(triton.compiler, "compile", compile),
        mock.patch.object(launch, "architecture", lambda _: ARCHITECTURE),
        mock.patch.object(launch, "multiprocessors", lambda _: MULTIPROCESSORS),
        mock.patch.object(backend, "_interpreting", lambda: True),
        mock.patch.object(checks, "readable", lambda _: False),  # as on a GPU, where reading a value would wait
        mock.patch.object(cache, "readable", lambda _: False),
        mock.patch.object(backends, "_preference", lambda _: backends._PREFERENCE["cuda"]),
    ):
        yield device

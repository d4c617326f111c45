"""Peak memory of a process as Linux counts it, which includes memory that does not come from PyTorch's allocator."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def peak(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """The peak of the MiB that a call takes on one thread, its results included, beyond the memory in use before.

    Args:
        prepare: at module level, since it runs in a fresh process, where no memory of earlier calls waits to be used
            again. It makes the inputs, runs what is only done once, and returns the call.
        arguments: of `prepare`.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, prepare, *arguments).result()


def _measure(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    torch.set_num_threads(1)
    call = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to the memory in use
    before = _kib("VmRSS")
    results = call()
    taken = _kib("VmHWM") - before
    del results
    return taken / 1024


def _kib(name: str) -> int:
    """A line of this process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

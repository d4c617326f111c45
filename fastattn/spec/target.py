"""The capabilities of a GPU, for backends: of a tensor's GPU, or of an assumed one that this machine lacks.

`python -m fastattn explain --device cuda:h100` answers for a machine that the user does not have. Nothing runs on an
assumed GPU; every other call reads the real one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Target(NamedTuple):
    """A kind of GPU."""

    title: str
    capability: tuple[int, int]
    """NVIDIA's compute capability; unused for ROCm"""
    rocm: bool = False


TARGETS = {
    "v100": Target("NVIDIA V100", (7, 0)),
    "t4": Target("NVIDIA T4", (7, 5)),
    "a100": Target("NVIDIA A100", (8, 0)),
    "a10": Target("NVIDIA A10", (8, 6)),
    "rtx3090": Target("NVIDIA RTX 3090", (8, 6)),
    "l4": Target("NVIDIA L4", (8, 9)),
    "l40s": Target("NVIDIA L40S", (8, 9)),
    "rtx4090": Target("NVIDIA RTX 4090", (8, 9)),
    "h100": Target("NVIDIA H100", (9, 0)),
    "h200": Target("NVIDIA H200", (9, 0)),
    "b200": Target("NVIDIA B200", (10, 0)),
    "rtx5090": Target("NVIDIA RTX 5090", (12, 0)),
    "mi300x": Target("AMD MI300X", (9, 4), rocm=True),
}

_assumed: Target | None = None


def is_assumed() -> bool:
    """Whether the GPU is only assumed."""
    return _assumed is not None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device) if _assumed is None else _assumed.capability


def rocm() -> bool:
    """Whether CUDA devices are AMD's."""
    return torch.version.hip is not None if _assumed is None else _assumed.rocm


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Answer for this GPU inside the block, whatever the machine has. Other threads must not compute meanwhile."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before

"""The time of a training step with fastattn's layers and of the same step with torch.nn's, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SECONDS = 2.0  # for both together


@dataclass(frozen=True)
class Beside:
    """Median times of a training step, ms."""

    fastattn: float
    torch: float

    def __str__(self) -> str:
        times = f"{self.fastattn:.2f} ms with fastattn, {self.torch:.2f} ms with torch.nn"
        return f"a training step takes {times}: {self.torch / self.fastattn:.2f} times as fast"


def time_beside(ours: nn.Module, theirs: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Beside:
    """Time forward and backward pass of both models in training mode, for `SECONDS`.

    They take turns, so that other work of the machine affects both. Modes do not change; gradients are deleted.
    """
    times: dict[nn.Module, list[float]] = {ours: [], theirs: []}
    modes = {model: model.training for model in times}
    for model in times:
        _step(model.train(), loss)  # makes what is made only once
    end = time.perf_counter() + SECONDS
    while not times[theirs] or time.perf_counter() < end:
        for model, taken in times.items():
            start = time.perf_counter()
            _step(model, loss)
            taken.append(time.perf_counter() - start)
    for model, training in modes.items():
        model.train(training)
    return Beside(1000 * statistics.median(times[ours]), 1000 * statistics.median(times[theirs]))


def _step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
    """Run a step and delete its gradients."""
    value = loss(model)
    value.backward()
    for parameter in model.parameters():
        parameter.grad = None
    if value.is_cuda:
        torch.cuda.synchronize()

"""Proof that fastattn's layers equal torch.nn's: the same training with each gives the same losses in less time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import fastattn.nn
from examples.beside import Beside, time_beside
from examples.forecast.experiments import Problem, prepare
from examples.forecast.models import Forecaster, build
from examples.forecast.train import fit


@dataclass(frozen=True)
class Parity:
    """Training losses per epoch of three runs from the same weights, on the same batches.

    `nudged` is torch.nn once more, from weights that are one float32 rounding step larger: two runs that round
    differently anywhere cannot be expected to stay closer than that.
    """

    method: str
    torch: list[float]
    fastattn: list[float]
    nudged: list[float]
    step: Beside

    @property
    def difference(self) -> float:
        """Largest relative difference of a loss between torch.nn and fastattn."""
        return _largest_difference(self.torch, self.fastattn)

    @property
    def rounding(self) -> float:
        """The same between torch.nn and torch.nn nudged by one rounding step."""
        return _largest_difference(self.torch, self.nudged)


def compare(problem: Problem, kind: str, device: str, epochs: int = 5, seed: int = 42) -> Parity:
    """Train the problem's model of that kind with both namespaces.

    Without dropout, for which the two would draw different random numbers; everything else as in the real runs.
    """
    method = next(method for method in problem.methods if method.name == kind)
    method = replace(
        method,
        config=replace(method.config, dropout=0.0),
        recipe=replace(method.recipe, epochs=epochs),
    )
    _, train, validation = prepare(problem, method, device)
    torch.manual_seed(seed)
    weights = build(method.config, nn).state_dict()

    def losses(model: Forecaster, weights: dict[str, torch.Tensor]) -> list[float]:
        model.load_state_dict(weights)  # strict: the names and shapes must be the same, too
        torch.manual_seed(seed)  # the same order of batches
        return fit(model.to(device), train, validation, method.recipe).train

    ours, theirs = (build(method.config, layers).to(device).train() for layers in (fastattn.nn, nn))
    inputs, targets = (x[: method.recipe.batch_size] for x in train)
    step = time_beside(ours, theirs, lambda model: F.mse_loss(model(inputs, targets), targets))

    nudged = {name: torch.nextafter(weight, torch.tensor(torch.inf)) for name, weight in weights.items()}
    return Parity(
        method.name,
        torch=losses(build(method.config, nn), weights),
        fastattn=losses(build(method.config, fastattn.nn), weights),
        nudged=losses(build(method.config, nn), nudged),
        step=step,
    )


def _largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))

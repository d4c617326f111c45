"""The output of a run: the table of results, and all numbers for metrics.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from examples.beside import Beside
from examples.charlm.data import Text
from examples.charlm.models import Shape
from examples.charlm.train import History, Recipe
from examples.common import environment


@dataclass(frozen=True)
class Result:
    """One trained model."""

    shape: Shape
    parameters: int
    history: History
    step: Beside | None = None  # of the kind that torch.nn has every part of

    @property
    def loss(self) -> float:
        """On the validation part, at the best evaluation."""
        return min(self.history.validation)


def table(results: list[Result]) -> str:
    """The results as text."""
    lines = [
        f"{'model':<8} {'parameters':>10} {'validation loss':>16} {'after step':>11} {'last loss':>10} {'seconds':>8}"
    ]
    for result in results:
        history = result.history
        lines.append(
            f"{result.shape.kind:<8} {result.parameters:>10,} {result.loss:>16.4f} "
            f"{history.evaluated[history.best]:>11,} {history.validation[-1]:>10.4f} {history.seconds:>8.0f}"
        )
    lines += [f"{result.shape.kind}: {result.step}" for result in results if result.step is not None]
    return "\n".join(lines)


def metrics(results: list[Result], recipe: Recipe, text: Text, source: str, device: str) -> dict[str, Any]:
    """All data of a run, for `write_metrics`."""
    return {
        "text": {
            "source": source,
            "characters": {"train": len(text.train), "validation": len(text.validation)},
            "vocabulary": len(text.vocabulary),
        },
        "recipe": asdict(recipe),
        "environment": environment(device),
        "models": [
            {
                "shape": asdict(result.shape),
                "parameters": result.parameters,
                "validation_loss": result.loss,
                "seconds": result.history.seconds,
                "step_ms": None if result.step is None else asdict(result.step),
                "evaluations": _evaluations(result.history),
            }
            for result in results
        ],
    }


def _evaluations(history: History) -> list[dict[str, float]]:
    """For each evaluation: the step, the mean training loss since the last evaluation, and the validation loss."""
    rows, start = [], 0
    for step, validation in zip(history.evaluated, history.validation, strict=True):
        train = sum(history.train[start:step]) / (step - start)
        rows.append({"step": step, "train_loss": train, "validation_loss": validation})
        start = step
    return rows

"""What a run leaves behind: the loss curves, and all numbers as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window: the program writes files

import matplotlib.pyplot as plt
import numpy as np

from examples.charlm.data import Text
from examples.charlm.models import Shape
from examples.charlm.train import History, Recipe
from examples.common import COLOURS, STYLE, environment

COLOUR = {"gpt": COLOURS[0], "modern": COLOURS[1]}


@dataclass(frozen=True)
class Result:
    """One trained model."""

    shape: Shape
    parameters: int
    history: History

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
    return "\n".join(lines)


@plt.rc_context(STYLE)
def plot_losses(results: list[Result], path: Path) -> None:
    """Training losses as a moving average, validation losses as dots where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lowest, highest = [], []
    for result in results:
        history, colour = result.history, COLOUR[result.shape.kind]
        steps = len(history.train)
        span = max(1, min(100, steps // 10))
        mean = np.convolve(history.train, np.ones(span) / span, mode="valid")
        axis.plot(np.arange(len(mean)) + (span + 1) / 2, mean, color=colour, linewidth=1, alpha=0.5)
        label = f"{result.shape.kind}: {result.loss:.3f}"
        axis.plot(history.evaluated, history.validation, "o-", color=colour, markersize=4, label=label)
        lowest.append(min(mean.min(), min(history.validation)))
        highest.append(history.validation[0])
    low, high = min(lowest), max(highest)
    axis.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.3 * (high - low) + 0.02)  # the first steps fall from afar
    axis.set_xlim(left=0)
    axis.set_xlabel("step")
    axis.set_ylabel("cross-entropy (nats per character)")
    axis.set_title("Dots: validation loss; lines without dots: training loss, moving average", loc="left", fontsize=10)
    axis.legend(title="best validation loss")
    figure.savefig(path)
    plt.close(figure)


def metrics(results: list[Result], recipe: Recipe, text: Text, source: str, device: str) -> dict[str, Any]:
    """Everything that is known about a run, for `write_metrics`."""
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
                "evaluations": _evaluations(result.history),
            }
            for result in results
        ],
    }


def _evaluations(history: History) -> list[dict[str, float]]:
    """Per evaluation: the step, the mean training loss since the one before, and the validation loss."""
    rows, start = [], 0
    for step, validation in zip(history.evaluated, history.validation, strict=True):
        train = sum(history.train[start:step]) / (step - start)
        rows.append({"step": step, "train_loss": train, "validation_loss": validation})
        start = step
    return rows

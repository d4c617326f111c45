"""The loss curves."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no window, so it runs on a machine without a screen

import matplotlib.pyplot as plt
import numpy as np

from examples.charlm.report import Result
from examples.common import COLOURS, STYLE

COLOUR = {"gpt": COLOURS[0], "modern": COLOURS[1]}


def plot_losses(results: list[Result], path: Path) -> None:
    """Training losses as a moving average, validation losses as dots where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
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
        # The losses of the first steps are far above the others.
        axis.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.3 * (high - low) + 0.02)
        axis.set_xlim(left=0)
        axis.set_xlabel("step")
        axis.set_ylabel("cross-entropy (nats per character)")
        title = "Dots: validation loss; lines without dots: training loss, moving average"
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(title="best validation loss")
        figure.savefig(path)
        plt.close(figure)

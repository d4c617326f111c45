"""Two figures: the training of the model, and its attention when it writes a date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no window, so it runs on a machine without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, PercentFormatter

from examples.common import COLOURS, STYLE
from examples.dates.train import History


def plot_training(history: History, path: Path) -> Path:
    """Cross-entropy of both parts, and exact match on validation dates."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        steps = np.arange(1, len(history.loss) + 1)
        left.plot(steps, history.loss, color=COLOURS[0], linewidth=0.7, alpha=0.6, label="training, each batch")
        left.plot(
            history.validation_step, history.validation_loss, "o-", color=COLOURS[1], markersize=4, label="validation"
        )
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator())
        left.set_title("teacher forcing", loc="left", fontweight="bold")
        left.set_ylabel("cross-entropy per character (nats)")
        left.legend()
        right.plot(history.validation_step, history.validation_accuracy, "o-", color=COLOURS[1], markersize=4)
        right.set_ylim(0, 1.03)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.set_ylabel("validation dates without a mistake")
        right.set_title(
            f"decoding: {history.validation_accuracy[-1]:.1%} right at the end", loc="left", fontweight="bold"
        )
        for axis in (left, right):
            axis.set_xlabel("step")
            axis.set_xlim(0, 1.02 * len(history.loss))
        figure.suptitle("From written dates to ISO dates: training")
        return _save(figure, path)


def plot_attention(weights: np.ndarray, source: str, answer: str, path: Path) -> Path:
    """weights (H, L, S): the mean over heads, large, above each head; rows are written, columns read characters."""
    columns = ["\N{OPEN BOX}" if character == " " else character for character in source]
    rows = [*answer, "end"]
    with plt.rc_context({**STYLE, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = plt.figure(figsize=(10, 7.2), layout="constrained")
        grid = figure.add_gridspec(2, len(weights), height_ratios=(2.6, 1))
        mean = figure.add_subplot(grid[0, :])
        image = _draw_weights(mean, weights.mean(0), columns, rows, size=12)
        mean.set_title("mean of the heads", loc="left", fontweight="bold")
        mean.set_xlabel("read (\N{OPEN BOX} is a space)")
        mean.set_ylabel("written")
        for index, head in enumerate(weights):
            axis = figure.add_subplot(grid[1, index])
            _draw_weights(axis, head, columns, rows, size=6)
            axis.set_title(f"head {index + 1}", loc="left", fontweight="bold")
        figure.colorbar(image, ax=figure.axes, label="attention weight", shrink=0.6)
        figure.suptitle(
            f"Cross-attention of the last decoder layer: {source} becomes {answer}\n"
            "where it looks when it writes each character (rows sum to 1; computed from the layer's queries and keys)"
        )
        return _save(figure, path)


def _draw_weights(
    axis: Axes, weights: np.ndarray, columns: Sequence[str], rows: Sequence[str], size: float
) -> AxesImage:
    axis.tick_params(length=0)
    axis.tick_params(axis="x", pad=1.1 * size)  # down to the baseline of the letters
    axis.set_xticks(range(len(columns)), columns, fontsize=size, family="DejaVu Sans Mono", va="baseline")
    axis.set_yticks(range(len(rows)), rows, fontsize=size, family="DejaVu Sans Mono")
    return axis.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path

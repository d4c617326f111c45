"""Figures per series: forecasts and actual values, losses, a comparison of all methods, and the next forecast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: no window, so it runs on a machine without a screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from examples.common import COLOURS, STYLE
from examples.forecast.data import targets
from examples.forecast.evaluate import LEVEL
from examples.forecast.experiments import NOISE_FLOOR, Problem
from examples.forecast.report import Result

LOSSES = {
    "training": "Mean over the batches of an epoch, while the weights change.\n"
    "The encoder-decoder sees the true values before each step\n(teacher forcing).",
    "validation": "After each epoch, on values that no weight is trained on.\n"
    "Training stops when it falls no further. A model without a curve\n"
    "is trained as in the tutorial: on these too, to the last epoch.",
}
"""The meaning of the two curves, printed below each: for these reasons one may be above or below the other."""


def plot_all(problem: Problem, results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the figures as PNG files and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"forecast": _plot_forecasts, "loss": _plot_losses, "comparison": _plot_comparison}
    if problem.has_future:
        figures["future"] = _plot_future
    paths = []
    with plt.rc_context(STYLE):
        for name, plot in figures.items():
            figure = plot(problem, results)
            paths.append(folder / f"{problem.series.name}_{name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def _plot_forecasts(problem: Problem, results: Sequence[Result]) -> Figure:
    """Above the models, below the baselines, both over the actual values of the test part."""
    extra = {method.name for method in problem.methods if method.extra}
    models = [result for result in results if result.learned and result.name not in extra]
    baselines = [result for result in results if not result.learned]
    signal = [result for result in results if result.name == NOISE_FLOOR]
    figure, axes = plt.subplots(2, 1, figsize=(10, 7.5), sharex=True, sharey=True, layout="constrained")
    groups = ((models + signal, "models"), (baselines, "baselines"))
    for axis, (group, title) in zip(axes, groups, strict=True):
        _plot_group(axis, problem, group, _colours(results))
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel(_label("value", problem.series.unit))
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _time_axis(axes[1], problem)
    horizon = problem.tests["test"].horizon
    how = "one step ahead" if horizon == 1 else f"{horizon} {problem.series.step}s from each vertical line"
    figure.suptitle(f"{_title(problem)}: forecasts on the test part, {how}")
    return figure


def _time_axis(axis: Axes, problem: Problem) -> None:
    """Dates where the series has them."""
    times = problem.series.times
    if times is not None and np.issubdtype(times.dtype, np.datetime64):
        locator = AutoDateLocator()
        axis.xaxis.set_major_locator(locator)
        axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    else:
        axis.set_xlabel(f"{problem.series.step} of the series")


def _colours(results: Sequence[Result]) -> dict[str, str]:
    """Name -> the colour of a method in all figures of a series; models and baselines count apart."""
    groups = ([result.name for result in results if result.learned == learned] for learned in (True, False))
    return {name: COLOURS[index % len(COLOURS)] for group in groups for index, name in enumerate(group)}


def _plot_group(axis: Axes, problem: Problem, group: Sequence[Result], colours: dict[str, str]) -> None:
    test, series = problem.tests["test"], problem.series
    chosen = np.arange(0, len(test.origins), test.horizon)  # one forecast after the other, without overlap
    steps = test.origins[chosen, None] + np.arange(test.horizon)  # (n, horizon)
    times = series.time_axis(steps)
    actual = targets(test.values, test.origins[chosen], test.horizon)
    axis.plot(times.ravel(), actual.ravel(), color="0.6", linewidth=0.8, marker=".", markersize=4, label="actual")
    for result in group:
        x, y = times, result.forecasts[chosen]
        if test.horizon > 1:  # NaN lifts the pen between two forecasts
            x, y = np.pad(x, ((0, 0), (0, 1)), mode="edge"), np.pad(y, ((0, 0), (0, 1)), constant_values=np.nan)
        style = {"color": colours[result.name], "linewidth": 1.5, "label": result.name}
        if result.name == NOISE_FLOOR:
            style |= {"color": "black", "linestyle": "--", "linewidth": 1.1, "label": "true signal"}
        elif test.horizon == 1 and result.name in ("last value", "seasonal naive"):
            style |= {"linewidth": 0.8, "alpha": 0.6}  # copies of noisy values: thin, or they hide the others
        axis.plot(x.ravel(), y.ravel(), **style)
    if test.horizon > 1:
        for origin in times[:, 0]:
            axis.axvline(origin, color="0.8", linewidth=0.8, zorder=0)


def _plot_future(problem: Problem, results: Sequence[Result]) -> Figure:
    """The next values by each model and the best baseline, each with its prediction intervals."""
    series, horizon = problem.series, problem.tests["test"].horizon
    baseline = min((r for r in results if not r.learned), key=lambda result: result.mean("test", "mse"))
    shown = [*(result for result in results if result.learned), baseline]
    rows = (len(shown) + 1) // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(10, 1.2 + 2.9 * rows), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    length, colours = len(series.values), _colours(results)
    past = np.arange(max(0, length - max(2 * horizon, 2 * series.season, 20)), length)
    ahead_steps = np.arange(length - 1, length + horizon)  # from the last value, so that the line has no gap
    for index, axis in enumerate(axes.flat):
        if index >= len(shown):
            axis.set_visible(False)
            continue
        result, colour = shown[index], colours[shown[index].name]
        assert result.ahead is not None
        future = np.concatenate([series.values[-1:], result.ahead.future])
        width = np.concatenate([[0.0], result.ahead.half_widths])
        axis.plot(series.time_axis(past), series.values[past], color="0.45", linewidth=1.0)
        axis.plot(series.time_axis(ahead_steps), future, color=colour, linewidth=1.6)
        title = result.name
        if np.isfinite(width).all():
            times = series.time_axis(ahead_steps)
            axis.fill_between(times, future - width, future + width, color=colour, alpha=0.2, linewidth=0)
            title += f": {LEVEL:.0%} interval, held {result.ahead.coverage:.0%} of the test values"
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_ylabel(_label("value", series.unit))
        axis.label_outer()
    for axis in axes[-1]:
        _time_axis(axis, problem)
    figure.suptitle(
        f"{_title(problem)}: the next {horizon} {series.step}s\n"
        "intervals from the errors on the validation part (split conformal), each step by itself"
    )
    return figure


def _plot_losses(problem: Problem, results: Sequence[Result]) -> Figure:
    """Per epoch at the first seed; a dot marks the epoch that was kept."""
    learned, colours = [result for result in results if result.learned], _colours(results)
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.6), sharey=True, layout="constrained")
    for index, result in enumerate(learned):
        outcome = result.outcomes[0]
        colour, best = colours[result.name], outcome.history.best_epoch
        style = "-" if index < len(COLOURS) else "--"
        for axis, losses in zip(axes, (outcome.history.train, outcome.history.validation), strict=True):
            if losses:
                scaled = np.array(losses) * outcome.loss_unit
                label = result.name if axis is axes[0] else None
                axis.plot(np.arange(1, len(losses) + 1), scaled, style, color=colour, linewidth=1.4, label=label)
                axis.plot(best + 1, scaled[best], "o", color=colour, markersize=5)
    for axis, (title, meaning) in zip(axes, LOSSES.items(), strict=True):
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_xlabel(f"epoch\n\n{meaning}", fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(_label("mean squared error", problem.series.unit, squared=True))
    figure.legend(loc="outside lower center", ncols=min(4, len(learned)))
    figure.suptitle(f"{_title(problem)}: losses; the dot is the epoch that was kept")
    return figure


def _plot_comparison(problem: Problem, results: Sequence[Result]) -> Figure:
    """Bars of the mean squared error, lines from the best to the worst seed, and the values."""
    titles = {"test": "test part", "fresh": "long fresh series", "rollout": "20 steps ahead"}
    tests = [test for test in titles if test in problem.tests]
    bars = [result for result in results if result.name != NOISE_FLOOR]
    floor = next((result for result in results if result.name == NOISE_FLOOR), None)
    figure, axes = plt.subplots(
        1, len(tests), figsize=(3.6 + 3.0 * len(tests), 1.6 + 0.33 * len(bars)), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, test in zip(axes[0], tests, strict=True):
        summaries = [result.over_seeds()[test]["mse"] for result in bars]
        means = np.array([summary["mean"] for summary in summaries])
        spread = [means - [s["min"] for s in summaries], [s["max"] for s in summaries] - means]
        limit = min(means.max(), 3 * np.median(means))  # a bar far beyond the others would leave them no room
        spread = np.where(means > limit, 0, np.clip(spread, 0, None))
        axis.barh(
            np.arange(len(bars)), np.minimum(means, limit), xerr=spread, ecolor="0.2", height=0.7,
            color=[COLOURS[0] if result.learned else "0.7" for result in bars],
        )  # fmt: skip
        for row, (mean, summary) in enumerate(zip(means, summaries, strict=True)):
            text = f"{mean:.3f}" if mean < 10 else f"{mean:.1f}" if mean < 1000 else f"{mean:.2e}"
            if mean > limit:
                axis.text(0.98 * limit, row, f"{text}, cut off \N{RIGHTWARDS ARROW}", va="center", ha="right")
            else:
                axis.text(max(mean, summary["max"]) + 0.015 * limit, row, text, va="center")
        axis.set_xlim(0, 1.2 * limit)
        axis.set_title(titles[test], loc="left", fontweight="bold")
        axis.set_xlabel(_label("MSE", problem.series.unit, squared=True))
        axis.grid(axis="y", visible=False)
        if floor is not None:
            axis.axvline(floor.mean(test, "mse"), color="black", linestyle="--", linewidth=1, label="noise floor")
    axes[0, 0].set_yticks(np.arange(len(bars)), [result.name for result in bars])
    axes[0, 0].invert_yaxis()
    lines, _ = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles=[Patch(color=COLOURS[0], label="models"), Patch(color="0.7", label="baselines"), *lines],
        loc="outside lower center", ncols=3,
    )  # fmt: skip
    seeds = max(len(result.seeds) for result in results)
    spread_note = f", mean of {seeds} seeds with the range" if seeds > 1 else ""
    figure.suptitle(f"{_title(problem)}\nmean squared error{spread_note}; lower is better")
    return figure


def _title(problem: Problem) -> str:
    return problem.series.title[0].upper() + problem.series.title[1:]


def _label(name: str, unit: str, squared: bool = False) -> str:
    """Axis label with its unit; "1" is none."""
    return name if unit == "1" else f"{name} ({unit}\N{SUPERSCRIPT TWO})" if squared else f"{name} ({unit})"

"""The results as tables on the screen and as metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from examples.forecast.evaluate import LEVEL, over_seeds
from examples.forecast.experiments import NOISE_FLOOR, Ahead, Outcome, Problem, Scores
from examples.forecast.parity import Parity

SINE_TESTS = {"test": "test part", "fresh": "fresh series"}
SCHEMA = 2  # of metrics.json


@dataclass(frozen=True)
class Result:
    """A row of the table: a baseline (no outcomes), or a model with one outcome per seed."""

    name: str
    scores: list[Scores]
    forecasts: np.ndarray  # (N, horizon) on "test"; of a model, at the first seed
    outcomes: list[Outcome]
    seeds: list[int]
    ahead: Ahead | None = None  # its forecast after the series; of a model, at the first seed; None for artificial data

    @property
    def learned(self) -> bool:
        return bool(self.outcomes)

    def over_seeds(self) -> dict[str, dict[str, dict[str, float]]]:
        """Test -> metric -> mean, min, max."""
        return {test: over_seeds([scores[test] for scores in self.scores]) for test in self.scores[0]}

    def mean(self, test: str, metric: str) -> float:
        return self.over_seeds()[test][metric]["mean"]


# -------------------------------------------------------------------------------------------------- screen


def results_text(problem: Problem, results: Sequence[Result]) -> str:
    """Heading, table, and conclusions."""
    series, split, test = problem.series, problem.split, problem.tests["test"]
    by_name = {result.name: result for result in results}
    findings = sine_findings(by_name) if NOISE_FLOOR in by_name else real_findings(results)
    return "\n".join([
        f"== {series.title[0].upper()}{series.title[1:]}",
        f"{split.length} values: training {split.train_end}, validation {split.test_start - split.train_end}, test "
        f"{split.length - split.test_start}; {test.horizon} step(s) ahead from {len(test.origins)} origins",
        results_table(problem, results),
        *findings,
    ])  # fmt: skip


def results_table(problem: Problem, results: Sequence[Result]) -> str:
    """One line per method, in the order given; errors in the series' own units."""
    unit = "" if problem.series.unit == "1" else f" ({problem.series.unit})"
    names = {"fresh": "MSE, fresh series", "rollout": "MSE, 20 steps"}
    more = [test for test in ("fresh", "rollout") if test in problem.tests]
    held = [f"{LEVEL:.0%} held"] if problem.has_future else []
    more_names = [*(names[test] for test in more), *held]
    header = ["", "parameters", "test MSE", "[range]", f"MAE{unit}", "MASE", *more_names, "s/run"]
    rows = []
    for result in results:
        summary = result.over_seeds()
        mse = summary["test"]["mse"]
        rows.append([
            result.name,
            f"{result.outcomes[0].parameters:,}" if result.learned else "-",
            f"{mse['mean']:.4f}",
            f"[{mse['min']:.4f}, {mse['max']:.4f}]" if len(result.scores) > 1 else "",
            f"{summary['test']['mae']['mean']:.3f}",
            f"{summary['test']['mase']['mean']:.3f}",
            *(f"{summary[test]['mse']['mean']:.4f}" for test in more),
            *([_percent(result.ahead)] if problem.has_future else []),
            f"{np.mean([o.history.seconds for o in result.outcomes]):.1f}" if result.learned else "-",
        ])  # fmt: skip
    return _align([header, *rows])


def _percent(ahead: Ahead | None) -> str:
    """How many test values the prediction intervals held; "-" where too few validation errors leave them open."""
    return f"{ahead.coverage:.0%}" if ahead is not None and np.isfinite(ahead.half_widths).all() else "-"


def sine_findings(results: dict[str, Result]) -> list[str]:
    """The reasons for the difference, in numbers of this run."""
    floor = results[NOISE_FLOOR].mean("fresh", "mse")

    def excess(name: str) -> float:
        return results[name].mean("fresh", "mse") - floor

    def step(before: str, after: str, what: str) -> str:
        change = f"{excess(after) / excess(before) - 1:+.0%}"
        return f"  {excess(before):.4f} -> {excess(after):.4f}  {change:>5}  {before} -> {after}: {what}"

    def against(ours: str, other: str) -> str:
        verdict = compare(results[ours], results[other], "fresh")
        return f"  {ours} {verdict} {other}: {excess(ours):.4f} and {excess(other):.4f}"

    return [
        f"What made the difference: MSE on the fresh series above the noise floor, {floor:.4f}, which nothing can beat",
        step("LSTM, the tutorial's", "LSTM, standardised", "the scale of the data, nothing else"),
        step("LSTM, standardised", "encoder, the LSTM's recipe", "attention, nothing else"),
        step("encoder, the LSTM's recipe", "encoder", "half as wide, weight decay, schedule, early stopping"),
        step("encoder", "encoder, context 63", "it sees one period of the sine"),
        "Is it attention? The same measure against others that get the same data and context",
        against("encoder", "LSTM, the tutorial's"),
        against("encoder", "LSTM, standardised"),
        against("encoder", "AR(20)"),
        against("encoder, context 63", "LSTM, standardised, context 63"),
        against("encoder, context 63", "ridge, context 63"),
        against("encoder, context 63", "harmonic fit"),
        *(f"On the {name}: {verdict(list(results.values()), test)}" for test, name in SINE_TESTS.items()),
    ]


def verdict(results: Sequence[Result], test: str) -> str:
    """The winner: a network, or a method of a few lines."""
    methods = [result for result in results if result.name != NOISE_FLOOR]
    models = [result for result in methods if result.learned]
    model = min(models, key=lambda result: result.mean(test, "mse"))
    baseline = min((r for r in methods if not r.learned), key=lambda result: result.mean(test, "mse"))
    figures = f"{model.mean(test, 'mse'):.4f} against {baseline.mean(test, 'mse'):.4f}"
    outcome = compare(model, baseline, test)
    if outcome == "beats":
        return f"a network wins: {model.name} beats {baseline.name}, the best method without one ({figures})."
    if outcome == "loses to":
        return f"no network wins: {baseline.name} beats the best of them, {model.name} ({figures}, network first)."
    return f"no network wins: {model.name} is level with {baseline.name}, which costs nothing to train ({figures})."


def compare(ours: Result, other: Result, test: str) -> str:
    """By MSE; a difference within the seeds' ranges is no difference."""
    a, b = ours.over_seeds()[test]["mse"], other.over_seeds()[test]["mse"]
    if a["max"] < b["min"]:
        return "beats"
    if a["min"] > b["max"]:
        return "loses to"
    return "is level with"


def real_findings(results: Sequence[Result]) -> list[str]:
    """Which method is better."""

    def mse(result: Result) -> float:
        return result.mean("test", "mse")

    models = sorted((result for result in results if result.learned), key=mse)
    return [
        f"On the test part: {verdict(results, 'test')}",
        "Networks from best to worst: " + ", ".join(f"{model.name} {mse(model):.4f}" for model in models),
        f"'{LEVEL:.0%} held': so many test values lay in the prediction intervals, which should hold {LEVEL:.0%}.",
    ]


def parity_table(parities: Sequence[Parity]) -> str:
    """Losses per epoch side by side."""
    header = ["epoch", *(f"{p.method}: {layers}" for p in parities for layers in ("torch.nn", "fastattn"))]
    rows = [
        [str(epoch + 1), *(f"{loss[epoch]:.9f}" for p in parities for loss in (p.torch, p.fastattn))]
        for epoch in range(len(parities[0].torch))
    ]
    return _align([header, *rows])


def _align(rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- file


def problem_metrics(problem: Problem, results: Sequence[Result]) -> dict[str, Any]:
    """One series of metrics.json."""
    series, split = problem.series, problem.split
    return {
        "title": series.title,
        "unit": series.unit,
        "step": series.step,
        "season": series.season,
        "context": problem.context,
        "split": asdict(split),
        "tests": {
            name: {"origins": len(test.origins), "horizon": test.horizon} for name, test in problem.tests.items()
        },
        "results": [
            {
                "name": result.name,
                "kind": "model" if result.learned else "baseline",
                "parameters": result.outcomes[0].parameters if result.learned else None,
                "seeds": result.seeds,
                "scores": result.over_seeds(),
                "intervals": result.ahead
                and {
                    "level": LEVEL,
                    "half_widths": [float(width) if np.isfinite(width) else None for width in result.ahead.half_widths],
                    "coverage": result.ahead.coverage,
                },
                "runs": [
                    {
                        "seed": seed,
                        "scores": outcome.scores,
                        "best_epoch": outcome.history.best_epoch + 1,
                        "train_loss": outcome.history.train,
                        "validation_loss": outcome.history.validation,
                        "seconds": outcome.history.seconds,
                    }
                    for seed, outcome in zip(result.seeds, result.outcomes, strict=True)
                ],
            }
            for result in results
        ],
    }


def parity_metrics(parity: Parity) -> dict[str, Any]:
    return asdict(parity) | {"difference": parity.difference, "rounding": parity.rounding}

"""The program: it runs the parts in order and prints their results."""

from __future__ import annotations

import argparse
import csv
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import fastattn
from examples.common import add_common_arguments, check_device, environment, positive, run_program, write_metrics
from examples.forecast import data, plots, report
from examples.forecast.baselines import Forecast
from examples.forecast.evaluate import LEVEL
from examples.forecast.experiments import (
    LAYERS,
    Ahead,
    Problem,
    real_baselines,
    real_problem,
    sine_baselines,
    sine_problem,
)
from examples.forecast.parity import compare
from examples.forecast.report import Result
from examples.forecast.runner import Run, estimate_seconds, execute_all

FIRST_SEED = 42  # the tutorial's
DEFAULT_OUTPUT = Path(__file__).parent / "output"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0, or 2 if the input cannot be used."""
    args = parse_arguments(argv)
    return run_program(lambda: run(args), goes_on_from="epochs")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.forecast",
        description="Time series forecasting with a Transformer on fastattn's layers, beside an LSTM and simple "
        "baselines. Without arguments: a noisy sine, then CO2 at Mauna Loa and sea surface temperatures.",
    )
    own = parser.add_argument_group("your own series")
    own.add_argument("--csv", type=Path, metavar="PATH", help="a file with a header, oldest row first")
    own.add_argument("--column", metavar="NAME", help="the column to forecast")
    own.add_argument("--horizon", type=positive, metavar="H", help="how many rows to forecast")
    own.add_argument(
        "--time-column", metavar="NAME", help="dates or numbers, evenly spaced (default: one is looked for)"
    )
    own.add_argument("--season", type=positive, metavar="S", help="rows per season (default: found in the data)")
    own.add_argument(
        "--context", type=positive, metavar="C", help="rows to look back (default: four seasons, or what fits)"
    )
    own.add_argument("--last", type=positive, metavar="N", help="use the last N rows only: a long file in less time")
    own.add_argument("--fill-gaps", action="store_true", help="fill an empty cell with the last value before it")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 20 epochs, and of the built-in series two: about a minute"
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="training runs per model (default: 3)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="at most this many (default: 50)")
    add_common_arguments(parser, DEFAULT_OUTPUT)
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core; 1 on a GPU)")
    parser.add_argument("--layers", choices=list(LAYERS), default="fastattn", help="default: %(default)s")
    args = parser.parse_args(argv)

    if args.csv is not None and (args.column is None or args.horizon is None):
        parser.error("--csv needs --column and --horizon")
    if args.csv is None:
        for name in ("column", "horizon", "time_column", "season", "context", "last"):
            if getattr(args, name) is not None:
                parser.error(f"--{name.replace('_', '-')} needs --csv")
    check_device(parser, args)
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.epochs = args.epochs or (20 if args.quick else 50)
    args.workers = args.workers or (1 if args.device == "cuda" else _cores())
    return args


def _cores() -> int:
    """The cores that this process may use; a container can have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    torch.set_num_threads(1)  # see execute_all
    problems = make_problems(args)  # first, so that a mistake in the input shows at once
    backends = print_setup(args, problems[0])
    print_cost(args, problems)

    # The models whose layers exist twice, on the first problem.
    print("\n== The same training with torch.nn and with fastattn layers, from the same weights")
    parities = [compare(problems[0], kind, args.device, min(5, args.epochs)) for kind in ("encoder", "encoder-decoder")]
    print(report.parity_table(parities))
    for parity in parities:
        print(
            f"  {parity.method}: the losses differ by at most {parity.difference:.1e} of their size; two torch.nn runs "
            f"whose weights differ in the last bit: {parity.rounding:.1e}"
        )
        print(f"  {parity.method}: {parity.step}")

    results = train_all(args, problems)
    files: list[Path] = []
    for problem in problems:
        print("\n" + report.results_text(problem, results[problem.series.name]))
        files += plots.plot_all(problem, results[problem.series.name], args.output)
        if problem.has_future:
            files.append(write_future(problem, results[problem.series.name], args.output))

    seconds = time.perf_counter() - start
    files.append(args.output / "metrics.json")
    metrics = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "environment": environment(args.device) | {"workers": args.workers, "attention_backends": backends},
        "parity": [report.parity_metrics(parity) for parity in parities],
        "series": {p.series.name: report.problem_metrics(p, results[p.series.name]) for p in problems},
        "seconds": seconds,
    }
    write_metrics(files[-1], report.SCHEMA, metrics)
    print_closing(args, problems, files, seconds)


def make_problems(args: argparse.Namespace) -> list[Problem]:
    """The series of this run, with the methods' epochs as asked."""
    if args.csv is not None:
        problems = [own_problem(args)]
    else:
        problems = [sine_problem(fresh_length=2_000 if args.quick else 20_000)]
        if not args.quick:
            problems.append(real_problem(data.load_co2(), horizon=52))
        problems.append(real_problem(data.load_elnino(), horizon=12))
    return [
        replace(p, methods=[replace(m, recipe=replace(m.recipe, epochs=args.epochs)) for m in p.methods])
        for p in problems
    ]


def own_problem(args: argparse.Namespace) -> Problem:
    """The problem of --csv; prints what was found in the file and not given."""
    table = data.read_csv(args.csv, args.column, args.time_column, args.fill_gaps)
    values, times = table.values, table.times
    if args.last is not None:
        values, times = values[-args.last :], None if times is None else times[-args.last :]
    if len(values) < 20:
        raise data.DataError(f"expected at least 20 values in {args.csv}, got {len(values)}")
    if table.time_column is not None and args.time_column is None:
        print(f"found: dates in column {table.time_column!r}")
    if table.uneven:
        print(f"note: {table.uneven}; every row counts as one step. --time-column makes this an error")
        times = None  # dates after the end would be guesses
    season = args.season or data.estimate_season(values[: data.Split.by_fraction(len(values)).train_end])
    series = data.Series(_slug(args.column), args.column, "1", "row", values, season, times)
    problem = real_problem(series, args.horizon, args.context)
    print(f"{len(values)} rows, season {season}{'' if args.season else ' (found)'}, context {problem.context}")
    return problem


def train_all(args: argparse.Namespace, problems: Sequence[Problem]) -> dict[str, list[Result]]:
    """Series name -> baselines, then models."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + args.seeds))
    runs = [
        Run(
            problem, method, seed, args.device,
            args.output / "checkpoints" / f"{problem.series.name}-{_slug(method.name)}-seed{seed}.pt",
            args.resume, args.layers,
        )
        for problem in problems for method in problem.methods for seed in seeds
    ]  # fmt: skip
    print(f"\n== Training: {len(runs)} runs of at most {args.epochs} epochs, {args.workers} at a time")
    outcomes = iter(execute_all(runs, args.workers))
    results: dict[str, list[Result]] = {}
    for problem in problems:
        rows = []
        for name, make_forecast in baselines_of(problem).items():
            scores, forecasts = problem.score(make_forecast)
            ahead = baseline_ahead(problem, name, make_forecast, forecasts) if problem.has_future else None
            rows.append(Result(name, [scores], forecasts, [], [], ahead))
        for method in problem.methods:
            own = [next(outcomes) for _ in seeds]
            scores = [outcome.scores for outcome in own]
            ahead = own[0].ahead if problem.has_future else None
            rows.append(Result(method.name, scores, own[0].forecasts, own, seeds, ahead))
        results[problem.series.name] = rows
    return results


def baselines_of(problem: Problem) -> dict[str, Callable[[int], Forecast]]:
    return real_baselines(problem) if problem.has_future else sine_baselines(problem)


def baseline_ahead(
    problem: Problem, name: str, make_forecast: Callable[[int], Forecast], test_forecasts: np.ndarray
) -> Ahead:
    """The forecast of a baseline after the end of a real series."""
    horizon = problem.tests["test"].horizon
    validating = real_baselines(problem, validating=True)[name](horizon)
    return problem.look_ahead(validating, make_forecast(horizon), test_forecasts)


def write_future(problem: Problem, results: Sequence[Result], folder: Path) -> Path:
    """The next values after the end of the series, by every baseline and every model at its first seed.

    Each value comes with the ends of its prediction interval; they are empty if there are too few validation errors.
    """
    horizon, series = problem.tests["test"].horizon, problem.series
    steps = np.arange(len(series.values), len(series.values) + horizon)
    times = data.time_texts(series.time_axis(steps))
    aheads = {result.name: result.ahead for result in results if result.ahead is not None}
    path = folder / f"{series.name}_future.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        ends = [f"{name}{end}" for name in aheads for end in ("", f" low {LEVEL:.0%}", f" high {LEVEL:.0%}")]
        writer.writerow([f"{series.step}s after the last", *(["time"] if series.times is not None else []), *ends])
        for step in range(horizon):
            row = [str(step + 1), *([times[step]] if series.times is not None else [])]
            for ahead in aheads.values():
                value, width = ahead.future[step], ahead.half_widths[step]
                row.append(f"{value:.6g}")
                row += [f"{value - width:.6g}", f"{value + width:.6g}"] if np.isfinite(width) else ["", ""]
            writer.writerow(row)
    return path


def _slug(text: str) -> str:
    """For file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "series"


# -------------------------------------------------------------------------------------------------- what it says


def print_setup(args: argparse.Namespace, problem: Problem) -> dict[str, str]:
    """Versions, device, and which attention backend serves the models; returns the backends."""
    name = f" ({torch.cuda.get_device_name()})" if args.device == "cuda" else ""
    print(f"fastattn {fastattn.__version__}, PyTorch {torch.__version__}, device: {args.device}{name}")
    config = next(method.config for method in problem.methods if method.name == "encoder")
    shape = (32, config.heads, config.context // config.patch, config.width // config.heads)
    q = torch.empty(shape, device=args.device)
    explanations = {
        "training": fastattn.explain(q, q, q, dropout_p=config.dropout),
        "forecasting": fastattn.explain(q, q, q),
        "forecasting, causal": fastattn.explain(q, q, q, causal=True),
    }
    backends = {use: str(explanation.backend) for use, explanation in explanations.items()}
    if args.layers == "fastattn":
        print("attention backend: " + "; ".join(f"{use}: {backend}" for use, backend in backends.items()))
        print(explanations["training"])
    else:
        print("attention: torch.nn's own layers, as asked by --layers")
    return backends


def print_cost(args: argparse.Namespace, problems: Sequence[Problem]) -> None:
    """Print how long training can take here, measured on some batches of each model; and the memory, if it is large."""
    seconds = sum(estimate_seconds(p, m, args.device, args.layers) for p in problems for m in p.methods)
    seconds *= args.seeds / min(args.workers, args.seeds * sum(len(p.methods) for p in problems))
    how_long = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else (
        f"{seconds / 3600:.0f} hours"
    )  # fmt: skip
    print(f"expected: at most about {how_long} of training; most models stop before their last epoch")
    gigabytes = max(12 * len(p.series.values) * (p.context + p.tests["test"].horizon) for p in problems) / 1e9
    if gigabytes > 1:
        print(f"expected: about {gigabytes:.0f} GB of memory for the windows of each process")
    if args.csv is not None and (seconds > 3600 or gigabytes > 1):
        print("less: --last N uses the last N rows, --epochs and --seeds are fewer passes, --context a shorter memory")


def print_closing(args: argparse.Namespace, problems: Sequence[Problem], files: Sequence[Path], seconds: float) -> None:
    names = ", ".join(p.series.title for p in problems)
    print(f"\n== Done in {seconds:.0f} s: trained and scored {sum(len(p.methods) for p in problems)} models with "
          f"{args.seeds} seed(s) on {names}")  # fmt: skip
    if args.quick:
        print("This was --quick: one seed and 20 epochs. Differences between the models may be chance.")
    print("Files:")
    for path in [*files, args.output / "checkpoints"]:
        print(f"  {path}")
    print("Try next:")
    if args.csv is None:
        path = Path("examples/forecast/data/elnino.csv")
        print(f"  python -m examples.forecast --csv {path} --column temperature --horizon 24   # or a file of your own")
    else:
        print("  another --horizon, --context or --season")
    print("  the same command with --resume: scores and draws from the checkpoints, without training")
    print("  read examples/forecast/models.py: the Transformers, in some hundred lines")

"""The comparison: the series, their splits, the methods, and one training run from start to scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import fastattn
from examples.common import count_parameters
from examples.forecast import baselines
from examples.forecast.baselines import Forecast
from examples.forecast.data import (
    DataError,
    Scaler,
    Series,
    Split,
    clean_sine,
    contexts,
    make_origins,
    noisy_sine,
    targets,
)
from examples.forecast.evaluate import interval, naive_error, neural_forecast, score
from examples.forecast.models import ModelConfig, build
from examples.forecast.train import TUTORIAL, History, Recipe, Windows, fit

TUNED_ENCODER = Recipe(learning_rate=3e-3, weight_decay=0.5)
TUNED_LSTM = Recipe(learning_rate=3e-3, weight_decay=0.1)
LAYERS = {"fastattn": fastattn.nn, "torch": torch.nn}  # by name: worker processes take strings, not modules
NOISE_FLOOR = "noise floor (true signal)"

Scores = dict[str, dict[str, float]]  # of each test by name: mse, mae, mase


@dataclass(frozen=True)
class Test:
    """Forecasts of `horizon` values are made at each of `origins` in `values`, and compared with the actual values."""

    values: np.ndarray
    origins: np.ndarray
    horizon: int


@dataclass(frozen=True)
class Method:
    """A model with its training: one row of a table, trained once per seed."""

    name: str
    config: ModelConfig
    recipe: Recipe = field(default_factory=Recipe)
    scaling: Literal["standard", "min-max"] = "standard"
    extra: bool = False  # there to explain another row; left out of crowded figures


@dataclass(frozen=True)
class Problem:
    """A series with its tests and methods.

    `tests` by name: "test" is the one on the test part; the sine has two more.
    """

    series: Series
    split: Split
    context: int
    tests: dict[str, Test]
    methods: list[Method]

    @property
    def has_future(self) -> bool:
        """Whether to forecast after its end: not for artificial data."""
        return "fresh" not in self.tests

    @property
    def before_test(self) -> np.ndarray:
        return self.series.values[: self.split.test_start]

    def score(self, make_forecast: Callable[[int], Forecast]) -> tuple[Scores, np.ndarray]:
        """Scores on every test, and the forecasts (N, horizon) on "test"."""
        scale = naive_error(self.before_test, self.series.season)
        forecasts = {name: make_forecast(test.horizon)(test.values, test.origins) for name, test in self.tests.items()}
        scores = {
            name: score(forecasts[name], targets(test.values, test.origins, test.horizon), scale)
            for name, test in self.tests.items()
        }
        return scores, forecasts["test"]

    def look_ahead(self, validating: Forecast, forecast: Forecast, test_forecasts: np.ndarray) -> Ahead:
        """Forecast the values after the series, with intervals.

        Args:
            validating: the method, fitted to the training part alone; its errors on the validation part make the
                intervals.
            forecast: the method as it is tested.
            test_forecasts: its forecasts on "test".
        """
        values, test = self.series.values, self.tests["test"]
        origins = make_origins(self.split.train_end, self.split.test_start, self.context, test.horizon)
        half_widths = interval(targets(values, origins, test.horizon) - validating(values, origins))
        errors = targets(test.values, test.origins, test.horizon) - test_forecasts
        future = forecast(values, np.array([len(values)]))[0]
        return Ahead(future, half_widths, float(np.mean(np.abs(errors) <= half_widths)))


@dataclass(frozen=True)
class Ahead:
    """The forecast after the end of the series and the half-widths of its intervals, both (horizon,).

    `coverage` is the part of all test values that such intervals held; `LEVEL` of them should.
    """

    future: np.ndarray
    half_widths: np.ndarray
    coverage: float


@dataclass(frozen=True)
class Outcome:
    """The result of a training run."""

    scores: Scores
    forecasts: np.ndarray  # (N, horizon) at the origins of "test"
    ahead: Ahead
    history: History
    loss_unit: float  # times this, the losses of the history are in the series' squared units
    parameters: int


# ------------------------------------------------------------------------------------------ one training run


def train_and_score(
    problem: Problem,
    method: Method,
    seed: int,
    device: str,
    checkpoint: Path | None = None,
    resume: bool = False,
    layers: str = "fastattn",
    on_epoch: Callable[[], None] = lambda: None,
) -> Outcome:
    """Build, train and score one model; the same seed gives the same numbers."""
    torch.manual_seed(seed)
    model = build(method.config, LAYERS[layers]).to(device)
    scaler, train, validation = prepare(problem, method, device)
    history = fit(model, train, validation, method.recipe, checkpoint, resume, on_epoch)

    scores, forecasts = problem.score(lambda horizon: neural_forecast(model, scaler, horizon))
    forecast = neural_forecast(model, scaler, problem.tests["test"].horizon)
    ahead = problem.look_ahead(forecast, forecast, forecasts)
    return Outcome(scores, forecasts, ahead, history, scaler.scale**2, count_parameters(model))


def prepare(problem: Problem, method: Method, device: str) -> tuple[Scaler, Windows, Windows | None]:
    """The scaler, the training windows and the validation windows, on the device.

    Without early stopping there is no use for validation, and its values are trained on, as in the tutorial.
    """
    values, split = problem.series.values, problem.split
    context, horizon = method.config.context, method.config.horizon
    train_end = split.train_end if method.recipe.patience is not None else split.test_start
    make_scaler = {"standard": Scaler.standard, "min-max": Scaler.min_max}[method.scaling]
    scaler = make_scaler(values[:train_end])
    scaled = scaler.transform(values)

    def windows(start: int, stop: int) -> Windows:
        origins = make_origins(start, stop, context, horizon)
        parts = contexts(scaled, origins, context), targets(scaled, origins, horizon)
        inputs, outputs = (torch.tensor(part, dtype=torch.float32, device=device) for part in parts)
        return inputs, outputs

    train = windows(0, train_end)
    return scaler, train, windows(train_end, split.test_start) if train_end < split.test_start else None


# ------------------------------------------------------------------------------- part 1: the tutorial's data


def sine_problem(fresh_length: int = 20_000) -> Problem:
    """The tutorial's series, split and window: 1000 values, 80/20, one step ahead from the last 20."""
    length, context, season = 1000, 20, 63  # season: 2 pi / 0.1 = 62.8
    values = noisy_sine(length, seed=42)
    fresh = noisy_sine(fresh_length, seed=7)
    split = Split(train_end=640, test_start=800, length=length)
    first_target = split.test_start + context  # as in the tutorial, whose test windows lie in the test part entirely
    # All methods are scored on the same targets, also those that look back further than 20 values.
    tests = {
        "test": Test(values, make_origins(first_target, length, context, 1), 1),
        "rollout": Test(values, make_origins(first_target, length, context, 20), 20),
        # 180 targets leave a standard error of 0.024 on an MSE; 20,000 targets leave 0.0025.
        "fresh": Test(fresh, make_origins(season, fresh_length, context, 1), 1),
    }
    wide_encoder = ModelConfig("encoder", context, width=64)
    return Problem(
        Series("sine", "the tutorial's noisy sine", "1", "step", values, season),
        split,
        context,
        tests,
        [
            Method("LSTM, the tutorial's", ModelConfig("lstm", context, width=64), TUTORIAL, "min-max"),
            Method("LSTM, standardised", ModelConfig("lstm", context, width=64), TUTORIAL, extra=True),
            Method("encoder, the LSTM's recipe", wide_encoder, TUTORIAL, extra=True),
            Method("encoder", ModelConfig("encoder", context)),
            Method("encoder-decoder", ModelConfig("encoder-decoder", context, horizon=20, patch=5)),
            Method("LSTM, standardised, context 63", ModelConfig("lstm", season, width=64), TUTORIAL, extra=True),
            # The settings of the next two by validation, eight trials each: tune.py.
            Method("encoder, context 63", ModelConfig("encoder", season, patch=3), TUNED_ENCODER, extra=True),
            Method("LSTM, context 63", ModelConfig("lstm", season, width=64), TUNED_LSTM, extra=True),
        ],
    )


def sine_baselines(problem: Problem) -> dict[str, Callable[[int], Forecast]]:
    """Name -> function from a horizon to a forecaster. The last one knows the signal without noise."""
    train, split, season = problem.before_test, problem.split, problem.series.season
    signal = clean_sine(sum(len(test.values) for test in problem.tests.values()))
    return {
        "last value": baselines.last_value,
        "seasonal naive": lambda horizon: baselines.seasonal_naive(horizon, season),
        "AR(20)": lambda horizon: baselines.autoregression(train, 20, horizon),
        "ridge, context 63": lambda horizon: baselines.choose_ridge(train, split.train_end, season, horizon)[0],
        "harmonic fit": lambda horizon: baselines.harmonic(train, horizon),
        NOISE_FLOOR: lambda horizon: lambda values, origins: targets(signal, origins, horizon),
    }


# ------------------------------------------------------------------------------------- part 2: a real series


def real_problem(series: Series, horizon: int, context: int | None = None) -> Problem:
    """All `horizon` next values from every origin of the last fifth of the series.

    Args:
        series: real data.
        horizon: number of values to forecast.
        context: number of values to look back, rounded to a multiple of 16; default four seasons, or what fits.

    Raises:
        DataError: the series is constant, or too short for this horizon and context.
    """
    quarter = _quarter(series.season, horizon, context)
    while context is None and quarter > 1 and _needed(series, horizon, 16 * quarter) > len(series.values):
        quarter -= 1  # a short series: fewer seasons are better than none
    context = 16 * quarter
    _check_length(series, horizon, context)
    split = Split.by_fraction(len(series.values))
    if series.values[: split.train_end].std() == 0:
        raise DataError(f"{series.title}: expected values that vary, got the same one throughout the training part")
    origins = make_origins(split.test_start, split.length, context, horizon)
    # The level of a real series wanders off the range of the training part: forecast changes, not levels.
    shape = ModelConfig("encoder", context, horizon, patch=4 * quarter, relative=True)
    recipe = Recipe(learning_rate=3e-3, weight_decay=0.1)  # by validation, as everything here
    return Problem(
        series,
        split,
        context,
        {"test": Test(series.values, origins, horizon)},
        [
            Method("LSTM", replace(shape, kind="lstm", patch=1, width=64), recipe),
            Method("encoder", shape, recipe),
            Method("encoder-decoder", replace(shape, kind="encoder-decoder", patch=quarter), recipe),
        ],
    )


def _quarter(season: int, horizon: int, context: int | None) -> int:
    """A quarter of a season, roughly; of it are built the context, 16 of them, and the patches.

    The encoder gets 4 tokens of a season each, the encoder-decoder writes a quarter per step. The cost of a run then
    does not grow with the season, and validation liked it better than shorter patches.
    """
    if context is not None:
        return max(1, round(context / 16))
    return max(2, round(season / 4), math.ceil(horizon / 16))


def _needed(series: Series, horizon: int, context: int) -> int:
    """Room for 32 training windows (a batch), a validation window, a test window, and two seasons to compare."""
    return math.ceil(max((context + horizon + 32) / 0.64, (horizon + 1) / 0.16, 2 * series.season / 0.64))


def _check_length(series: Series, horizon: int, context: int) -> None:
    needed = _needed(series, horizon, context)
    if len(series.values) < needed:
        raise DataError(
            f"{series.title}: expected at least {needed} values for horizon {horizon}, context {context} and season "
            f"{series.season}, got {len(series.values)}; try a smaller --horizon, --context or --season"
        )


def real_baselines(problem: Problem, validating: bool = False) -> dict[str, Callable[[int], Forecast]]:
    """By name, from a horizon to a forecaster; `validating`: fitted without the validation part."""
    split, season, context = problem.split, problem.series.season, problem.context
    train = problem.series.values[: split.train_end] if validating else problem.before_test

    def penalty(horizon: int) -> float:
        return baselines.choose_ridge(problem.before_test, split.train_end, context, horizon)[1]

    methods: dict[str, Callable[[int], Forecast]] = {"last value": baselines.last_value}
    if season > 1:
        methods |= {
            "seasonal naive": lambda horizon: baselines.seasonal_naive(horizon, season),
            "seasonal naive + drift": lambda horizon: baselines.seasonal_naive(horizon, season, drift=True),
        }
    return methods | {
        "AR(20)": lambda horizon: baselines.autoregression(train, 20, horizon),
        "ridge": lambda horizon: baselines.ridge(train, context, horizon, penalty(horizon)),
    }

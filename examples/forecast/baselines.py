"""Forecasts without a neural network. A model that does not beat these has learnt nothing worth its cost.

Every forecaster here and in `evaluate.py` is called as `forecast(values, origins) -> (N, horizon)`: row n holds the
forecast of `values[t : t + horizon]` for t = origins[n], and uses `values[:t]` only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from examples.forecast.data import contexts, make_origins, targets

Forecast = Callable[[np.ndarray, np.ndarray], np.ndarray]


def last_value(horizon: int) -> Forecast:
    """Tomorrow will be like today."""

    def forecast(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
        return np.repeat(values[origins - 1][:, None], horizon, axis=1)

    return forecast


def seasonal_naive(horizon: int, season: int, drift: bool = False) -> Forecast:
    """The value of one season ago; with `drift`, plus the change over the last season."""

    def forecast(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
        # Step i copies the newest known value that is a whole number of seasons before it.
        steps = np.arange(horizon)
        seasons_ago = steps // season + 1
        same_phase = values[origins[:, None] + steps - season * seasons_ago]
        if not drift:
            return same_phase
        change = values[origins - 1] - values[origins - 1 - season]
        return same_phase + change[:, None] * seasons_ago

    return forecast


def autoregression(train: np.ndarray, order: int, horizon: int) -> Forecast:
    """AR(order): a weighted sum of the last `order` values, by least squares; longer forecasts use earlier ones."""
    origins = make_origins(0, len(train), order, horizon=1)
    inputs = np.column_stack([contexts(train, origins, order), np.ones(len(origins))])
    weights, *_ = np.linalg.lstsq(inputs, train[origins], rcond=None)

    def forecast(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
        known = contexts(values, origins, order)
        for _ in range(horizon):
            following = known[:, -order:] @ weights[:-1] + weights[-1]
            known = np.column_stack([known, following])
        return known[:, order:]

    return forecast


def ridge(train: np.ndarray, context: int, horizon: int, penalty: float) -> Forecast:
    """One linear map from the last `context` values to all `horizon` forecasts, as changes from the last value.

    Least squares with `penalty` times the squared weights; the penalty is in units of the training variance, so the
    same numbers do for ppm and for degrees. This form is called NLinear (Zeng et al. 2023, arXiv:2205.13504), and it
    beats many published Transformers.
    """
    origins = make_origins(0, len(train), context, horizon)
    inputs, level = _changes(contexts(train, origins, context))
    outputs = targets(train, origins, horizon) - level
    input_mean, output_mean = inputs.mean(axis=0), outputs.mean(axis=0)
    inputs = inputs - input_mean
    gram = inputs.T @ inputs + penalty * train.var() * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs.T @ (outputs - output_mean))  # (context - 1, horizon)

    def forecast(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
        inputs, level = _changes(contexts(values, origins, context))
        return level + output_mean + (inputs - input_mean) @ weights

    return forecast


def _changes(known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, context) -> its differences from the last value (N, context - 1), and the last value (N, 1)."""
    level = known[:, -1:]
    return known[:, :-1] - level, level


def choose_ridge(
    train: np.ndarray,
    validation_start: int,
    context: int,
    horizon: int,
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0),
) -> tuple[Forecast, float]:
    """Ridge with the penalty that does best on `train[validation_start:]`, then fitted on all of `train`."""
    origins = make_origins(validation_start, len(train), context, horizon)
    actual = targets(train, origins, horizon)

    def validation_error(penalty: float) -> float:
        forecast = ridge(train[:validation_start], context, horizon, penalty)
        return float(np.mean((forecast(train, origins) - actual) ** 2))

    best = min(penalties, key=validation_error)
    return ridge(train, context, horizon, best), best


def harmonic(train: np.ndarray, horizon: int) -> Forecast:
    """a + b sin(w t) + c cos(w t) by least squares: shows the value of knowing that the signal is one sine."""
    # w: the peak of the spectrum. Zero padding shows what lies between its bins, which are too far apart for a
    # forecast; the Hann window keeps the ends of the series, where it is cut, from moving the peak.
    padded = 100 * len(train)
    spectrum = np.abs(np.fft.rfft((train - train.mean()) * np.hanning(len(train)), padded))
    frequency = 2 * np.pi * np.argmax(spectrum) / padded

    def design(times: np.ndarray) -> np.ndarray:
        return np.stack([np.ones(times.shape), np.sin(frequency * times), np.cos(frequency * times)], axis=-1)

    weights, *_ = np.linalg.lstsq(design(np.arange(len(train))), train, rcond=None)

    def forecast(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
        return design(origins[:, None] + np.arange(horizon)) @ weights

    return forecast

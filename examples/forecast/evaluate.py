"""Rolling-origin evaluation: a forecast from every origin in the test part, scored in the series' own units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from examples.forecast.baselines import Forecast
from examples.forecast.data import Scaler, contexts
from examples.forecast.models import Forecaster


def neural_forecast(model: Forecaster, scaler: Scaler, horizon: int) -> Forecast:
    """A trained model as a forecaster like those of `baselines.py`: scale, forecast, scale back."""
    device = next(model.parameters()).device

    def forecast(values: np.ndarray, origins: np.ndarray) -> np.ndarray:
        known = contexts(scaler.transform(values), origins, model.config.context)
        inputs = torch.tensor(known, dtype=torch.float32, device=device)
        model.eval()
        batches = [model.forecast(batch, horizon) for batch in inputs.split(2048)]  # split bounds the memory
        return scaler.inverse(torch.cat(batches).double().cpu().numpy())

    return forecast


def score(predictions: np.ndarray, actual: np.ndarray, naive_error: float) -> dict[str, float]:
    """MSE, MAE and MASE over all origins and steps; both arrays (N, horizon)."""
    if predictions.shape != actual.shape:
        raise ValueError(f"expected predictions.shape == actual.shape == {actual.shape}, got {predictions.shape}")
    error = predictions - actual
    mae = float(np.abs(error).mean())
    return {"mse": float((error**2).mean()), "mae": mae, "mase": mae / naive_error}


LEVEL = 0.9  # of prediction intervals


def interval(errors: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Half-widths (horizon,) of prediction intervals, from errors (N, horizon) of forecasts not trained on.

    Split conformal prediction (Lei et al. 2018, arXiv:1604.04173): for each step, the smallest width that held
    ceil((N + 1) level) of the N errors. It would hold the next value with probability `level` if the future were drawn
    like the errors; a series that drifts breaks that, so compare with its share on the test part. inf if N errors
    are too few for the level.
    """
    count = len(errors)
    rank = math.ceil((count + 1) * level)
    if rank > count:
        return np.full(errors.shape[1], np.inf)
    return np.sort(np.abs(errors), axis=0)[rank - 1]


def naive_error(train: np.ndarray, season: int) -> float:
    """The scale of MASE: mean absolute error of the seasonal naive forecast, one season ahead, in the training data.

    A MASE below 1 is better than that. It has no unit, so it compares across series (Hyndman and Koehler 2006).
    """
    return float(np.abs(train[season:] - train[:-season]).mean())


def over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Scores of one method at several seeds -> mean, min and max of each."""
    return {
        name: {
            "mean": float(np.mean([s[name] for s in scores])),
            "min": min(s[name] for s in scores),
            "max": max(s[name] for s in scores),
        }
        for name in scores[0]
    }

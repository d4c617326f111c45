"""Rolling-origin evaluation: a forecast from every origin in the test part, scored in the series' own units."""

from __future__ import annotations

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

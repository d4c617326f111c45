"""What the tests of the forecasting example share: small models, series and problems."""

from dataclasses import replace

import numpy as np

from examples.forecast import data
from examples.forecast.experiments import Method, real_problem
from examples.forecast.models import ModelConfig
from examples.forecast.train import Recipe

KINDS = ["lstm", "encoder", "encoder-decoder"]


def small_config(kind, **changes):
    return replace(
        ModelConfig(kind, context=12, horizon=5, patch=2, width=8, heads=2, feedforward=16, layers=1), **changes
    )


def small_series(length=240, season=12, seed=0):
    time = np.arange(length)
    noise = np.random.RandomState(seed).normal(scale=0.1, size=length)
    return data.Series(
        "small", "a small series", "1", "step", 0.01 * time + np.sin(2 * np.pi * time / season) + noise, season
    )


def small_problem(epochs=2):
    """Three models of a few hundred weights on a series of 240 values."""
    problem = real_problem(small_series(), horizon=5, context=12)
    recipe = Recipe(epochs=epochs, warmup_steps=2)
    return replace(problem, methods=[Method(k, small_config(k, relative=True), recipe) for k in KINDS])


# --------------------------------------------------------------------------------------------------------- CSV


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path

"""How the settings of the sine's context-63 models were chosen: by validation loss alone, eight trials for each model.

python -m examples.forecast.tune
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import torch

from examples.forecast.experiments import Method, Problem, prepare, sine_problem
from examples.forecast.models import ModelConfig, build
from examples.forecast.train import Recipe, fit

SEEDS = (42, 43, 44)


def trials(context: int) -> dict[str, list[Method]]:
    """Model -> its eight settings: two learning rates, two strengths of weight decay, and two of its own shape."""
    recipes = [
        Recipe(learning_rate=rate, weight_decay=decay) for rate, decay in itertools.product((1e-3, 3e-3), (0.1, 0.5))
    ]
    shapes = {
        "encoder": [ModelConfig("encoder", context, patch=patch) for patch in (1, 3)],
        "LSTM": [ModelConfig("lstm", context, width=width) for width in (32, 64)],
    }
    return {
        kind: [Method(_name(config, recipe), config, recipe) for config in configs for recipe in recipes]
        for kind, configs in shapes.items()
    }


def _name(config: ModelConfig, recipe: Recipe) -> str:
    shape = f"width {config.width}" if config.kind == "lstm" else f"patch {config.patch}"
    return f"{shape}, learning rate {recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}"


def validation_loss(problem: Problem, method: Method, seed: int) -> float:
    """The lowest of one training run, in the series' squared units."""
    torch.manual_seed(seed)
    model = build(method.config)
    scaler, train, validation = prepare(problem, method, "cpu")
    return min(fit(model, train, validation, method.recipe).validation) * scaler.scale**2


def main() -> None:
    torch.set_num_threads(1)
    problem = replace(sine_problem(fresh_length=500), methods=[])
    for kind, methods in trials(problem.series.season).items():
        print(f"{kind}, context {problem.series.season}: validation MSE, mean of {len(SEEDS)} seeds")
        losses = {m.name: float(np.mean([validation_loss(problem, m, seed) for seed in SEEDS])) for m in methods}
        best = min(losses, key=lambda name: losses[name])
        for name, loss in losses.items():
            print(f"  {loss:.4f}  {name}{'  <- chosen' if name == best else ''}", flush=True)


if __name__ == "__main__":
    main()

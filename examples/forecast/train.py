"""One training loop for all models, with early stopping, and checkpoints to continue from."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.common import load_checkpoint, save_checkpoint
from examples.forecast.models import Forecaster

Windows = tuple[Tensor, Tensor]  # inputs (N, context) and targets (N, horizon), float32, scaled


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are for the Transformers; `TUTORIAL` is the tutorial's, for its LSTM."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.5  # strong: some hundred windows for 17,000 weights
    warmup_steps: int = 50  # attention is unstable in its first steps; then the rate falls along a cosine to 0
    cosine: bool = True
    epochs: int = 50
    batch_size: int = 32
    patience: int | None = 15  # epochs without a better validation loss before it stops; None: keep the last epoch


TUTORIAL = Recipe(optimizer="adam", weight_decay=0.0, warmup_steps=0, cosine=False, patience=None)


@dataclass
class History:
    """Mean squared errors per epoch, in scaled units; which epoch was kept (counted from 0); time spent."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = field(default=0.0, compare=False)


def fit(
    model: Forecaster,
    train: Windows,
    validation: Windows | None,
    recipe: Recipe,
    checkpoint: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[], None] = lambda: None,
) -> History:
    """Train in place; with `recipe.patience`, `model` ends with the weights of its best validation epoch.

    Args:
        model: on the device of the windows.
        train: used for the gradients.
        validation: used for early stopping and for nothing else; None with `recipe.patience` None.
        checkpoint: file to write after every epoch.
        resume: go on from `checkpoint` if it exists. The random state is in it, so the result is the same as without
            a break.
        on_epoch: called after every epoch, for a progress bar.
    """
    if (validation is None) != (recipe.patience is None):
        raise ValueError("expected validation windows with recipe.patience, and none without")
    make_optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    optimizer = make_optimizer(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    loader = DataLoader(TensorDataset(*train), batch_size=recipe.batch_size, shuffle=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(recipe, len(loader) * recipe.epochs))
    history = History()
    best_weights = model.state_dict()
    identity = {"config": asdict(model.config), "recipe": asdict(recipe), "data": {"crc32": _crc32(train)}}
    if resume and checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, model, identity)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history, best_weights = History(**state["history"]), state["best_model"]
        _set_random_state(state["random"])
        for _ in history.train:
            on_epoch()

    for epoch in range(len(history.train), recipe.epochs):
        if recipe.patience is not None and epoch - history.best_epoch > recipe.patience:
            break
        start = time.perf_counter()
        history.train.append(_train_epoch(model, loader, optimizer, schedule))
        if validation is not None:
            history.validation.append(evaluate_loss(model, validation))
        if validation is None or history.validation[-1] <= min(history.validation):
            history.best_epoch = epoch
            best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        history.seconds += time.perf_counter() - start
        if checkpoint is not None:
            _save_checkpoint(checkpoint, identity, model, optimizer, schedule, history, best_weights)
        on_epoch()
    model.load_state_dict(best_weights)
    model.eval()
    return history


def _train_epoch(
    model: Forecaster,
    loader: DataLoader[tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """One pass; the mean over batches of the mean squared error."""
    model.train()
    total = 0.0
    for inputs, targets in loader:
        predictions = model(inputs, targets)
        # A mere warning by torch: (N, 1) against (N,) would broadcast to (N, N) and train on nonsense.
        assert predictions.shape == targets.shape
        loss = nn.functional.mse_loss(predictions, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def evaluate_loss(model: Forecaster, windows: Windows) -> float:
    """Mean squared error as in inference, without teacher forcing and without dropout."""
    model.eval()
    inputs, targets = windows
    return nn.functional.mse_loss(model(inputs), targets).item()


def _rate(recipe: Recipe, total_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at each step."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / recipe.warmup_steps) if recipe.warmup_steps else 1.0
        return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps)) if recipe.cosine else warmup

    return factor


# ------------------------------------------------------------------------------------------------ checkpoints


def _save_checkpoint(
    path: Path,
    identity: dict[str, dict[str, Any]],
    model: Forecaster,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    history: History,
    best_weights: dict[str, Tensor],
) -> None:
    state = {
        "model": model.state_dict(),
        "best_model": best_weights,
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "history": asdict(history),
        "random": _get_random_state(),
    }
    save_checkpoint(path, identity | state)


def _crc32(windows: Windows) -> int:
    """A checksum of the data."""
    return zlib.crc32(windows[0].cpu().numpy().tobytes())


def _get_random_state() -> list[Tensor]:
    """The random states of the CPU, which shuffles, and, if there is one, the GPU, which draws dropout."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1].cpu())

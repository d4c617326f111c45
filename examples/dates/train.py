"""The model, and its training by teacher forcing, with checkpoints to continue from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.common import load_checkpoint, save_checkpoint
from examples.dates import data
from examples.dates.evaluate import convert
from fastattn.nn import EncoderDecoder, EncoderDecoderConfig, RoPE, TransformerConfig

# Weights start at 1 / sqrt(d_model): the GPT-2 default of 0.02 is meant for widths around 1000, and learns slowly here.
_STACK = TransformerConfig(
    d_model=64, num_layers=2, num_heads=4, dim_feedforward=128, position=RoPE(), init_std=64**-0.5
)
CONFIG = EncoderDecoderConfig(
    encoder=_STACK, decoder=_STACK, source_vocab_size=len(data.SOURCE), target_vocab_size=len(data.TARGET)
)


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1  # parts of a batch that are computed one after the other, to save memory
    amp: bool = False  # forward in bfloat16, which needs no loss scaling
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup_steps: int = 50  # then the rate falls along a cosine to 0
    clip: float = 1.0  # largest norm of the gradient
    validate_every: int = 100
    seed: int = 42

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size == {self.batch_size}, got {self.accumulate}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass
class History:
    """Cross-entropy of each step; at some steps the results for validation dates."""

    loss: list[float] = field(default_factory=list)
    validation_step: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)


def make_model(seed: int, device: str) -> EncoderDecoder:
    torch.manual_seed(seed)
    return EncoderDecoder(CONFIG).to(device)


def fit(
    model: EncoderDecoder,
    recipe: Recipe,
    checkpoint: Path | None = None,
    resume: bool = False,
    compiled: bool = False,
    on_step: Callable[[History], None] = lambda history: None,
) -> History:
    """Train in place.

    Args:
        model: on the device to train on.
        recipe: how.
        checkpoint: file to write at every validation.
        resume: go on from `checkpoint` if it exists. A step's dates depend on the seed and the step alone, so the
            result is the same as without a break.
        compiled: train `torch.compile` of the model.
        on_step: called after every step, for a progress bar.
    """
    device = next(model.parameters()).device
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay, fused=True)
    history = History()
    identity = {"config": asdict(CONFIG), "recipe": asdict(recipe)}
    if resume and checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, model, identity)
        optimizer.load_state_dict(state["optimizer"])
        history = History(**state["history"])

    validation = data.examples("validation", 200, recipe.seed)
    start = time.perf_counter() - history.seconds
    for step in range(len(history.loss), recipe.steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        batch = data.batch(data.examples("train", recipe.batch_size, f"{recipe.seed} {step}"), device)
        loss = 0.0
        for source, lengths, target in zip(*(t.chunk(recipe.accumulate) for t in batch), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
                part = cross_entropy(forward(source, target[:, :-1], source_lengths=lengths), target)
            (part / recipe.accumulate).backward()
            loss += part.item() / recipe.accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        history.loss.append(loss)
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.steps:
            validate(model, validation, history)
            history.seconds = time.perf_counter() - start
            if checkpoint is not None:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": asdict(history)}
                save_checkpoint(checkpoint, identity | state)
        on_step(history)
    model.eval()
    return history


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each next token: logits (N, L, V) for target (N, L + 1), BOS first; padding does not count."""
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=data.PAD)


@torch.no_grad()
def validate(model: EncoderDecoder, written: list[data.Written], history: History) -> None:
    """Cross-entropy by teacher forcing, exact match by decoding."""
    model.eval()
    source, lengths, target = data.batch(written, next(model.parameters()).device)
    answers = convert(model, [text for text, _ in written])
    history.validation_step.append(len(history.loss))
    history.validation_loss.append(cross_entropy(model(source, target[:, :-1], source_lengths=lengths), target).item())
    right = sum(answer.text == day.isoformat() for answer, (_, day) in zip(answers, written, strict=True))
    history.validation_accuracy.append(right / len(written))

"""The training loop: nanoGPT's recipe in plain PyTorch, with checkpoints to continue from."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.charlm.data import Text, Vocabulary, random_batch, windows
from examples.charlm.models import Shape
from examples.charlm.parallel import Ranks
from examples.common import CheckpointError, read_checkpoint, save_checkpoint
from fastattn.nn import CausalLM

EVALUATION_BATCH = 64  # windows at once
ALONE = Ranks()


@dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are nanoGPT's for a CPU."""

    steps: int = 2000
    batch: int = 12
    accumulate: int = 1  # batches per step
    learning_rate: float = 1e-3  # falls to a tenth along a cosine
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # norm of all gradients together
    evaluate_every: int = 250
    seed: int = 1337
    amp: bool = False  # bfloat16 autocast

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        lowest = self.learning_rate / 10
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (self.learning_rate - lowest)


@dataclass
class History:
    """Mean cross-entropy per character, in nats."""

    train: list[float] = field(default_factory=list)  # of each step's batch
    evaluated: list[int] = field(default_factory=list)  # after how many steps
    validation: list[float] = field(default_factory=list)  # over the whole validation part
    seconds: float = field(default=0.0, compare=False)

    @property
    def best(self) -> int:
        """The evaluation with the lowest loss, whose weights are kept."""
        return self.validation.index(min(self.validation))


def build(shape: Shape, vocabulary: Vocabulary, seed: int) -> CausalLM:
    """A model with the weights that the seed gives, on the CPU."""
    torch.manual_seed(seed)
    return CausalLM(shape.config(len(vocabulary)))


def fit(
    model: CausalLM,
    text: Text,
    shape: Shape,
    recipe: Recipe,
    checkpoint: Path,
    *,
    resume: bool = False,
    compiled: bool = False,
    on_step: Callable[[int, History], None] = lambda done, history: None,
    ranks: Ranks = ALONE,
) -> History:
    """Train in place; `model` ends with the weights of its best evaluation.

    Args:
        model: on the device to train on.
        text: what to learn, and what to evaluate on.
        shape: of `model`.
        recipe: how to train.
        checkpoint: file to write after every evaluation.
        resume: go on from `checkpoint` if it exists. The random state is in it, so the result is the same as without
            a break.
        compiled: train through `torch.compile`.
        on_step: called after every step with the number of steps done, for a progress bar.
        ranks: the processes that train together, each of which calls this. The loss is that of one process.

    Raises:
        KeyboardInterrupt: Ctrl-C. Several processes stop after the same step, and `checkpoint` has it.
    """
    device = next(model.parameters()).device
    ranks.divide(model)
    ranks.seed(recipe.seed)
    optimizer = make_optimizer(model, recipe)
    batches = torch.Generator().manual_seed(recipe.seed)
    identity = {"shape": asdict(shape), "recipe": asdict(recipe), "text": {"crc32": _crc32(text)}}
    history, best = History(), {}
    if resume and checkpoint.exists():
        state = read_own_checkpoint(checkpoint, identity)
        ranks.load(model, optimizer, state)
        batches.set_state(state["batches"])
        history, best = History(**state["history"]), state["best_model"]
        if len(state["random"]) == ranks.count:
            _set_random_state(state["random"][ranks.number])
    forward = torch.compile(model) if compiled else model
    losses: list[Tensor] = []  # on the device until they are saved: reading them would wait for it
    start = time.perf_counter() - history.seconds

    def keep() -> None:
        """Write a checkpoint. All processes contribute to it; the first one writes."""
        history.train += ranks.mean(torch.stack(losses)).tolist() if losses else []
        losses.clear()
        history.seconds = time.perf_counter() - start
        state = ranks.state(model, optimizer) | {
            "vocabulary": text.vocabulary.characters,
            "best_model": best,
            "batches": batches.get_state(),
            "history": asdict(history),
            "random": ranks.gather(_get_random_state()),
        }
        if ranks.first:
            save_checkpoint(checkpoint, identity | state)

    for step in range(len(history.train), recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        model.train()
        total = torch.zeros((), device=device)
        for _ in range(recipe.accumulate):
            batch = random_batch(text.train, shape.block, recipe.batch, batches).to(device)
            loss = loss_of(forward, batch, recipe.amp, ranks) / recipe.accumulate
            loss.backward()
            total += loss.detach()
        losses.append(total)
        ranks.clip_grad_norm_(model, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        if done % recipe.evaluate_every == 0 or done == recipe.steps:
            history.evaluated.append(done)
            history.validation.append(evaluate(model, text.validation, shape.block, recipe.amp, ranks))
            if history.best == len(history.validation) - 1:
                best = ranks.weights(model)
            keep()
        on_step(done, history)
        if ranks.stopped():
            keep()
            raise KeyboardInterrupt
    ranks.load_weights(model, best)
    return history


def make_optimizer(model: CausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; matrices and embeddings decay, norms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def loss_of(model: Callable[[Tensor], Tensor], batch: Tensor, amp: bool, ranks: Ranks = ALONE) -> Tensor:
    """Mean cross-entropy of the characters after each of batch[:, :-1]: the mean over processes is the batch's."""
    inputs, targets = ranks.own(batch[:, :-1]), ranks.own(batch[:, 1:])
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
        logits = model(inputs)
        own = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")  # autocast: in float32
    return own * (ranks.scale / batch[:, 1:].numel())


@torch.no_grad()
def evaluate(model: CausalLM, tokens: Tensor, block: int, amp: bool = False, ranks: Ranks = ALONE) -> float:
    """Mean cross-entropy over all windows: nothing is random, so that two models see the same."""
    model.eval()
    device = next(model.parameters()).device
    parts = windows(tokens, block).split(EVALUATION_BATCH)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for part in parts:
        total += loss_of(model, part.to(device), amp, ranks).double() * len(part)
    return float(ranks.mean(total) / sum(len(part) for part in parts))


def read_own_checkpoint(path: Path, identity: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`read_checkpoint` of a file that this example has written.

    Raises:
        CheckpointError: there is none, or as `read_checkpoint`.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}: train --model {path.stem} first, or name another --output")
    state = read_checkpoint(path, identity)
    if not {"shape", "vocabulary", "best_model"} <= state.keys():
        raise CheckpointError(f"{path} is not a checkpoint of this example")
    return state


def _crc32(text: Text) -> int:
    """A checksum of the data."""
    return zlib.crc32(text.validation.numpy().tobytes(), zlib.crc32(text.train.numpy().tobytes()))


def _get_random_state() -> list[Tensor]:
    """The random states of the CPU and, if there is one, the GPU: dropout draws from them."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1])

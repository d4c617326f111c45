"""Text from a trained model, character by character, of any length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from examples.charlm.data import Vocabulary
from examples.charlm.models import Shape
from examples.charlm.train import read_own_checkpoint
from fastattn import Sampling, stream
from fastattn.nn import CausalLM, Learned, SlidingWindowCache


def load(checkpoint: Path, device: str) -> tuple[CausalLM, Vocabulary]:
    """A trained model, with the weights of its best evaluation and a window of `block` characters; and its vocabulary.

    Raises:
        CheckpointError: there is no checkpoint, or it is another program's.
    """
    state = read_own_checkpoint(checkpoint, {})
    shape, vocabulary = Shape(**state["shape"]), Vocabulary(state["vocabulary"])
    config = shape.config(len(vocabulary))
    if not isinstance(config.position, Learned):
        # Training texts have `block` characters. Here the window limits distances to those of training.
        config = replace(config, window=(shape.block - 1, 0))
    model = CausalLM(config)
    model.load_state_dict(state["best_model"])
    return model.to(device).eval(), vocabulary


def continue_text(model: CausalLM, prompt: Tensor, length: int, sampling: Sampling) -> Iterator[int]:
    """`length` tokens that follow prompt (L,), which holds one at least.

    RoPE depends on distances only, so the cache slides and nothing is computed twice. Learned positions end at
    `max_len`: then the model starts again from the last `kept_of` tokens.
    """
    position = model.config.position
    if not isinstance(position, Learned):
        for token in stream(model, prompt[None], length, sampling=sampling, cache=SlidingWindowCache):
            yield int(token)
        return
    seen = prompt[-position.max_len :]
    while length > 0:
        count = min(length, position.max_len - len(seen) + 1)  # the last one is not read
        for token in stream(model, seen[None], count, sampling=sampling):
            seen = torch.cat([seen, token])
            yield int(token)
        length -= count
        seen = seen[-kept_of(position) :]


def kept_of(position: Learned) -> int:
    """How many tokens a model continues from when its positions are used up: half of them."""
    return (position.max_len + 1) // 2

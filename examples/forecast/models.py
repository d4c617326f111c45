"""Three forecasters: the tutorial's LSTM, an encoder-only Transformer, and an encoder-decoder Transformer.

Each one maps the last `context` values to the next `horizon` values, in scaled units. The Transformers take their
layers from a namespace, `fastattn.nn` or `torch.nn`: the two have the same classes with the same parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

import fastattn.nn


@dataclass(frozen=True)
class ModelConfig:
    """The settings that a model needs to be built again from a checkpoint."""

    kind: Literal["lstm", "encoder", "encoder-decoder"]
    context: int
    horizon: int = 1
    patch: int = 1  # values per token of the Transformers
    width: int = 32  # d_model; also the LSTM's hidden size
    heads: int = 4
    feedforward: int = 64
    layers: int = 2
    dropout: float = 0.0  # models this small do no better with it: weight decay and early stopping do its work
    relative: bool = False  # forecast the change from the last known value, for series that drift

    def __post_init__(self) -> None:
        if self.context % self.patch:
            raise ValueError(f"expected context to be a multiple of patch={self.patch}, got {self.context}")


class Forecaster(nn.Module):
    """Shared part: differences from the last value, and forecasts of any length."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def _forward(self, inputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        raise NotImplementedError

    def forward(self, inputs: Tensor, targets: Tensor | None = None, steps: int | None = None) -> Tensor:
        """inputs (N, context) -> the next values (N, steps).

        Args:
            inputs: the last known values.
            targets: (N, horizon), given in training, for teacher forcing. Only the encoder-decoder looks at them, and
                it predicts step i from the targets before i.
            steps: how many, up to the horizon, which is the default.
        """
        steps = self.config.horizon if steps is None else steps
        if inputs.shape[1] != self.config.context:
            raise ValueError(f"expected inputs.shape == (N, {self.config.context}), got {tuple(inputs.shape)}")
        if not self.config.relative:
            return self._forward(inputs, targets, steps)
        level = inputs[:, -1:]
        return level + self._forward(inputs - level, None if targets is None else targets - level, steps)

    @torch.no_grad()
    def forecast(self, inputs: Tensor, steps: int) -> Tensor:
        """(N, context) -> (N, steps). Beyond its own horizon, a model goes on from its own forecasts."""
        context, horizon = self.config.context, self.config.horizon
        known = inputs
        while (remaining := context + steps - known.shape[1]) > 0:
            known = torch.cat([known, self(known[:, -context:], steps=min(remaining, horizon))], dim=1)
        return known[:, context:]


class LSTMForecaster(Forecaster):
    """The tutorial's model: an LSTM, and a linear layer on its last output. 17,217 parameters at horizon 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.lstm = nn.LSTM(1, config.width, batch_first=True)
        self.fc = nn.Linear(config.width, config.horizon)

    def _forward(self, inputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        hidden, _ = self.lstm(inputs.unsqueeze(-1))  # (N, context, width)
        return self.fc(hidden[:, -1])[:, :steps]


class EncoderForecaster(Forecaster):
    """Encoder-only Transformer: all forecasts at once from the mean over the encoded input.

    A sentence becomes tokens by looking words up in a table; a series has numbers already, so a linear layer replaces
    the table. `patch` neighbouring values make one token: fewer tokens, each with a bit of shape in it.
    """

    def __init__(self, config: ModelConfig, layers: ModuleType = fastattn.nn) -> None:
        super().__init__(config)
        self.encoder = _SeriesEncoder(config, layers)
        self.head = nn.Linear(config.width, config.horizon)

    def _forward(self, inputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        # Averaging uses far fewer weights than flattening all tokens into the head, which overfits 640 values.
        return self.head(self.encoder(inputs).mean(dim=1))[:, :steps]


class EncoderDecoderForecaster(Forecaster):
    """The Transformer of "Attention is all you need", for numbers: the decoder writes the forecast patch by patch.

    The decoder's input at each step is the patch before it: the last known one, then those of the targets (training:
    teacher forcing, all steps in one call under a causal mask) or its own forecasts (afterwards, one call per step).
    A step looks back at the patches before it by causal self-attention and at the encoded input by cross-attention.
    """

    def __init__(self, config: ModelConfig, layers: ModuleType = fastattn.nn) -> None:
        super().__init__(config)
        self.encoder = _SeriesEncoder(config, layers)
        self.embed = nn.Linear(config.patch, config.width)
        tokens = math.ceil(config.horizon / config.patch)
        self.position = fastattn.nn.PositionalEncoding(config.width, tokens, dropout=0.0, batch_first=True)
        layer = layers.TransformerDecoderLayer(**_layer_arguments(config))
        self.decoder = layers.TransformerDecoder(layer, config.layers, norm=nn.LayerNorm(config.width))
        self.head = nn.Linear(config.width, config.patch)

    def _forward(self, inputs: Tensor, targets: Tensor | None, steps: int) -> Tensor:
        patch = self.config.patch
        memory = self.encoder(inputs)
        previous = inputs[:, -patch:]
        tokens = math.ceil(steps / patch)
        if targets is not None:
            known = torch.cat([previous, targets[:, : (tokens - 1) * patch]], dim=1)
            return self._decode(known, memory)[:, :steps]
        for _ in range(tokens):
            previous = torch.cat([previous, self._decode(previous, memory)[:, -patch:]], dim=1)
        return previous[:, patch : patch + steps]

    def _decode(self, previous: Tensor, memory: Tensor) -> Tensor:
        """previous (N, n * patch): what is before each patch to forecast; memory (N, tokens, width).

        Returns (N, n * patch): the patches that follow each patch of `previous`.
        """
        tokens = previous.unflatten(1, (-1, self.config.patch))  # (N, n, patch)
        hidden = self.position(self.embed(tokens))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=previous.device)
        return self.head(self.decoder(hidden, memory, tgt_mask=mask, tgt_is_causal=True)).flatten(1)


class _SeriesEncoder(nn.Module):
    """Embedding of patches, positions, and a stack of encoder layers: (N, context) -> (N, context / patch, width)."""

    def __init__(self, config: ModelConfig, layers: ModuleType) -> None:
        super().__init__()
        self.patch = config.patch
        self.embed = nn.Linear(config.patch, config.width)
        # No dropout here, whatever the layers have: a token carries a number or two, and losing parts of them hurts.
        tokens = config.context // config.patch
        self.position = fastattn.nn.PositionalEncoding(config.width, tokens, dropout=0.0, batch_first=True)
        layer = layers.TransformerEncoderLayer(**_layer_arguments(config))
        norm = nn.LayerNorm(config.width)  # pre-norm layers leave their sum without a norm
        self.layers = layers.TransformerEncoder(layer, config.layers, norm=norm, enable_nested_tensor=False)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.unflatten(1, (-1, self.patch))  # (N, context / patch, patch)
        return self.layers(self.position(self.embed(tokens)))


def _layer_arguments(config: ModelConfig) -> dict[str, int | float | str | bool]:
    """Pre-norm trains without a long warm-up, post-norm (torch's default) often does not."""
    return {
        "d_model": config.width,
        "nhead": config.heads,
        "dim_feedforward": config.feedforward,
        "dropout": config.dropout,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }


def build(config: ModelConfig, layers: ModuleType = fastattn.nn) -> Forecaster:
    """The model of a configuration, freshly initialised from torch's random generator."""
    if config.kind == "lstm":
        return LSTMForecaster(config)
    if config.kind == "encoder":
        return EncoderForecaster(config, layers)
    if config.kind == "encoder-decoder":
        return EncoderDecoderForecaster(config, layers)
    raise ValueError(f"expected kind to be 'lstm', 'encoder' or 'encoder-decoder', got {config.kind!r}")

"""The blocks of torch.nn's Transformer layers, with less memory traffic and faster dropout on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional.dropout import dropout
from fastattn.nn.hooks import is_hooked

__all__ = ["DecoderBlocks", "EncoderBlocks", "drop"]


class EncoderBlocks(nn.TransformerEncoderLayer):
    """The methods of `torch.nn.TransformerEncoderLayer` that its subclasses may override."""

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return _attend(self.self_attn, self.dropout1, x, x, attn_mask, key_padding_mask, is_causal)

    def _ff_block(self, x: Tensor) -> Tensor:
        return drop(self.dropout2, _feed_forward(self, x))


class DecoderBlocks(nn.TransformerDecoderLayer):
    """The methods of `torch.nn.TransformerDecoderLayer` that its subclasses may override."""

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        return _attend(self.self_attn, self.dropout1, x, x, attn_mask, key_padding_mask, is_causal)

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
    ) -> Tensor:
        return _attend(self.multihead_attn, self.dropout2, x, mem, attn_mask, key_padding_mask, is_causal)

    def _ff_block(self, x: Tensor) -> Tensor:
        return drop(self.dropout3, _feed_forward(self, x))


def drop(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)` for a dropout layer."""
    if type(module) is not nn.Dropout or module.inplace or not module.training or is_hooked(module):
        return module(x)
    return dropout(x, module.p)


def _attend(
    attention: nn.Module, dropout: nn.Module, x: Tensor, memory: Tensor, attn_mask: Tensor | None,
    key_padding_mask: Tensor | None, is_causal: bool,
) -> Tensor:  # fmt: skip
    out = attention(
        x, memory, memory, attn_mask=attn_mask, key_padding_mask=key_padding_mask, need_weights=False,
        is_causal=is_causal,
    )  # fmt: skip
    return drop(dropout, out[0])


def _feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor) -> Tensor:
    hidden = layer.linear1(x)
    own = type(layer.linear1) is nn.Linear and not is_hooked(layer.linear1)  # nobody else holds its output
    # Not in place in a trace: TorchScript's fuser would fail at it.
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if layer.activation is F.relu and own and not traced:
        hidden = hidden.relu_()
    else:
        hidden = layer.activation(hidden)
    return layer.linear2(drop(layer.dropout, hidden))

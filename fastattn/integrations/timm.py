"""timm's ViT, Swin, Swin V2 and MaxViT attention on fastattn's operator; `fastattn.convert` uses these classes.

Relative position biases are the operator's ``bias``, one for all windows, with its gradient; the masks of shifted
windows are its ``mask``.
"""

import math

import torch
from timm.models import (  # pyright: ignore[reportMissingImports]
    maxxvit,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
)
from torch import Tensor
from torch.nn import functional as F

from fastattn.functional import scaled_dot_product_attention
from fastattn.integrations.vision import Converted, allowed_in_windows, attend, heads
from fastattn.nn.tracing import fx_leaf

__all__ = ["Attention", "Attention2d", "AttentionCl", "WindowAttention", "WindowAttentionV2"]

_COMMON = (
    "F attn_drop attn_mask dropout_p functional fused_attn is_causal k nn num_heads p permute proj proj_drop qkv "
    "reshape scale scaled_dot_product_attention shape softmax torch training transpose unbind view "
)


class Attention(Converted, vision_transformer.Attention):
    """Attention of ViT and similar models."""

    replaces = vision_transformer.Attention
    known = _COMMON + "attn_dim gate head_dim k_norm maybe_add_mask norm q_norm resolve_self_attn_mask sigmoid"

    @fx_leaf
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, C); the mask as `scaled_dot_product_attention` takes it."""
        gate = getattr(self, "gate", None)
        q, k, v = heads(self.qkv(x), 3, self.num_heads)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask, dropout_p, is_causal)
        out = out.transpose(1, 2).flatten(2)
        if hasattr(self, "norm"):
            out = self.norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


class WindowAttention(Converted, swin_transformer.WindowAttention):
    """Attention of Swin."""

    replaces = swin_transformer.WindowAttention
    known = _COMMON + "_get_rel_pos_bias expand unsqueeze"

    @fx_leaf
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B * windows, N, C), mask (windows, N, N)."""
        q, k, v = heads(self.qkv(x), 3, self.num_heads)
        dropout_p = self.attn_drop.p if self.training else 0.0
        mask = allowed_in_windows(mask, x.shape[0])
        out = attend(q, k, v, self._get_rel_pos_bias(), mask, scale=self.scale, dropout_p=dropout_p)
        return self.proj_drop(self.proj(out))


class WindowAttentionV2(Converted, swin_transformer_v2.WindowAttention):
    """Attention of Swin V2: scores are cosines times a learned scale per head."""

    replaces = swin_transformer_v2.WindowAttention
    known = _COMMON + (
        "cat clamp contiguous cpb_mlp exp k_bias linear log logit_scale math normalize q_bias qkv_bias_separate "
        "relative_coords_table relative_position_index sigmoid unsqueeze v_bias weight window_size"
    )

    @fx_leaf
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B * windows, N, C), mask (windows, N, N)."""
        bias = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = heads(F.linear(x, self.qkv.weight, bias), 3, self.num_heads)
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=math.log(100.0)).exp()
        k = F.normalize(k, dim=-1)
        dropout_p = self.attn_drop.p if self.training else 0.0
        mask = allowed_in_windows(mask, x.shape[0])
        out = attend(q, k, v, self._position_bias(), mask, scale=1.0, dropout_p=dropout_p)
        return self.proj_drop(self.proj(out))

    def _position_bias(self) -> Tensor:
        """(1, H, N, N)"""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))[None]


class AttentionCl(Converted, maxxvit.AttentionCl):
    """Attention of MaxViT and CoAtNet with channels last."""

    replaces = maxxvit.AttentionCl
    known = _COMMON + "chunk dim_head get_bias head_first rel_pos"

    @fx_leaf
    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """x (B, ..., C), shared_rel_pos (1 or B, H, N, N)."""
        qkv = self.qkv(x).flatten(1, -2)  # (B, N, channels)
        if self.head_first:
            split = qkv.unflatten(-1, (self.num_heads, 3 * self.dim_head)).transpose(1, 2)
            q, k, v = split.chunk(3, dim=3)
        else:
            q, k, v = heads(qkv, 3, self.num_heads)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attend(q, k, v, bias, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.unflatten(1, x.shape[1:-1])))


class Attention2d(Converted, maxxvit.Attention2d):
    """Attention of MaxViT and CoAtNet with channels first."""

    replaces = maxxvit.Attention2d
    known = _COMMON + "chunk contiguous dim_head get_bias head_first rel_pos"

    @fx_leaf
    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """x (B, C, height, width), shared_rel_pos (1 or B, H, N, N)."""
        qkv = self.qkv(x).flatten(2).mT.contiguous()  # (B, N, channels), so that the numbers of a head are adjacent
        if self.head_first:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3 * self.dim_head)).transpose(1, 2).chunk(3, dim=3)
        else:
            q, k, v = heads(qkv, 3, self.num_heads)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attend(q, k, v, bias, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.mT.unflatten(2, x.shape[2:])))

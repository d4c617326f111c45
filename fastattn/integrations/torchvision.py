"""torchvision's Swin, Swin V2 and MaxViT attention on fastattn's operator; `fastattn.convert` uses these classes.

Relative position biases are the operator's ``bias``, one for all windows, with its gradient; regions that a shifted
window must not mix are its ``mask``.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import maxvit, swin_transformer  # pyright: ignore[reportMissingImports]

from fastattn.integrations.vision import Converted, attend, heads
from fastattn.nn.tracing import fx_leaf

__all__ = ["RelativePositionalMultiHeadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2"]

_OF_SWIN = (
    "attention_dropout bias dropout get_relative_position_bias num_heads proj qkv shift_size shifted_window_attention "
    "training weight window_size"
)


class ShiftedWindowAttention(Converted, swin_transformer.ShiftedWindowAttention):
    """Attention of Swin."""

    replaces = swin_transformer.ShiftedWindowAttention
    known = _OF_SWIN

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x (B, height, width, C)."""
        return _in_windows(self, x, self.qkv.bias, None)


class ShiftedWindowAttentionV2(Converted, swin_transformer.ShiftedWindowAttentionV2):
    """Attention of Swin V2: scores are cosines times a learned scale per head."""

    replaces = swin_transformer.ShiftedWindowAttentionV2
    known = _OF_SWIN + " logit_scale"

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x (B, height, width, C)."""
        bias = self.qkv.bias
        if bias is not None:  # keys have none
            of_q, of_k, of_v = bias.chunk(3)
            bias = torch.cat((of_q, torch.zeros_like(of_k), of_v))
        return _in_windows(self, x, bias, self.logit_scale.clamp(max=math.log(100.0)).exp())


class RelativePositionalMultiHeadAttention(Converted, maxvit.RelativePositionalMultiHeadAttention):
    """Attention of MaxViT."""

    replaces = maxvit.RelativePositionalMultiHeadAttention
    known = (
        "F chunk einsum get_relative_positional_bias head_dim merge n_heads permute reshape scale_factor shape softmax "
        "to_qkv torch"
    )

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """x (B, windows, N, C)."""
        q, k, v = heads(self.to_qkv(x).flatten(0, 1), 3, self.n_heads)
        out = attend(q, k, v, self.get_relative_positional_bias(), scale=self.scale_factor)
        return self.merge(out.unflatten(0, x.shape[:2]))


def _in_windows(
    module: swin_transformer.ShiftedWindowAttention, x: Tensor, qkv_bias: Tensor | None, cosine_scale: Tensor | None
) -> Tensor:
    """Pad x (B, height, width, C) to whole windows, roll it by the shift, attend in windows, and undo the roll and
    padding."""
    (height, width), (wh, ww) = x.shape[1:3], module.window_size
    x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
    B, H, W, C = x.shape
    # a window as large as the image is not shifted
    down, right = (0 if size >= of else by for size, of, by in zip((wh, ww), (H, W), module.shift_size, strict=True))
    if down or right:
        x = x.roll((-down, -right), (1, 2))
    windows = x.view(B, H // wh, wh, W // ww, ww, C).transpose(2, 3).reshape(-1, wh * ww, C)

    q, k, v = heads(F.linear(windows, module.qkv.weight, qkv_bias), 3, module.num_heads)
    scale = None
    if cosine_scale is not None:
        q, k, scale = F.normalize(q, dim=-1) * cosine_scale, F.normalize(k, dim=-1), 1.0
    mask = _regions(H, W, module.window_size, (down, right), x.device, B) if down or right else None
    dropout_p = module.attention_dropout if module.training else 0.0
    out = attend(q, k, v, module.get_relative_position_bias(), mask, scale=scale, dropout_p=dropout_p)
    out = F.dropout(module.proj(out), module.dropout, module.training)

    out = out.view(B, H // wh, W // ww, wh, ww, C).transpose(2, 3).reshape(B, H, W, C)
    if down or right:
        out = out.roll((down, right), (1, 2))
    return out[:, :height, :width].contiguous()


def _regions(
    height: int, width: int, window: list[int], shift: tuple[int, int], device: torch.device, batch: int
) -> Tensor:
    """The pairs of a window that were in one region before the roll: bool (batch * windows, 1, N, N)."""

    def parts(length: int, size: int, by: int) -> Tensor:
        at = torch.arange(length, device=device)
        return (at >= length - by).long() if by else torch.zeros_like(at)

    wh, ww = window
    rows, columns = parts(height, wh, shift[0]), parts(width, ww, shift[1])
    region = 2 * rows[:, None] + columns
    region = region.view(height // wh, wh, width // ww, ww).transpose(1, 2).reshape(-1, 1, wh * ww)
    return (region == region.mT)[:, None].repeat(batch, 1, 1, 1)

"""The Transformer's encoder (Vaswani et al. 2017, section 3.1) with torch.nn's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional.padding import kept
from fastattn.nn import keywords
from fastattn.nn.attention import MultiheadAttention, adopt
from fastattn.nn.cache import KVCache
from fastattn.nn.hooks import is_hooked
from fastattn.nn.masks import check_mask_dtype
from fastattn.nn.parts import EncoderBlocks
from fastattn.nn.tracing import fx_leaf, refuse_torchscript
from fastattn.nn.transformer_stack import empty_cache, is_batch_first, is_causal_mask, next_step


class TransformerEncoderLayer(EncoderBlocks):
    """Drop-in replacement for `torch.nn.TransformerEncoderLayer`: self-attention, then a feed-forward network.

    Post-norm as in Vaswani et al. 2017, section 3.1, or with `norm_first` pre-norm (Xiong et al. 2020, figure 1).
    Subclasses may override `_sa_block` and `_ff_block`; they are called in evaluation too.
    """

    self_attn: MultiheadAttention

    @keywords.transformer
    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        adopt(self.self_attn)

    @fx_leaf
    @keywords.encode_layer
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode `src`; returns a tensor of its shape.

        Args:
            src: (N, S, E) with `batch_first`, else (S, N, E); or (S, E) unbatched.
            src_mask: (S, S) or (N*H, S, S), boolean (True = may not attend) or float (added to the scores).
            src_key_padding_mask: (N, S), or (S) unbatched, boolean (True = padding) or float.
            is_causal: the promise that `src_mask` is the causal mask; see `fastattn.nn.MultiheadAttention.forward`.
        """
        check_mask_dtype(src_key_padding_mask, "src_key_padding_mask")
        check_mask_dtype(src_mask, "src_mask")
        return self._run(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))

    def _run(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self._ff_block(x))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    def step(self, src: Tensor, cache: KVCache, layer: int = 0) -> Tensor:
        """`forward` with a causal mask for the elements that follow those in `cache`; see `TransformerEncoder.step`."""
        return self._run(src, lambda x: self.dropout1(self.self_attn.step(x, cache, layer)))

    def packed(self, src: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`forward` of sequences without padding: src (total, E), of which each starts at its entry of `cu_seqlens`."""
        return self._run(src, lambda x: self.dropout1(self.self_attn.packed(x, cu_seqlens)))


class TransformerEncoder(nn.TransformerEncoder):
    """Drop-in replacement for `torch.nn.TransformerEncoder`: a stack of copies of `encoder_layer`.

    In evaluation and without gradients padding is not encoded: with a boolean `src_key_padding_mask` and no `mask`, the
    layers give 0 there, of which the final norm makes its bias. `enable_nested_tensor=False` encodes padding like all
    else, which training always does, and a sequence that is divided among processes. On a CPU the layers then compute
    the other elements alone, in whatever place the padding stands, unless one of them has hooks, another class or
    another `self_attn`. `mask_check` is accepted and ignored.
    """

    @keywords.stack
    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        # False: no advice on what nested tensors would need.
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    @fx_leaf
    @keywords.encode
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Pass `src` through the layers and the final norm; returns a tensor of its shape.

        Args:
            src, mask, src_key_padding_mask: as `TransformerEncoderLayer.forward`.
            is_causal: whether `mask` is the causal mask. None compares it with one, as torch.nn does; on a GPU that
                waits for the device. Under `torch.compile` it cannot be compared, and None counts as False: the
                result is the same, but slower than with True.
        """
        check_mask_dtype(src_key_padding_mask, "src_key_padding_mask")
        check_mask_dtype(mask, "mask")
        causal = is_causal_mask(mask, is_causal, src, self.layers)
        padding = src_key_padding_mask
        if padding is not None and mask is None and not causal and self._leaves_out(padding, src):
            x = self._encode_kept(src, padding)
        else:
            x = self._encode(src, mask, padding, causal)
        return x if self.norm is None else self.norm(x)

    def _encode(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=causal, src_key_padding_mask=padding)
        return x

    def _leaves_out(self, padding: Tensor, src: Tensor) -> bool:
        """Whether the output at `padding` is 0."""
        if self.training or torch.is_grad_enabled() or not self.enable_nested_tensor or padding.dtype != torch.bool:
            return False
        if src.dim() != 3 or not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            return False
        sizes = src.shape[:2] if is_batch_first(self.layers) else src.shape[:2][::-1]
        return padding.shape == sizes

    def _encode_kept(self, src: Tensor, padding: Tensor) -> Tensor:
        """`_encode` with 0 at `padding`."""
        batch_first = is_batch_first(self.layers)
        rows = None
        if not torch.compiler.is_compiling() and all(map(_takes_packed, self.layers)):
            rows = kept(src, padding, batch_first)
        if rows is None:
            x = self._encode(src, None, padding, False)
            return x.masked_fill((padding if batch_first else padding.t()).unsqueeze(-1), 0.0)
        x = rows.take(src)
        for layer in self.layers:
            x = layer.packed(x, rows.cu_seqlens)  # pyright: ignore[reportCallIssue]
        return rows.put_back(x, src.shape)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    def make_cache(self, batch: int, capacity: int, kind: Callable[..., KVCache] = KVCache, **options: Any) -> KVCache:
        """An empty cache for `step`: `capacity` elements of `batch` sequences.

        kind: `KVCache`, `DynamicCache` or `PagedCache`, a subclass, or `functools.partial` of one; `options` are its
            own arguments and `dtype`. None: the dtype of the first keys.
        """
        return empty_cache(self.layers, TransformerEncoderLayer, batch, capacity, kind, options)

    def step(self, src: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """What `forward` with a causal mask gives for the elements that follow those in `cache`, and keep them there.

        Args:
            src: (N, L, E) with `batch_first`, else (L, N, E).
            cache: from `make_cache`.
            lengths: integer (N,): elements of `src` from there on are padding, and not kept.

        Returns:
            A tensor of src's shape, without gradient.
        """
        return next_step(self, src, cache, lengths)


def _takes_packed(layer: nn.Module) -> bool:
    """Whether `packed` does what calling the layer does, and nobody is to see what comes and goes inside."""
    return (
        type(layer) is TransformerEncoderLayer
        and type(layer.self_attn) is MultiheadAttention
        and layer.self_attn.takes_packed()
        and not any(module.training or is_hooked(module) for module in layer.modules())
    )

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

    Post-norm as in Vaswani et al. 2017, section 3.1, or pre-norm with `norm_first` (Xiong et al. 2020, figure 1).
    Subclasses may override `_sa_block` and `_ff_block`; evaluation calls them too.
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
            is_causal: promises that `src_mask` is the causal mask; see `fastattn.nn.MultiheadAttention.forward`.
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
        """`forward` of sequences without padding: src (total, E). Sequence i starts at `cu_seqlens[i]`."""
        return self._run(src, lambda x: self.dropout1(self.self_attn.packed(x, cu_seqlens)))


class TransformerEncoder(nn.TransformerEncoder):
    """Drop-in replacement for `torch.nn.TransformerEncoder`: a stack of copies of `encoder_layer`.

    In evaluation without gradients, a boolean `src_key_padding_mask` and no `mask` leave padding out: the layers give 0
    there, which the final norm turns into its bias. On a CPU the layers then compute the other elements alone, wherever
    the padding stands, unless a layer has hooks, another class or another `self_attn`. `enable_nested_tensor=False`
    encodes padding like all other elements. So does training, and so does a sequence that is divided among processes.
    `mask_check` has no effect.
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
        # False: torch.nn would give advice on what nested tensors need.
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
            is_causal: whether `mask` is the causal mask. None compares the two, as torch.nn does; on a GPU this waits
                for the device. `torch.compile` cannot compare them, so None counts as False there: the result is the
                same, but slower than with True.
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
        """Whether the output at padding is 0 in this call."""
        if self.training or torch.is_grad_enabled() or not self.enable_nested_tensor or padding.dtype != torch.bool:
            return False
        if src.dim() != 3 or not all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers):
            return False
        sizes = src.shape[:2] if is_batch_first(self.layers) else src.shape[:2][::-1]
        return padding.shape == sizes

    def _encode_kept(self, src: Tensor, padding: Tensor) -> Tensor:
        """`_encode` of the elements outside `padding`, with 0 at padding."""
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

        kind: `KVCache`, `DynamicCache` or `PagedCache`, a subclass, or `functools.partial` of one. `options` are its
        own arguments and `dtype`. Without a dtype, the cache takes that of the first keys.
        """
        return empty_cache(self.layers, TransformerEncoderLayer, batch, capacity, kind, options)

    def step(self, src: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Append `src` to the elements in `cache`; return what `forward` with a causal mask gives for them.

        Args:
            src: (N, L, E) with `batch_first`, else (L, N, E).
            cache: from `make_cache`.
            lengths: integer (N,): elements of `src` from there on are padding, which the cache does not keep.

        Returns:
            A tensor of src's shape, without gradient.
        """
        return next_step(self, src, cache, lengths)


def _takes_packed(layer: nn.Module) -> bool:
    """Whether `packed` does the same as calling the layer, and no hook watches its inputs and outputs."""
    return (
        type(layer) is TransformerEncoderLayer
        and type(layer.self_attn) is MultiheadAttention
        and layer.self_attn.takes_packed()
        and not any(module.training or is_hooked(module) for module in layer.modules())
    )

"""The Transformer (Vaswani et al. 2017) with torch.nn's interface, on fastattn's multi-head attention.

The classes extend torch.nn's of the same names, so constructors, parameter names, initialisation and `isinstance`
checks are torch.nn's own. What changes: attention is `fastattn.nn.MultiheadAttention`, and the same code runs in
training and evaluation. torch.nn's layers have a second implementation for evaluation, which skips overridden methods.

What torch.nn has not: `make_cache` and `step`, which decode a sequence element by element at the cost of the new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import _check as check
from fastattn.functional.padding import kept
from fastattn.nn import keywords
from fastattn.nn.attention import MultiheadAttention, adopt, check_mask_dtype
from fastattn.nn.cache import KVCache
from fastattn.nn.hooks import is_hooked
from fastattn.nn.model_cache import allocate, check_cache, escaped
from fastattn.nn.parts import DecoderBlocks, EncoderBlocks
from fastattn.nn.tracing import fx_leaf, refuse_torchscript

__all__ = [
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]


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


class TransformerDecoderLayer(DecoderBlocks):
    """Drop-in replacement for `torch.nn.TransformerDecoderLayer`: self-attention, cross-attention, feed-forward.

    Shapes and masks as in `TransformerDecoder`. Subclasses may override `_sa_block`, `_mha_block` and `_ff_block`.
    """

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention

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
        adopt(self.multihead_attn)

    forward = fx_leaf(keywords.decode(nn.TransformerDecoderLayer.forward))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    def step(self, tgt: Tensor, cache: KVCache, layer: int = 0) -> Tensor:
        """`forward` with a causal mask for the elements that follow those in `cache`; see `TransformerDecoder.step`."""
        assert cache.memory is not None
        k, v = cache.memory[layer]
        mask = None if cache.memory_mask is None else cache.memory_mask[:, None, None, :]
        x = tgt
        if self.norm_first:
            x = x + self.dropout1(self.self_attn.step(self.norm1(x), cache, layer))
            x = x + self.dropout2(self.multihead_attn.step_cross(self.norm2(x), k, v, mask))
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + self.dropout1(self.self_attn.step(x, cache, layer)))
        x = self.norm2(x + self.dropout2(self.multihead_attn.step_cross(x, k, v, mask)))
        return self.norm3(x + self._ff_block(x))

    def memory_keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`MultiheadAttention.keys_values` of the cross-attention, for a cache."""
        return self.multihead_attn.keys_values(memory)


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
        causal = _is_causal(mask, is_causal, src, self.layers)
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
        sizes = src.shape[:2] if _batch_first(self.layers) else src.shape[:2][::-1]
        return padding.shape == sizes

    def _encode_kept(self, src: Tensor, padding: Tensor) -> Tensor:
        """`_encode` with 0 at `padding`."""
        batch_first = _batch_first(self.layers)
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
        return _make_cache(self.layers, TransformerEncoderLayer, batch, capacity, kind, options)

    def step(self, src: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """What `forward` with a causal mask gives for the elements that follow those in `cache`, and keep them there.

        Args:
            src: (N, L, E) with `batch_first`, else (L, N, E).
            cache: from `make_cache`.
            lengths: integer (N,): elements of `src` from there on are padding, and not kept.

        Returns:
            A tensor of src's shape, without gradient.
        """
        return _step(self, src, cache, lengths)


class TransformerDecoder(nn.TransformerDecoder):
    """Drop-in replacement for `torch.nn.TransformerDecoder`: a stack of copies of `decoder_layer`."""

    __init__ = keywords.stack(nn.TransformerDecoder.__init__)

    @fx_leaf
    @keywords.decode
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Pass `tgt` through the layers, which attend to `memory`, and the final norm; returns a tensor of its shape.

        Args:
            tgt: (N, T, E) with `batch_first`, else (T, N, E); or (T, E) unbatched.
            memory: the encoder's output: (N, S, E), (S, N, E) or (S, E).
            tgt_mask: (T, T) or (N*H, T, T), boolean (True = may not attend) or float (added to the scores).
            memory_mask: (T, S) or (N*H, T, S), likewise.
            tgt_key_padding_mask: (N, T), or (T) unbatched, boolean (True = padding) or float.
            memory_key_padding_mask: (N, S) or (S), likewise.
            tgt_is_causal: whether `tgt_mask` is the causal mask; None as in `TransformerEncoder.forward`.
            memory_is_causal: the promise that `memory_mask` is the causal mask.
        """
        causal = _is_causal(tgt_mask, tgt_is_causal, tgt, self.layers)
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return x if self.norm is None else self.norm(x)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    @torch.no_grad()
    def make_cache(
        self,
        memory: Tensor,
        capacity: int,
        kind: Callable[..., KVCache] = KVCache,
        *,
        memory_key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> KVCache:
        """An empty cache for `step`, with the keys and values of `memory`, computed once.

        Args:
            memory: the encoder's output: (N, S, E) with `batch_first`, else (S, N, E).
            capacity: target elements per sequence.
            kind, options: as in `TransformerEncoder.make_cache`.
            memory_key_padding_mask: boolean (N, S), True = padding.
        """
        if memory.dim() != 3:
            raise ValueError(f"memory: expected 3 dimensions, got shape {tuple(memory.shape)}")
        N, S = memory.shape[:2] if _batch_first(self.layers) else memory.shape[:2][::-1]
        cache = _make_cache(self.layers, TransformerDecoderLayer, N, capacity, kind, options)
        if memory_key_padding_mask is not None:
            if memory_key_padding_mask.dtype != torch.bool:
                raise TypeError(f"memory_key_padding_mask.dtype: expected bool, got {memory_key_padding_mask.dtype}")
            if memory_key_padding_mask.shape != (N, S):
                raise ValueError(
                    f"memory_key_padding_mask.shape: expected {(N, S)}, got {tuple(memory_key_padding_mask.shape)}"
                )
            cache.memory_mask = escaped(~memory_key_padding_mask)
        pairs = [layer.memory_keys_values(memory) for layer in self.layers]  # pyright: ignore
        cache.memory = [(escaped(k), escaped(v)) for k, v in pairs]
        return cache

    def step(self, tgt: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """What `forward` with a causal mask gives for the elements that follow those in `cache`, and keep them there.

        Args:
            tgt: (N, T, E) with `batch_first`, else (T, N, E).
            cache: from `make_cache`.
            lengths: integer (N,): elements of `tgt` from there on are padding, and not kept.

        Returns:
            A tensor of tgt's shape, without gradient.
        """
        if cache.memory is None:
            raise ValueError("cache: expected one from TransformerDecoder.make_cache, got one without a memory")
        return _step(self, tgt, cache, lengths)


class Transformer(nn.Transformer):
    """Drop-in replacement for `torch.nn.Transformer`: an encoder and a decoder, without embeddings.

    Shapes and masks of `forward(src, tgt, ...)` are those of `TransformerEncoder` and `TransformerDecoder`.
    A custom encoder or decoder is used as it is.
    """

    @keywords.transformer
    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layer_args = (
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip

        def final_norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, device=device, dtype=dtype)

        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*layer_args)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, final_norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*layer_args)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, final_norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    forward = fx_leaf(keywords.translate(nn.Transformer.forward))

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)


def _is_causal(mask: Tensor | None, hint: bool | None, x: Tensor, layers: nn.ModuleList) -> bool:
    """The hint if there is one, else whether `mask` equals the causal mask for the sequence `x`."""
    if hint is not None:
        return hint
    if mask is None or x.is_nested or torch.compiler.is_compiling():  # a compiled graph cannot branch on the mask
        return False
    seq_dim = 1 if x.dim() == 3 and _batch_first(layers) else 0
    L = x.shape[seq_dim]
    if mask.shape != (L, L):
        return False
    causal_mask = nn.Transformer.generate_square_subsequent_mask(L, mask.device, mask.dtype)
    return bool((mask == causal_mask).all())


def _batch_first(layers: nn.ModuleList) -> bool:
    return layers[0].self_attn.batch_first  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def _takes_packed(layer: nn.Module) -> bool:
    """Whether `packed` does what calling the layer does, and nobody is to see what comes and goes inside."""
    return (
        type(layer) is TransformerEncoderLayer
        and type(layer.self_attn) is MultiheadAttention
        and layer.self_attn.takes_packed()
        and not any(module.training or is_hooked(module) for module in layer.modules())
    )


def _make_cache(
    layers: nn.ModuleList, kind_of_layer: type[nn.Module], batch: int, capacity: int, kind: Callable[..., KVCache],
    options: dict[str, Any],
) -> KVCache:  # fmt: skip
    for i, layer in enumerate(layers):
        changed = [
            name
            for name in ("forward", "_sa_block", "_mha_block")
            if getattr(type(layer), name, None) is not getattr(kind_of_layer, name, None)
        ]
        if not isinstance(layer, kind_of_layer) or changed:
            what = f"overrides {changed[0]}" if isinstance(layer, kind_of_layer) else f"is a {type(layer).__name__}"
            raise TypeError(f"make_cache: expected every layer to be a {kind_of_layer.__name__}, layer {i} {what}")
    attn = layers[0].self_attn
    assert isinstance(attn, MultiheadAttention)
    weight = attn.out_proj.weight
    heads = attn.num_heads if attn.own_heads is None else attn.own_heads.stop - attn.own_heads.start
    sizes = (len(layers), batch, capacity, heads, attn.head_dim)
    return allocate(kind, sizes, like=weight, model_window=None, **options)


def _step(stack: TransformerEncoder | TransformerDecoder, x: Tensor, cache: KVCache, lengths: Tensor | None) -> Tensor:
    first = stack.layers[0]
    assert isinstance(first, (TransformerEncoderLayer, TransformerDecoderLayer))
    if stack.training and first.dropout.p > 0:
        raise RuntimeError("step: expected evaluation mode, since a cache has no dropout: call eval() first")
    if x.dim() != 3:
        raise ValueError(f"step: expected 3 dimensions, got shape {tuple(x.shape)}")
    rows = x if first.self_attn.batch_first else x.transpose(0, 1)  # (N, L, E)
    length = rows.shape[1]
    check_cache(cache, len(stack.layers), rows)
    if lengths is not None:
        check.lengths("lengths", lengths, rows, length)
    cache.settle(x.device)
    cache.reserve(length)
    for i, layer in enumerate(stack.layers):
        x = layer.step(x, cache, i)  # pyright: ignore[reportCallIssue]
    cache.advance(length, lengths)
    return x if stack.norm is None else stack.norm(x)

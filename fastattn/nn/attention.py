"""Multi-head attention: torch.nn.MultiheadAttention's interface on the fused operator.

Dimensions in comments: N batch, L query length, S key length, E embedding, H heads, D = E / H.
"""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import attention, attention_varlen
from fastattn.functional.parts import attention_of_heads, for_own_heads, of_all_heads, own_part
from fastattn.nn import keywords
from fastattn.nn.cache import KVCache
from fastattn.nn.hooks import block_fast_path
from fastattn.nn.masks import attention_with_weights, check_mask_dtype, merge_masks
from fastattn.nn.tracing import fx_leaf, refuse_torchscript

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in replacement for `torch.nn.MultiheadAttention`, on `fastattn.attention`.

    Source: Vaswani et al., Attention Is All You Need, 2017 (arXiv:1706.03762), section 3.2.2.

    Constructor, parameter names, initialisation, state dict and error texts are torch.nn's: the class inherits them and
    adds only one inert hook. It differs on purpose in three points:

    - A query with nothing to attend to (for example, all keys padded) gives 0 before `out_proj` and finite gradients,
      with and without `need_weights`. torch.nn gives NaN.
    - The layer does not expand `attn_mask` and `key_padding_mask` to an (N*H, L, S) tensor. They may differ in type.
    - The layer runs the same code in training and evaluation, and no layer of torch.nn that holds it can bypass it.
    """

    own_heads: slice | None = None
    """this rank's, where `fastattn.distributed.tensor_parallel_plan` divides them; `num_heads` counts all"""
    on_shards = False
    """whether that plan divides the sequence too, outside of attention"""

    @keywords.multihead_attention
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        block_fast_path(self)

    @fx_leaf
    @keywords.attend
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: (N, L, E) with `batch_first`, else (L, N, E); or (L, E) unbatched. Any floating dtype.
            key: (N, S, kdim), (S, N, kdim) or (S, kdim).
            value: (N, S, vdim), (S, N, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S) unbatched. Boolean: True = ignore this key. Float: added to the scores.
            need_weights: also return the attention weights. They cost O(L S) memory; False takes the fused operator.
            attn_mask: (L, S) or (N*H, L, S). Boolean: True = may not attend. Float: added to the scores.
            average_attn_weights: return the weights averaged over heads.
            is_causal: promises that `attn_mask` is the causal mask (row i sees keys 0..i); `attn_mask` is then
                required. With `need_weights=False` the layer does not read the mask: the operator makes its own and
                skips the part above the diagonal. Two cases still read it: `need_weights=True`, and a layer with
                `add_bias_kv` or `add_zero_attn`, whose extra keys every query may see.

        Returns:
            The output, of the shape of `query`, and the weights after dropout: (N, L, S), or (N, H, L, S) with
            `average_attn_weights=False`, without N if unbatched. None in place of the weights with
            `need_weights=False`.

        Raises:
            AssertionError, RuntimeError: shapes or dtypes that do not fit, with torch.nn's texts.
            TypeError: nested tensors. Strided ones, which torch.nn.TransformerEncoder makes, are allowed in
                self-attention without weights and masks.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            has_mask = key_padding_mask is not None or attn_mask is not None
            if has_mask or need_weights or query is not key or key is not value:
                raise TypeError(_NO_NESTED)
            return self._forward_nested(query), None

        check_mask_dtype(key_padding_mask, "key_padding_mask")
        check_mask_dtype(attn_mask, "attn_mask")
        is_batched = F._mha_shape_check(  # pyright: ignore[reportAttributeAccessIssue]
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        self._check_embeddings(query, key, value, is_batched)

        batch_dim = 0 if self.batch_first else 1
        projected = self._project(query, key, value)
        if not is_batched:
            projected = (x.unsqueeze(batch_dim) for x in projected)
        q, k, v = map(self._split_heads, projected)  # (N, H, L, D), twice (N, H, S, D): views
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, _as_key(own_part(self.bias_k), k)], dim=2)
            v = torch.cat([v, _as_key(own_part(self.bias_v), v)], dim=2)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        extra_keys = int(self.bias_k is not None) + int(self.add_zero_attn)

        causal = is_causal and not need_weights and not extra_keys
        if not is_batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        heads = slice(0, self.num_heads) if self.own_heads is None else self.own_heads
        mask, bias = merge_masks(
            q, k, None if causal else attn_mask, key_padding_mask, extra_keys, self.num_heads, heads
        )

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attention_with_weights(q, k, v, mask, bias, dropout_p, self.num_heads, heads)
        else:
            out = attention_of_heads(
                heads.start, q, k, v, causal=causal, q_offset=0, mask=mask, bias=bias, dropout_p=dropout_p
            )

        out = self._merge_heads(out)
        if not is_batched:
            out = out.squeeze(batch_dim)
        if weights is not None:
            if self.own_heads is not None:
                weights = of_all_heads(weights, self.q_proj_weight, average_attn_weights)
            elif average_attn_weights:
                weights = weights.mean(dim=1)
            if not is_batched:
                weights = weights.squeeze(0)
        return out, weights

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)

    def step(self, x: Tensor, cache: KVCache, layer: int = 0) -> Tensor:
        """Add new elements to `cache`, and attend from them to all its elements, causally and without gradient.

        Args:
            x: (N, L, E) with `batch_first`, else (L, N, E).
            cache: it has room for L more elements; the caller counts them (`KVCache.advance`).
            layer: the index of this layer in the cache.

        Returns:
            A tensor of x's shape: what `forward` with a causal mask gives at these positions.
        """
        self._check_plain("step")
        q, k, v = (self._split_heads(t) for t in self._project(x, x, x))
        return self._merge_heads(cache.attend(layer, q, k, v, causal=True))

    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Self-attention of sequences without padding, without dropout.

        Args:
            x: (total, E), one sequence after the other.
            cu_seqlens: int32 (sequences + 1,), where each sequence starts.

        Returns:
            (total, E).
        """
        self._check_plain("packed")
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self._project(x, x, x))  # (total, H, D)
        return self.out_proj(attention_varlen(q, k, v, cu_seqlens).flatten(-2))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of (N, S, E) with `batch_first`, else (S, N, E), for `step_cross`: (N, H, S, D) each."""
        self._check_plain("keys_values")
        if self.own_heads is not None:
            _, (w_k, b_k), (w_v, b_v) = self._own_projections()
            return self._split_heads(F.linear(memory, w_k, b_k)), self._split_heads(F.linear(memory, w_v, b_v))
        E, b = self.embed_dim, self._in_proj_bias()
        k, v = F.linear(memory, self.in_proj_weight[E:], None if b is None else b[E:]).chunk(2, dim=-1)
        return self._split_heads(k), self._split_heads(v)

    def step_cross(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-attention to the results of `keys_values`. mask: boolean, broadcastable to (N, H, L, S), True takes
        part."""
        if self.own_heads is not None:
            (w, b), *_ = self._own_projections()
        else:
            E, b = self.embed_dim, self._in_proj_bias()
            w, b = self.in_proj_weight[:E], None if b is None else b[:E]
        q = F.linear(x, w, b)
        k, v = k.to(q.dtype), v.to(q.dtype)  # the caller may have made them outside autocast
        return self._merge_heads(attention(self._split_heads(q), k, v, mask=mask))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(N, L, E), or (L, N, E), as (N, H, L, D): a view."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return (x if self.batch_first else x.transpose(0, 1)).transpose(1, 2)

    def _merge_heads(self, out: Tensor) -> Tensor:
        """The inverse of `_split_heads`, and the output projection."""
        out = out.transpose(1, 2)
        return self.out_proj((out if self.batch_first else out.transpose(0, 1)).flatten(-2))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three input projections. Inputs that are the same tensor share one matrix product."""
        E = self.embed_dim
        w, b = self.in_proj_weight, self._in_proj_bias()
        if self.own_heads is not None:
            inputs = zip((query, key, value), self._own_projections(), strict=True)
            q, k, v = (F.linear(x, *projection) for x, projection in inputs)
            return q, k, v
        if w is None:  # kdim or vdim differ from embed_dim
            b_q, b_k, b_v = (None, None, None) if b is None else b.chunk(3)
            return F._in_projection(  # pyright: ignore[reportAttributeAccessIssue]
                query, key, value, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight, b_q, b_k, b_v
            )
        if query is key and key is value:
            q, k, v = F.linear(query, w, b).chunk(3, dim=-1)
            return q, k, v
        b_q, b_kv = (None, None) if b is None else b.split([E, 2 * E])
        w_q, w_kv = w.split([E, 2 * E])
        q = F.linear(query, w_q, b_q)
        if key is value:
            k, v = F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
            return q, k, v
        w_k, w_v = w_kv.chunk(2)
        b_k, b_v = (None, None) if b_kv is None else b_kv.chunk(2)
        return q, F.linear(key, w_k, b_k), F.linear(value, w_v, b_v)

    def _own_projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias for the queries, keys and values of this rank's heads, if a plan divides them."""
        assert self.own_heads is not None
        b, D = self._in_proj_bias(), self.head_dim
        own = slice(self.own_heads.start * D, self.own_heads.stop * D)
        biases = [None] * 3 if b is None else [part[own] for part in b.chunk(3)]
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [(own_part(w), b) for w, b in zip(weights, biases, strict=True)]

    def takes_packed(self) -> bool:
        """Whether `packed` gives the same as `forward` of a padded batch at the elements outside padding."""
        extra_keys = self.bias_k is not None or self.add_zero_attn
        return not (extra_keys or self.in_proj_weight is None or self.own_heads is not None or self.on_shards)

    def _check_plain(self, method: str) -> None:
        """Refuse settings that caches and packed sequences do not support."""
        differ = (self.kdim, self.vdim) != (self.embed_dim, self.embed_dim)
        if self.bias_k is not None or self.add_zero_attn or differ:
            raise ValueError(f"MultiheadAttention.{method}: expected no add_bias_kv, add_zero_attn, kdim and vdim")
        if self.on_shards:
            raise ValueError(
                f"MultiheadAttention.{method}: expected tensor_parallel_plan with sequence=False, got True"
            )

    def _in_proj_bias(self) -> Tensor | None:
        """The bias in the dtype of the weights: a checkpoint may hold it in another, and a matrix product needs equal
        dtypes."""
        b = self.in_proj_bias
        if b is None:
            return None
        b = for_own_heads(b)
        weight = self.in_proj_weight if self.in_proj_weight is not None else self.q_proj_weight
        return b if b.dtype == weight.dtype else b.to(weight.dtype)

    def _check_embeddings(self, query: Tensor, key: Tensor, value: Tensor, is_batched: bool) -> None:
        """Refuse embedding sizes that do not fit, with torch.nn's texts (which print shapes sequence first)."""

        def shape(x: Tensor) -> torch.Size:
            if not is_batched:
                return x.unsqueeze(1).shape
            return x.transpose(0, 1).shape if self.batch_first else x.shape

        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self.in_proj_weight is None:
            if key.shape[:-1] != value.shape[:-1]:
                raise AssertionError(
                    f"key's sequence and batch dims {shape(key)[:2]} do not match value's {shape(value)[:2]}"
                )
        elif key.shape != value.shape:
            raise AssertionError(f"key shape {shape(key)} does not match value shape {shape(value)}")

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Self-attention on a strided nested tensor, as torch.nn.TransformerEncoder makes them in evaluation."""
        if x.layout != torch.strided or not self.batch_first:
            raise TypeError(_NO_NESTED)
        lengths = [row.shape[0] for row in x.unbind()]
        if not any(lengths):  # every sequence is empty: there is nothing to pad or project
            return torch.nested.as_nested_tensor([self.out_proj(row) for row in x.unbind()])
        padded = x.to_padded_tensor(0.0)  # (N, L, E)
        position = torch.arange(padded.shape[1], device=x.device)
        padding = position >= torch.tensor(lengths, device=x.device)[:, None]  # (N, L)
        out, _ = self.forward(padded, padded, padded, key_padding_mask=padding, need_weights=False)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(out.unbind(), lengths, strict=True)])


_NO_NESTED = (
    "fastattn.nn.MultiheadAttention: expected query, key and value to be dense tensors, got a nested tensor. "
    "Pass a padded tensor and key_padding_mask instead."
)


def adopt(module: nn.MultiheadAttention) -> None:
    """Turn a module of exactly torch.nn's class into ours, in place: only its code changes."""
    module.__class__ = MultiheadAttention
    block_fast_path(module)


def _as_key(x: Tensor, like: Tensor) -> Tensor:
    """A learned key or value (1, 1, E) as (N, H, 1, D), to append to `like` (N, H, S, D)."""
    N, H, _, D = like.shape
    return x.view(1, H, 1, D).expand(N, H, 1, D).to(like.dtype)

"""Whole Transformers from one config each: `Encoder`, `Decoder`, `CausalLM` and `EncoderDecoder`.

Dimensions in comments: N batch, L length, S source length, E d_model, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import _check as check
from fastattn.functional import divided
from fastattn.nn import keywords
from fastattn.nn.block import Block, make_norm, positions
from fastattn.nn.cache import KVCache
from fastattn.nn.config import CausalLMConfig, EncoderDecoderConfig, TransformerConfig
from fastattn.nn.model_cache import allocate, check_cache, escaped
from fastattn.nn.position import Learned, PositionalEncoding, RoPE, Sinusoidal
from fastattn.nn.pretrained import Pretrained

__all__ = ["CausalLM", "Decoder", "Encoder", "EncoderDecoder"]


class _Stack(nn.Module):
    """Positions, blocks and a final norm."""

    def __init__(self, config: TransformerConfig, cross: bool = False) -> None:
        check.instance("config", config, TransformerConfig)
        super().__init__()
        self.config = config
        absolute = isinstance(config.position, (Learned, Sinusoidal))
        self.position = _encoding(config) if absolute else None
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, cross, layer) for layer in range(config.num_layers))
        final_norm = config.norm_first if config.final_norm is None else config.final_norm
        self.norm = make_norm(config, config.d_model) if final_norm else None
        self._initialise(residual_sums=config.num_layers * (3 if cross else 2))

    @torch.no_grad()
    def _initialise(self, residual_sums: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_in_sum = name.endswith(("out_proj", "down_proj"))
                std = self.config.init_std / math.sqrt(residual_sums) if ends_in_sum else self.config.init_std
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _run(
        self,
        x: Tensor,
        memory: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
        cache: KVCache | None = None,
        **inputs: Any,
    ) -> Tensor:
        expected = "(total, d_model)" if cu_seqlens is not None else "(batch, length, d_model)"
        if x.ndim != (2 if cu_seqlens is not None else 3) or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x.shape: expected {expected} with d_model == {self.config.d_model}, got {tuple(x.shape)}"
            )
        rope = self.config.position if isinstance(self.config.position, RoPE) else None
        rotary = None
        if rope is not None:
            rotary = rope.tables(positions(x, cu_seqlens, cache), self.config.dim_per_head, x.dtype)
        elif self.position is not None:
            if cu_seqlens is None:
                length, most = whole_length(x) + (0 if cache is None else cache.length), self.position.table.shape[0]
                if length > most:
                    raise ValueError(f"x: expected at most max_len == {most} positions, got {length}")
            x = x + self.position.at(positions(x, cu_seqlens, cache), x)
        x = self.dropout(x)
        for block in self.blocks:
            inputs_of_block = dict(inputs, rotary=rotary, cu_seqlens=cu_seqlens, cache=cache)
            if self.config.checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, memory, use_reentrant=False, **inputs_of_block)
            else:
                x = block(x, memory, **inputs_of_block)
        return x if self.norm is None else self.norm(x)


class Encoder(_Stack):
    """A stack of blocks in which every element sees every other one. Args: config: what it is made of."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    @keywords.blocks
    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Encode x; returns a tensor of its shape. What stands at padding has no meaning.

        Args:
            x: (N, L, E); or packed (total, E) with `cu_seqlens`.
            lengths: integer (N,): elements from there on are padding.
            mask: boolean (N, L), True takes part, where padding stands elsewhere.
            cu_seqlens: int32 (sequences + 1,), where each packed sequence starts: no padding is computed.
        """
        keep = padding_mask(x, lengths, mask, cu_seqlens)
        return self._run(x, None, cu_seqlens=cu_seqlens, mask=_for_keys(keep))


class Decoder(_Stack):
    """A stack of blocks in which an element sees itself and earlier ones; with `cross` also what an encoder made.

    Args:
        config: what it is made of.
        cross: with cross-attention to a `memory`.
    """

    def __init__(self, config: TransformerConfig, cross: bool = False) -> None:
        super().__init__(config, cross)
        self.cross = cross

    @keywords.blocks
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Decode x; returns a tensor of its shape. What stands at padding has no meaning.

        Args:
            x: (N, L, E), padded at the end if at all, which causal order hides; or packed (total, E) with `cu_seqlens`.
            memory: (N, S, E), or packed (total_k, E), if the decoder has cross-attention; None with a cache that
                `make_cache` filled from it.
            lengths: integer (N,), with a cache: elements of x from there on are padding, and not kept.
            memory_lengths: integer (N,): elements of `memory` from there on are padding.
            memory_mask: boolean (N, S), True takes part, where padding stands elsewhere.
            cu_seqlens: int32 (sequences + 1,), where each packed sequence starts.
            cu_seqlens_k: likewise for a packed `memory`.
            cache: from `make_cache`. x continues what is in it, and is kept in it. No gradient.
        """
        if cache is not None:
            check_cache(cache, len(self.blocks), x)
        remembered = cache is not None and cache.memory is not None
        if self.cross and (memory is None) != remembered:
            got = "None" if memory is None else "both a Tensor and a cache that has one"
            raise ValueError(f"memory: expected one, as a Tensor or in the cache, got {got}")
        if not self.cross and memory is not None:
            raise ValueError("memory: expected None for a decoder without cross-attention, got a Tensor")
        keep = padding_mask(memory, memory_lengths, memory_mask, cu_seqlens_k, "memory_")
        if cache is None:
            if lengths is not None:
                raise ValueError("lengths: expected None without a cache, since causal order hides padding at the end")
        else:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: expected None with a cache, got a Tensor")
            if self.training and self.config.dropout > 0:
                raise RuntimeError("cache: expected evaluation mode, since a cache has no dropout: call eval() first")
            if lengths is not None:
                check.lengths("lengths", lengths, x, x.shape[1])
            cache.settle(x.device)
            cache.reserve(x.shape[1])
            keep = cache.memory_mask if remembered else keep
        out = self._run(
            x, memory, causal=True, memory_mask=_for_keys(keep), cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
            cache=cache,
        )  # fmt: skip
        if cache is not None:
            cache.advance(x.shape[1], lengths)
        return out

    @torch.no_grad()
    def make_cache(
        self,
        batch: int,
        capacity: int,
        kind: Callable[..., KVCache] = KVCache,
        *,
        memory: Tensor | None = None,
        memory_lengths: Tensor | None = None,
        memory_mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> KVCache:
        """An empty cache of this decoder's shape, on its device.

        Args:
            batch: batch entries.
            capacity: tokens per entry.
            kind, options: `KVCache`, `DynamicCache`, `SlidingWindowCache` or `PagedCache`, a subclass, or
                `functools.partial` of one, and its own arguments. The `window` of a `SlidingWindowCache` is the model's
                unless given.
            memory, memory_lengths, memory_mask: as in `forward`; keys and values of `memory` are computed here, once.
            dtype: of keys and values. None: that of the first keys, which is what the layers compute in, also under
                autocast and with quantised or wrapped layers. The first keys decide about the device too.
        """
        config = self.config
        cache = allocate(
            kind, (config.num_layers, batch, capacity, self._kv_heads(), config.dim_per_head),
            like=next(self.parameters()), model_window=None if config.window is None else config.window[0], dtype=dtype,
            **options,
        )  # fmt: skip
        if self.cross:
            if memory is None:
                raise ValueError("memory: expected a Tensor for a decoder with cross-attention, got None")
            pairs = [block.memory_keys_values(memory) for block in self.blocks]  # pyright: ignore
            cache.memory = [(escaped(k.transpose(1, 2)), escaped(v.transpose(1, 2))) for k, v in pairs]
            keep = padding_mask(memory, memory_lengths, memory_mask, None, "memory_")
            cache.memory_mask = None if keep is None else escaped(keep)
        return cache

    def _kv_heads(self) -> int:
        """Those of this rank, where a plan divides them."""
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.self_attn.num_kv_heads


class CausalLM(Pretrained):
    """A decoder-only language model, in the manner of GPT and Llama.

    `model(tokens, labels=tokens)` is its training loss, and `fastattn.generate(model, prompt, max_new_tokens)` its use.
    """

    config_class = CausalLMConfig

    def __init__(self, config: CausalLMConfig) -> None:
        check.instance("config", config, CausalLMConfig)
        super().__init__()
        self.config = config
        self.embedding = _embedding(config.vocab_size, config.d_model, config.init_std)
        self.decoder = Decoder(config)
        self.head = _head(self.embedding, config.vocab_size, config.init_std, config.tie_embeddings)

    def _output_embedding(self) -> nn.Embedding:
        return self.embedding

    @keywords.blocks
    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits of what comes after each token, or with `labels` the loss.

        Args:
            tokens: (N, L) integer; packed (total,) with `cu_seqlens`.
            labels: integer of the shape of `tokens`, and in step with them, so that `tokens` themselves will do; -100
                leaves an element out, padding for example.
            lengths, cu_seqlens, cache: as in `Decoder.forward`.
            last: logits after the last element of each row alone, before padding; not with packed input.

        Returns:
            (N, L, V), with `last` (N, 1, V); packed (total, V). With `labels` the mean cross-entropy, in nats, of every
            element given those before it in its sequence: one number, in float32 at least.
        """
        h = self._hidden(tokens, lengths=lengths, cu_seqlens=cu_seqlens, cache=cache)
        if labels is not None:
            if cache is not None or last:
                raise ValueError("labels: expected None with a cache and with last, got a Tensor")
            return next_token_loss(self.head(h), tokens, labels, cu_seqlens)
        if last and cu_seqlens is not None:
            raise ValueError("last: expected False with cu_seqlens, got True")
        return self.head(last_elements(h, lengths) if last else h)

    def hidden(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """What `head` makes logits of: (N, L) -> (N, L, E). The arguments are those of `forward`."""
        return self._hidden(tokens, **inputs)

    def _hidden(self, tokens: Tensor, **inputs: Any) -> Tensor:  # `forward` calls no method that FSDP may wrap
        x = _embed("tokens", self.embedding, tokens, self.config.scale_embeddings)
        return self.decoder(x, **inputs)

    def prefill(self, tokens: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Put a prompt into the cache, in as many steps as the cache needs; the logits after its last token.

        Args:
            tokens: (N, L) integer, padded at the end.
            cache: from `make_cache`.
            lengths: integer (N,), tokens before the padding, at least 1. None: all.

        Returns:
            (N, V).
        """
        return prefill(self, tokens, cache, lengths)

    def make_cache(self, batch: int, capacity: int, kind: Callable[..., KVCache] = KVCache, **options: Any) -> KVCache:
        """An empty cache; the arguments are those of `Decoder.make_cache`."""
        return self.decoder.make_cache(batch, capacity, kind, **options)


class EncoderDecoder(Pretrained):
    """A sequence-to-sequence model (Vaswani et al. 2017, figure 1): source tokens in, target tokens out.

    Trained by teacher forcing: `F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())`.
    `fastattn.generate(model, source, max_new_tokens, start=bos)` is its use.
    """

    config_class = EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig) -> None:
        check.instance("config", config, EncoderDecoderConfig)
        super().__init__()
        self.config = config
        d_model, init_std = config.decoder.d_model, config.decoder.init_std
        shared = config.target_vocab_size is None
        target_vocab_size = config.source_vocab_size if shared else config.target_vocab_size
        assert target_vocab_size is not None
        self.source_embedding = _embedding(config.source_vocab_size, d_model, init_std)
        self.target_embedding = self.source_embedding if shared else _embedding(target_vocab_size, d_model, init_std)
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config.decoder, cross=True)
        self.head = _head(self.target_embedding, target_vocab_size, init_std, config.tie_embeddings)

    def _output_embedding(self) -> nn.Embedding:
        return self.target_embedding

    @keywords.blocks
    def forward(
        self,
        source: Tensor | None,
        target: Tensor,
        *,
        source_lengths: Tensor | None = None,
        source_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_source: Tensor | None = None,
        lengths: Tensor | None = None,
        cache: KVCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits of what comes after each target token.

        Args:
            source: (N, S) integer; or packed (total_source,) with `cu_seqlens_source`; None with a `cache`.
            target: (N, L) integer, padded at the end if at all; or packed (total,) with `cu_seqlens`.
            source_lengths: integer (N,): source tokens from there on are padding.
            source_mask: boolean (N, S), True takes part, where padding stands elsewhere.
            cu_seqlens, cu_seqlens_source: int32 (sequences + 1,), where each packed sequence starts.
            lengths, cache: as in `Decoder.forward`; the cache has what the encoder made.
            last: logits after the last element of each row alone, before padding; not with packed input.

        Returns:
            (N, L, V), with `last` (N, 1, V); or (total, V).
        """
        if last and cu_seqlens is not None:
            raise ValueError("last: expected False with cu_seqlens, got True")
        if (source is None) != (cache is not None):
            got = "None without a cache" if source is None else "a Tensor with a cache, which has what it needs of it"
            raise ValueError(f"source: expected a Tensor or a cache, got {got}")
        if source is None:
            h = self._hidden(target, lengths=lengths, cache=cache)
            return self.head(last_elements(h, lengths) if last else h)
        check.tokens("source", source)
        if source_lengths is not None and source_mask is None and cu_seqlens_source is None and source.ndim == 2:
            check.lengths("source_lengths", source_lengths, source, whole_length(source))
        memory = self._encode(source, lengths=source_lengths, mask=source_mask, cu_seqlens=cu_seqlens_source)
        h = self._hidden(
            target, memory=memory, memory_lengths=source_lengths, memory_mask=source_mask, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_source, lengths=lengths,
        )  # fmt: skip
        return self.head(last_elements(h, None) if last else h)

    def encode(self, source: Tensor, **inputs: Any) -> Tensor:
        """(N, S) -> (N, S, E). The arguments are those of `Encoder.forward`."""
        return self._encode(source, **inputs)

    def _encode(self, source: Tensor, **inputs: Any) -> Tensor:
        return self.encoder(_embed("source", self.source_embedding, source, self.config.scale_embeddings), **inputs)

    def decode(self, target: Tensor, memory: Tensor | None = None, **inputs: Any) -> Tensor:
        """Logits (N, L, V) of what comes after each target token. The arguments are those of `Decoder.forward`."""
        return self.head(self._hidden(target, memory=memory, **inputs))

    def hidden(self, target: Tensor, **inputs: Any) -> Tensor:
        """What `head` makes logits of: (N, L) -> (N, L, E). The arguments are those of `Decoder.forward`."""
        return self._hidden(target, **inputs)

    def _hidden(self, target: Tensor, **inputs: Any) -> Tensor:
        return self.decoder(_embed("target", self.target_embedding, target, self.config.scale_embeddings), **inputs)

    def prefill(self, target: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """As `CausalLM.prefill`, for target tokens and a cache that has the memory."""
        return prefill(functools.partial(self, None), target, cache, lengths)

    def make_cache(self, batch: int, capacity: int, kind: Callable[..., KVCache] = KVCache, **options: Any) -> KVCache:
        """An empty cache with keys and values of a `memory`; the arguments are those of `Decoder.make_cache`."""
        return self.decoder.make_cache(batch, capacity, kind, **options)


def prefill(model: Callable[..., Tensor], tokens: Tensor, cache: KVCache, lengths: Tensor | None) -> Tensor:
    """Pass a prompt (N, L) through `model` by chunks of what the cache takes: logits after the last token, (N, V)."""
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens.shape: expected (batch, length) with a length of 1 or more, got {tuple(tokens.shape)}"
        )
    if lengths is not None:
        check.lengths("lengths", lengths, tokens, tokens.shape[1], least=1)
    step = tokens.shape[1] if cache.chunk is None else cache.chunk
    result: Tensor | None = None
    for start in range(0, tokens.shape[1], step):
        chunk = tokens[:, start : start + step]
        kept = None if lengths is None else (lengths - start).clamp(0, chunk.shape[1])
        logits = model(chunk, cache=cache, lengths=kept, last=True)[:, 0]
        result = logits if result is None or kept is None else torch.where((kept > 0)[:, None], logits, result)
    assert result is not None
    return result


def last_elements(h: Tensor, lengths: Tensor | None) -> Tensor:
    """The last element of each row of h (N, L, E) before its padding: (N, 1, E)."""
    divided.refuse("last", "True")
    if lengths is None:
        return h[:, -1:]
    return h[torch.arange(h.shape[0], device=h.device), (lengths - 1).clamp(min=0)][:, None]


def next_token_loss(logits: Tensor, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Mean cross-entropy of labels (N, L), or packed (total,), by the logits one element before."""
    check.tokens("labels", labels)
    if labels.shape != tokens.shape:
        raise ValueError(f"labels.shape: expected tokens.shape == {tuple(tokens.shape)}, got {tuple(labels.shape)}")
    division = divided.current()
    if cu_seqlens is not None and division is None:  # nothing says what a sequence begins with
        labels = labels.index_fill(0, cu_seqlens[:-1].long().clamp(max=labels.shape[0] - 1), -100)
    if division is None:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    else:
        labels = division.next_labels(labels, cu_seqlens)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits, labels = logits.flatten(0, -2), labels.flatten().long()
    if division is None:
        return F.cross_entropy(logits, labels, ignore_index=-100)
    return division.mean(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), (labels != -100).sum())


def padding_mask(
    x: Tensor | None, lengths: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, prefix: str = ""
) -> Tensor | None:
    """What takes part of x (N, S, E), boolean (N, S), or None for everything; from one of three descriptions."""
    given = [f"{prefix}lengths"] * (lengths is not None) + [f"{prefix}mask"] * (mask is not None)
    given += [f"{prefix}cu_seqlens"] * (cu_seqlens is not None)
    if len(given) > 1:
        raise ValueError(f"{given[-1]}: expected one description of padding, got {' and '.join(given)}")
    if x is None or (lengths is None and mask is None):
        return None
    if lengths is not None:
        check.lengths(given[0], lengths, x, whole_length(x))
        return positions(x) < lengths[:, None]
    if not isinstance(mask, Tensor):
        raise TypeError(f"{given[0]}: expected a Tensor or None, got {type(mask).__name__}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{given[0]}.shape: expected {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{given[0]}.dtype: expected bool, True takes part, got {mask.dtype}")
    return mask


def whole_length(x: Tensor) -> int:
    """The length of x (N, L, ...), of which context parallelism may leave a part here."""
    division = divided.current()
    return x.shape[1] if division is None else division.whole(x.shape[1])


def _for_keys(keep: Tensor | None) -> Tensor | None:
    """(N, S) as the mask (N, 1, 1, S) of every head and query."""
    return None if keep is None else keep[:, None, None, :]


def _encoding(config: TransformerConfig) -> PositionalEncoding:
    kind = "learned" if isinstance(config.position, Learned) else "sinusoidal"
    assert isinstance(config.position, (Learned, Sinusoidal))
    return PositionalEncoding(config.d_model, config.position.max_len, 0.0, kind, batch_first=True)


def _embedding(vocab_size: int, d_model: int, init_std: float) -> nn.Embedding:
    embedding = nn.Embedding(vocab_size, d_model)
    nn.init.normal_(embedding.weight, std=init_std)
    return embedding


def _embed(name: str, embedding: nn.Embedding, tokens: Tensor, scale: bool) -> Tensor:
    check.tokens(name, tokens)
    if torch.compiler.is_compiling():
        x = embedding(tokens)
    else:
        try:
            x = embedding(tokens)
        except IndexError as error:  # on the CPU; elsewhere nothing is known before the device has computed
            size, found = embedding.num_embeddings, sorted(tokens.unique().tolist())
            wrong = next(token for token in found if not 0 <= token < size)
            raise ValueError(f"{name}: expected tokens from 0 to {size - 1}, got {wrong}") from error
    return x * math.sqrt(embedding.embedding_dim) if scale else x


def _head(embedding: nn.Embedding, vocab_size: int, init_std: float, tied: bool) -> nn.Linear:
    head = nn.Linear(embedding.embedding_dim, vocab_size, bias=False)
    if tied:
        head.weight = embedding.weight
    else:
        nn.init.normal_(head.weight, std=init_std)
    return head

"""Whole models, from tokens to logits, each built from one config: `CausalLM` and `EncoderDecoder`.

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

from fastattn import _check as check
from fastattn.functional import divided
from fastattn.nn import keywords
from fastattn.nn.cache import KVCache
from fastattn.nn.config import CausalLMConfig, EncoderDecoderConfig
from fastattn.nn.pretrained import Pretrained
from fastattn.nn.stack import Decoder, Encoder, whole_length

__all__ = ["CausalLM", "EncoderDecoder"]

IGNORED = -100
"""The label that the loss ignores; PyTorch's default."""


class CausalLM(Pretrained):
    """A decoder-only language model like GPT and Llama.

    `model(tokens, labels=tokens)` returns the training loss. `fastattn.generate(model, prompt, max_new_tokens)`
    generates text.
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
        """Logits of the token that follows each token, or with `labels` the loss.

        Args:
            tokens: (N, L) integer; packed (total,) with `cu_seqlens`.
            labels: integer, of the shape of `tokens` and aligned with them, so that `tokens` themselves will do. -100
                leaves an element out, for example padding.
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

    def _hidden(self, tokens: Tensor, **inputs: Any) -> Tensor:  # FSDP may wrap public methods, so `forward` calls none
        x = _embed("tokens", self.embedding, tokens, self.config.scale_embeddings)
        return self.decoder(x, **inputs)

    def prefill(self, tokens: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Put a prompt into the cache, in as many steps as the cache needs; return the logits after its last token.

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

    Train it by teacher forcing: `model(source, target[:, :-1])` gives the logits of `target[:, 1:]`. Decode with
    `fastattn.generate(model, source, max_new_tokens, start=bos)`.
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
        """Logits of the token that follows each target token.

        Args:
            source: (N, S) integer; or packed (total_source,) with `cu_seqlens_source`; None with a `cache`.
            target: (N, L) integer, padded at the end if at all; or packed (total,) with `cu_seqlens`.
            source_lengths: integer (N,): source tokens from there on are padding.
            source_mask: boolean (N, S), True takes part: for padding that is not at the end.
            cu_seqlens, cu_seqlens_source: int32 (sequences + 1,), where each packed sequence starts.
            lengths, cache: as in `Decoder.forward`; the cache holds the encoder's output.
            last: logits after the last element of each row alone, before padding; not with packed input.

        Returns:
            (N, L, V), with `last` (N, 1, V); or (total, V).
        """
        if last and cu_seqlens is not None:
            raise ValueError("last: expected False with cu_seqlens, got True")
        if (source is None) != (cache is not None):
            got = "None without a cache" if source is None else "a Tensor and a cache, which holds the encoder's output"
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
        """Logits (N, L, V) of the token that follows each target token. The arguments are those of
        `Decoder.forward`."""
        return self.head(self._hidden(target, memory=memory, **inputs))

    def hidden(self, target: Tensor, **inputs: Any) -> Tensor:
        """What `head` makes logits of: (N, L) -> (N, L, E). The arguments are those of `Decoder.forward`."""
        return self._hidden(target, **inputs)

    def _hidden(self, target: Tensor, **inputs: Any) -> Tensor:
        return self.decoder(_embed("target", self.target_embedding, target, self.config.scale_embeddings), **inputs)

    def prefill(self, target: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """Like `CausalLM.prefill`, for target tokens and a cache that holds the memory."""
        return prefill(functools.partial(self, None), target, cache, lengths)

    def make_cache(self, batch: int, capacity: int, kind: Callable[..., KVCache] = KVCache, **options: Any) -> KVCache:
        """A cache without target tokens, with the keys and values of a `memory`; the arguments are those of
        `Decoder.make_cache`."""
        return self.decoder.make_cache(batch, capacity, kind, **options)


def prefill(model: Callable[..., Tensor], tokens: Tensor, cache: KVCache, lengths: Tensor | None) -> Tensor:
    """Pass a prompt (N, L) through `model` in chunks that the cache accepts; return the logits after the last token,
    (N, V)."""
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
    """Mean cross-entropy of labels (N, L), or packed (total,), each against the logits one element earlier."""
    check.tokens("labels", labels)
    if labels.shape != tokens.shape:
        raise ValueError(f"labels.shape: expected tokens.shape == {tuple(tokens.shape)}, got {tuple(labels.shape)}")
    division = divided.current()
    labels = (next_labels if division is None else division.next_labels)(labels, cu_seqlens)
    # Labels move and logits stay, because a part of the logits would be a copy.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits, labels = logits.flatten(0, -2), labels.flatten().long()
    if division is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return division.mean(total, (labels != IGNORED).sum())


def next_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label that follows each token's; `IGNORED` after the last token of each sequence. labels: whole, (..., L)."""
    following = F.pad(labels, (0, 1), value=IGNORED)
    if cu_seqlens is not None:  # nothing precedes the first token of a sequence; one that is empty may begin at L
        following = following.index_fill(-1, cu_seqlens.long(), IGNORED)
    return following[..., 1:]


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
        except IndexError as error:  # only the CPU raises this; a GPU reports nothing until it has computed
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

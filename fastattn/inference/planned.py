"""The decode step of a `CausalLM` on a CPU as one call of the library: planned once, then run on token after token.

A step of a small model consists of some hundred small operations; Python and PyTorch's dispatcher take longer for them
than their arithmetic does. The plan holds all of them, with the addresses of their tensors. Like a CUDA graph it stays
with the model as it was when the search began; it does see in-place changes of parameters.

Dimensions in comments: N rows, E d_model, H query heads, K key heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastattn.functional.program import Program, at_once, reason_against
from fastattn.nn import ALiBi, CausalLM, Decoder, DynamicCache, KVCache, PagedCache, RoPE, SlidingWindowCache
from fastattn.nn.block import Attention, Block, FeedForward, HeadNorm, RMSNorm

__all__ = ["PlannedStep", "reason_against_plan"]

_MODULES = (
    CausalLM, Decoder, Block, Attention, FeedForward, HeadNorm, RMSNorm, nn.Embedding, nn.Linear, nn.Dropout,
    nn.Identity, nn.ModuleList,
)  # fmt: skip
_CACHES = (KVCache, DynamicCache, PagedCache, SlidingWindowCache)
_MOST_GROUPED = 16  # query heads of a key head: more are served by the kernel with taller tiles


def reason_against_plan(model: object, cache: KVCache, rows: int) -> str | None:
    """Why the decode steps of this model over this cache cannot be planned; None if they can."""
    if type(model) is not CausalLM:
        return f"the model is a {type(model).__name__}"
    config = model.config
    if config.norm != "rms" or config.activation != "swiglu":
        return f"norm 'rms' and activation 'swiglu' are planned, the model has {config.norm!r}, {config.activation!r}"
    if not isinstance(config.position, (RoPE, ALiBi, type(None))):
        return f"the model has {type(config.position).__name__} positions"
    if config.num_heads > _MOST_GROUPED * config.kv_heads:
        return f"a key head has more than {_MOST_GROUPED} query heads"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "there are hooks on all modules"
    for name, module in model.named_modules():
        if type(module) not in _MODULES:
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name or 'the model'} has hooks"
        if module._compiled_call_impl is not None:
            return f"{name} is compiled"
    if cache.batch_invariant == "rows":
        return "batch_invariant is 'rows'"
    parameters = list(model.parameters())
    if type(cache) not in _CACHES or any(x.dtype != parameters[0].dtype or not x.is_cpu for x in cache.k):
        return "the cache is of another kind"
    return reason_against(parameters, rows)


class PlannedStep:
    """Logits of the next token from the last one, over a cache.

    Args:
        model, cache: accepted by `reason_against_plan`. The cache holds the prompt.
    """

    @torch.inference_mode(False)  # its buffers are written to in every mode
    @torch.no_grad()
    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        config = model.config
        options: dict[str, Any] = {"dtype": model.head.weight.dtype}
        N, E, D = cache.batch, config.d_model, config.dim_per_head
        H, K = config.num_heads, config.kv_heads
        self._lens = cache.lens.to(torch.int64, copy=True)
        self._x = torch.empty(N, E, **options)
        self._normed = torch.empty(N, E, **options)
        self._heads = torch.empty(N, H + 2 * K, D, **options)
        self._out = torch.empty(N, H * D, **options)
        self._hidden = torch.empty(N, config.ff_dim, **options)
        self._logits = torch.empty(N, config.vocab_size, **options)
        self._scale = math.sqrt(E) if config.scale_embeddings else 1.0
        self._tables: tuple[Tensor, Tensor] | None = None
        if isinstance(config.position, RoPE):
            self._tables = config.position.tables(torch.arange(cache.capacity), D)
        self._buffers = [*cache.k, *cache.v, cache.block_table]

        self._program = Program()
        for block in model.decoder.blocks:
            assert isinstance(block, Block)
            self._plan_attention(block)
            self._plan_feed_forward(block)
        h = self._x
        if model.decoder.norm is not None:
            h = self._normed
            self._plan_norm(h, self._x, model.decoder.norm)
        self._plan_linear(self._logits, h, model.head)

    def current(self) -> bool:
        """Whether the plan still fits: the cache kept its buffers, and nothing has begun to record operators."""
        cache = self._cache
        buffers = [*cache.k, *cache.v, cache.block_table]
        same = len(buffers) == len(self._buffers) and all(map(lambda a, b: a is b, buffers, self._buffers))
        return same and self._program.current() and at_once()

    def __call__(self, token: Tensor, kept: Tensor | None) -> Tensor:
        """Logits (N, V), which the next call overwrites, after ``token`` (N,); ``kept`` (N,) tells the rows that take
        part, None: all."""
        self._lens.copy_(self._cache.lens)
        torch.index_select(self._model.embedding.weight.detach(), 0, token, out=self._x)
        if self._scale != 1.0:
            self._x *= self._scale
        self._program.run()
        self._cache.advance(1, None if kept is None else kept.int())
        return self._logits

    def _plan_attention(self, block: Block) -> None:
        attn, cache = block.self_attn, self._cache
        N, H, K = cache.batch, attn.num_heads, attn.num_kv_heads
        x = self._plan_input(block.self_norm, block.norm_first)
        self._plan_linear(self._heads.flatten(1), x, attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = self._heads.split((H, K, K), dim=1)  # (N, H or K, D)
        for heads, norm in ((q, attn.q_norm), (k, attn.k_norm)):
            if norm is not None:
                self._plan_norm(heads, heads, norm)
        if self._tables is not None:
            self._program.rotate(self._heads[:, : H + K], *self._tables, self._lens)
        slopes = attn.alibi_slopes
        if slopes is None and attn.alibi is not None:
            slopes = attn.alibi.slopes(H)
        self._program.attention_with_kvcache(
            self._out.view(N, H, 1, -1), q.unsqueeze(2), cache.k[attn.layer], cache.v[attn.layer], k.unsqueeze(2),
            v.unsqueeze(2), cache_lens=self._lens, block_table=cache.block_table, window=attn.window,
            softcap=attn.softcap, alibi_slopes=slopes, sinks=attn.sinks,
        )  # fmt: skip
        self._plan_linear(self._x, self._out, attn.out_proj, add=True)
        self._plan_output(block.self_norm, block.norm_first)

    def _plan_feed_forward(self, block: Block) -> None:
        part = block.feed_forward
        assert part.gate_proj is not None
        x = self._plan_input(block.feed_forward_norm, block.norm_first)
        self._plan_linear(self._hidden, x, part.gate_proj, part.up_proj, gated=True)
        self._plan_linear(self._x, self._hidden, part.down_proj, add=True)
        self._plan_output(block.feed_forward_norm, block.norm_first)

    def _plan_input(self, norm: nn.Module | None, norm_first: bool) -> Tensor:
        if not norm_first:
            return self._x
        self._plan_norm(self._normed, self._x, norm)
        return self._normed

    def _plan_output(self, norm: nn.Module | None, norm_first: bool) -> None:
        if not norm_first:
            self._plan_norm(self._x, self._x, norm)

    def _plan_norm(self, y: Tensor, x: Tensor, norm: nn.Module | None) -> None:
        assert isinstance(norm, nn.RMSNorm) and norm.eps is not None
        self._program.rms_norm(y, x, norm.weight, norm.eps)

    def _plan_linear(self, y: Tensor, x: Tensor, *layers: nn.Linear, gated: bool = False, add: bool = False) -> None:
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        self._program.linear(y, x, weights, biases, gated=gated, add=add)

"""Run unchanged models on a sequence that is divided among ranks."""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel.style import ParallelStyle

from fastattn.distributed.agreement import check_how
from fastattn.distributed.comm import Ranks
from fastattn.distributed.context import attention_of_heads
from fastattn.distributed.cost import Link, Strategy
from fastattn.distributed.layout import Balance, length_of
from fastattn.distributed.shards import cut_of, positions, shard, unshard
from fastattn.functional import divided
from fastattn.nn.model import next_labels


def context_parallel(
    mesh: DeviceMesh,
    *,
    strategy: Strategy | None = None,
    balance: Balance = "contiguous",
    link: Link | None = None,
    timeout: float | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Inside ``with``, every call of `fastattn.attention` is `context_parallel_attention` over the ranks of a mesh.

    This covers the layers of `fastattn.nn`, models after `fastattn.convert`, `fastattn.compat`, and models of
    transformers with ``attn_implementation="fastattn"``. Give models this rank's tokens, as `shard` or `shard_batch`
    cuts them. Layers of `fastattn.nn` count positions and ``lengths`` in the whole. Ranks complete a mask over keys
    alone, (B, 1, 1, this rank's keys). A ``block_mask`` is that of the whole. ``CausalLM(tokens, labels=...)`` returns
    the loss of the whole on every rank; average its gradients over the ranks, as data parallelism does. Run a backward
    pass that recomputes (activation checkpointing) inside the block too. KV caches and attention weights are errors.

    Args:
        mesh, strategy, balance, link, timeout: as in `context_parallel_attention`.

    Raises:
        TypeError, ValueError: the mesh, strategy or balance is not supported.
    """
    return divided.entered(_Division(mesh, strategy, balance, link, timeout))


class ContextParallel(ParallelStyle):
    """`context_parallel` as a style for PyTorch's `parallelize_module`.

    ``parallelize_module(model, mesh["cp"], ContextParallel(balance="zigzag"))`` puts every call of the model or of a
    part of it inside `context_parallel`, even a recomputation by activation checkpointing. It works in place and leaves
    parameters and state dict as they are.

    Args:
        strategy, balance, link, timeout: as in `context_parallel`.
    """

    def __init__(
        self,
        *,
        strategy: Strategy | None = None,
        balance: Balance = "contiguous",
        link: Link | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__()
        self._how = (strategy, balance, link, timeout)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        division = _Division(device_mesh, *self._how)

        def enter(*_: Any) -> None:
            divided.enter(division)

        def leave(*_: Any) -> None:
            divided.leave(division)

        for part in (module, *(x for x in module.modules() if x is not module and next(x.children(), None))):
            part.register_forward_pre_hook(enter)
            part.register_forward_hook(leave, always_call=True)
        return module


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _not_compiled(function: _Function) -> _Function:
    """Messages between processes are not part of a compiled graph, which breaks before them and resumes after them."""
    return cast(_Function, torch.compiler.disable(function))


class _Division:
    """`fastattn.functional.divided.Division` by the ranks of a mesh."""

    def __init__(
        self, mesh: DeviceMesh, strategy: Strategy | None, balance: Balance, link: Link | None, timeout: float | None
    ) -> None:
        check_how(strategy, balance)
        self._peers = Ranks(mesh, timeout)
        self._where: dict[str, Any] = {"mesh": mesh, "balance": balance}
        self._how = {**self._where, "strategy": strategy, "link": link, "timeout": timeout}
        self._timeout = timeout

    @_not_compiled
    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, first_head: int = 0, **options: Any) -> Any:
        mask = options.get("mask")
        if isinstance(mask, Tensor) and mask.ndim > 1 and mask.shape[-2] == 1 and mask.shape[-1] in (1, k.shape[2]):
            own = mask.expand(*mask.shape[:-1], k.shape[2])  # over keys alone; this rank has its own keys' part
            options["mask"] = unshard(own, dim=-1, timeout=self._timeout, **self._where)
        return attention_of_heads(first_head, q, k, v, **options, **self._how)

    @_not_compiled
    def attention_varlen(self, q: Tensor, k: Tensor, v: Tensor, *, first_head: int = 0, **options: Any) -> Any:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        found = attention_of_heads(first_head, q, k, v, **options, **self._how)
        if isinstance(found, tuple):
            return found[0].squeeze(0).transpose(0, 1), found[1].squeeze(0)
        return found.squeeze(0).transpose(0, 1)

    @_not_compiled
    def whole(self, length: int, cu_seqlens: Tensor | None = None) -> int:
        lengths = [numbers[0] for numbers, _ in self._peers.headers([length], "")]
        cut = cut_of(self._where["balance"], sum(lengths), self._peers.size, cu_seqlens)
        expected = [length_of(own) for own in cut]
        if lengths != expected:
            raise ValueError(
                f"tokens: expected {expected} on ranks 0 to {len(lengths) - 1}, as shard cuts them with balance="
                f"{self._where['balance']!r}, got {lengths}"
            )
        return sum(lengths)

    @_not_compiled
    def positions(self, length: int, device: torch.device, cu_seqlens: Tensor | None = None) -> Tensor:
        whole = self.whole(length, cu_seqlens)
        return positions(whole, cu_seqlens=cu_seqlens, **self._where).to(device)

    @_not_compiled
    def next_labels(self, labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        how = {"dim": -1, "cu_seqlens": cu_seqlens, **self._where}
        whole = unshard(labels, timeout=self._timeout, **how)
        return shard(next_labels(whole, cu_seqlens), **how)

    @_not_compiled
    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        own = torch.stack([total.detach().double(), count.double()])
        totals, counts = torch.stack(self._peers.gather(own)).unbind(1)
        return _Mean.apply(total, totals.sum() / counts.sum(), self._peers.size / counts.sum())  # pyright: ignore[reportReturnType]


class _Mean(torch.autograd.Function):
    """The mean of the whole, the same on every rank. Its gradient is that of a rank's share, times the number of
    ranks."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, mean: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return mean.to(total.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return gradient * weight.to(gradient.dtype), None, None

"""Decode steps as a CUDA graph: captured once, then replayed without the host's work for each kernel of each layer.

A step has the same kernels, shapes and addresses every time: the caches' buffers stay in place, and kernels read the
lengths on the device. The host's own count moves on by `KVCache.count` after each replay.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastattn.inference.planned import PlannedStep, reason_against_plan
from fastattn.nn import CausalLM, KVCache

__all__ = ["DecodeSteps", "reason_against"]

DEVICES = ("cuda",)
LEAST_STEPS = 16
"""Fewer steps are not worth a capture, which costs about as much host time as a few steps."""


def capture(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """(what runs the kernels of ``call`` again, its result, which each replay writes anew); nothing runs yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def reason_against(model: nn.Module, wanted: bool, compiled: bool, device: torch.device, steps: int) -> str | None:
    """Why this model's ``steps`` decode steps should be launched one by one; None if a graph may serve them."""
    if not wanted:
        return "cuda_graph is False"
    if device.type not in DEVICES:
        return f"the tokens are on {device.type!r}, which has no CUDA graphs"
    if steps < LEAST_STEPS:
        return f"a capture pays from {LEAST_STEPS} steps after the prompt's on, here are {steps}"
    if compiled:
        return "torch.compile makes its own graphs, with mode='reduce-overhead'"
    if torch.is_autocast_enabled(device.type):
        return "autocast keeps casts of weights, which a graph would own"
    devices = sorted({str(x.device) for x in model.parameters()})
    if len(devices) > 1:
        return f"the model is on several devices: {', '.join(devices)}"
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            return f"{name} is compiled, and torch.compile makes its own graphs, with mode='reduce-overhead'"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has forward hooks, which a replay would leave out"
    return None


class DecodeSteps:
    """The steps after the prompt's, over one cache.

    Args:
        step: (tokens (N, 1), cache=, lengths=) -> logits (N, 1, V).
        cache: what it reads and fills.
        reason: from `reason_against`. Afterwards the attribute of this name says why steps were launched one by one.

    On a CPU a `PlannedStep` runs them where it can.
    """

    def __init__(self, step: Callable[..., Tensor], cache: KVCache, reason: str | None) -> None:
        self._step, self._cache, self.reason = step, cache, reason
        self._planned: PlannedStep | None = None
        self._unplanned = False
        self._capacity = -1
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._logits = torch.empty(0)

    def __call__(self, token: Tensor, kept: Tensor | None) -> Tensor:
        """Logits (N, V), which the next call may overwrite, after ``token`` (N,); ``kept`` (N,) tells the rows that
        take part, None: all."""
        cache = self._cache
        cache.reserve(1)  # before the model, which may be compiled or captured: see PagedCache
        if self.reason is not None:
            planned = self._plan()
            return self._run(token, kept) if planned is None else planned(token, kept)
        if cache.capacity != self._capacity:  # new buffers: one step must run, and allocate, before a capture
            self._capacity, self._replay = cache.capacity, None
            return self._run(token, kept)
        if self._replay is None and not self._capture(token, kept):
            return self._run(token, kept)
        assert self._replay is not None
        for mine, given in zip(self._inputs, (token, kept), strict=False):
            if given is not None:
                mine.copy_(given)
        self._replay()
        cache.count(1)
        return self._logits

    def _plan(self) -> PlannedStep | None:
        """The plan of the next step, made anew where the last one no longer fits; None without one."""
        if self._unplanned:
            return None
        if self._planned is None or not self._planned.current():
            self._planned = None
            self._unplanned = reason_against_plan(self._step, self._cache, self._cache.batch) is not None
            if not self._unplanned:
                assert isinstance(self._step, CausalLM)
                self._planned = PlannedStep(self._step, self._cache)
        return self._planned

    def _run(self, token: Tensor, kept: Tensor | None) -> Tensor:
        lengths = None if kept is None else kept.int()
        return self._step(token[:, None], cache=self._cache, lengths=lengths)[:, -1]

    def _capture(self, token: Tensor, kept: Tensor | None) -> bool:
        """Try to capture the step; returns whether that worked. Capturing does not run it; only the host's counts
        change."""
        missing = [None] if kept is None else []
        self._inputs = [x.clone() for x in (token, kept) if x is not None]
        counted = self._cache.length
        try:
            self._replay, self._logits = capture(lambda: self._run(*self._inputs, *missing), token.device)
        except RuntimeError as error:
            self.reason = f"the step cannot be captured: {str(error).splitlines()[0]}"
        self._cache.count(counted - self._cache.length)
        return self.reason is None

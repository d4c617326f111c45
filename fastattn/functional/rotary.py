"""Rotary positions, for the queries and new keys of a call over a KV cache and, by a kernel, for whole tensors."""

from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.functional.one_pass import recorded
from fastattn.ops.batching import one_by_one
from fastattn.ops.direct import Way, way
from fastattn.spec import FLOAT_DTYPES, CacheSpec, Rotary, known
from fastattn.spec.checks import check_plain, readable


def turn_new(spec: CacheSpec, tables: Rotary, backend: str) -> CacheSpec:
    """The call with its queries and new keys turned; see `fastattn.attention_with_kvcache`."""
    cos, sin, interleaved = tables
    of_q, of_k = _positions(spec)
    one_pass = backend == "cpu" and backends.cpu.turns(spec.q, cos, sin) and way((*spec, cos, sin)) is Way.AT_ONCE
    turned = backends.cpu.turn if one_pass else turn
    q = turned(spec.q, cos, sin, of_q, interleaved)
    return spec._replace(q=q, k=None if spec.k is None else turned(spec.k, cos, sin, of_k, interleaved))


def check(spec: CacheSpec, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Rotary:
    """The tables, which have to fit the call; positions are checked where the host can read them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    for name, table, other in (("rotary_cos", cos, "rotary_sin"), ("rotary_sin", sin, "rotary_cos")):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name}: expected a Tensor beside {other}, got {type(table).__name__}")
        check_plain(name, table, spec.q)
        if table.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}.dtype: expected a floating-point dtype, got {table.dtype}")
        if table.device != spec.q.device:
            raise ValueError(f"{name}.device: expected q.device == {spec.q.device}, got {table.device}")
    assert cos is not None and sin is not None
    if cos.ndim != 2 or 2 * cos.shape[1] > spec.q.shape[3] or cos.shape[0] == 0:
        raise ValueError(
            f"rotary_cos.shape: expected (positions, R / 2), R at most D == {spec.q.shape[3]}, got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"rotary_sin.shape: expected rotary_cos.shape == {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if readable(spec.lens):
        highest = _highest(spec)
        if highest >= cos.shape[0]:
            raise ValueError(
                f"rotary_cos.shape[0]: expected more than the last position {highest}, got {cos.shape[0]} positions"
            )
    return Rotary(cos, sin, interleaved)


def _highest(spec: CacheSpec) -> int:
    """The last position at which something is turned; negative if nothing is."""
    if spec.length is not None:
        return spec.length - 1
    if spec.added is not None and spec.cu_seqlens_q is None:  # the last query stands at the last key
        return max(spec.lens.tolist(), default=0) + spec.added - 1
    return max((int(x.max()) for x in _positions(spec) if x.numel()), default=0)


def _positions(spec: CacheSpec) -> tuple[Tensor, Tensor]:
    """Where the queries and the new keys stand: (B, Lq) and (B, Lnew); packed ones (1, total) both."""
    lens, starts = spec.lens.long(), spec.cu_seqlens_q
    if starts is not None:
        rows = torch.arange(spec.q.shape[2], device=spec.q.device)
        entry = torch.bucketize(rows, starts[1:].long(), right=True).clamp(max=spec.entries - 1)
        first = lens if spec.added is None else lens - starts.diff()
        position = (first[entry] + rows - starts[entry].long())[None]
        return position, position
    asked, added = spec.q.shape[2], 0 if spec.k is None else spec.k.shape[2]
    of_k = lens[:, None]  # a step, of one row, needs no more
    if not known(added == 1):
        of_k = of_k + torch.arange(added, device=spec.q.device)
    if known(asked == added):
        return of_k, of_k
    return lens[:, None] + (added - asked) + torch.arange(asked, device=spec.q.device), of_k


def turn_pair(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The points (a, b), each turned by its angle."""
    return a * cos - b * sin, b * cos + a * sin


def turn(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, L, D) turned by its positions (B, L), cut to those of the tables (positions, R / 2).

    Computed in float32 at least; of x's shape and dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    position = position.clamp(0, cos.shape[0] - 1)
    c, s = (table[position].unsqueeze(1).to(dtype) for table in (cos, sin))  # (B, 1, L, R / 2)
    turned, rest = x.split([2 * cos.shape[1], x.shape[-1] - 2 * cos.shape[1]], -1)
    if interleaved:
        a, b = turned.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack(turn_pair(a, b, c, s), -1).flatten(-2)
    else:
        a, b = turned.to(dtype).chunk(2, -1)
        turned = torch.cat(turn_pair(a, b, c, s), -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def served(x: Tensor, tables: tuple[Tensor, Tensor]) -> bool:
    """Whether `rotate` takes x (..., L, heads, D) and tables (..., L, D / 2), whose first dimension may be 1.

    `recorded` must agree, and the tables must be float32.
    """
    cos, sin = tables
    return (
        recorded(x)
        and type(cos) is type(sin) is Tensor
        and cos.dtype == sin.dtype == torch.float32
        and cos.is_contiguous()
        and sin.is_contiguous()
        and not (cos.requires_grad or sin.requires_grad)
        and 2 * cos.shape[-1] == x.shape[-1]
        and (cos.shape[:-1] == x.shape[:-2] or cos.shape[:-1] == (1, *x.shape[1:-2]))
    )


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., L, heads, D) with dimension i turned with i + D / 2, by one pass over it forward and one backward."""
    cos, sin = (table.flatten(0, -2) for table in tables)
    return _Rotate.apply(x, cos, sin, False)


class _Rotate(torch.autograd.Function):
    """Rotation is linear; the derivative rotates the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        y = torch.empty(x.shape, dtype=x.dtype)
        backends.cpu.rotate(y.flatten(0, -3), x.contiguous().flatten(0, -3), cos, sin, back)
        return y

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  (PyTorch's has *grad_outputs)
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return one_by_one(lambda dy: _Rotate.apply(dy, cos, sin, not ctx.back), dy), None, None, None

"""A trial: a backward pass that computes scores and dP once, and adds up dQ in a fixed order. Nothing else uses it.

A program keeps a tile of keys, as in `dkdv_kernel`, and walks over the queries that see it. It adds its share of dQ to
a float32 buffer that lies in the L2 cache. Floating-point sums depend on their order, so the tiles of keys of one head
take turns, the last keys first: for every few tiles of queries a counter says how many have added. With causal order a
program's first queries see no later keys. So it begins without a wait, and it is always one tile behind the program of
the next keys, whose results it needs.

**Progress.** A program takes its place from a counter when it starts, and waits only for places before its own. Their
programs have started, so they hold a multiprocessor and never wait for one that has not. This needs no assumption about
the order in which a GPU starts programs.

**Memory.** All threads of a program add, then meet at a barrier, then one thread raises the counter with ``release``;
the threads of the next program read it with ``acquire`` before they add. So PTX's memory model orders the additions.

For bfloat16 or float16, contiguous tensors of one shape, lengths that are multiples of both tiles, no score terms.
"""

# ruff: noqa: ANN001  arguments of JIT functions are pointers and numbers

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.kernels import launch
from fastattn.kernels.forward import attention_forward
from fastattn.kernels.gradients import delta_kernel
from fastattn.kernels.scores import LOG2E
from fastattn.kernels.tiles import INTERPRETED, cast, dot
from fastattn.spec import Operands, Options

CACHED = 32 * 2**20
"""Bytes of queries, dO and the buffer of dQ that stay in the L2 cache of an H100, which has 50 MB."""


def together(length: int, heads: int, dim: int) -> int:
    """How many heads' tiles of keys start in turns: as many as stay in the cache, because the fewer tiles of one head
    run at once, the shorter their queue.
    """
    most = max(1, CACHED // (length * dim * (2 + 2 + 4)))
    return max(count for count in range(1, min(heads, most) + 1) if heads % count == 0)


@triton.jit
def wait_for(turn_ptr, before, wanted):
    """If ``wanted``, wait until ``before`` programs have passed on the turn; what they added is then visible.

    In assembly, because Triton loads nothing ahead in a loop that contains another loop. A turn that has not come after
    seconds is an error, so that a mistake here ends the launch.
    """
    if INTERPRETED:  # one program after another: a turn that has not come never comes
        tl.static_assert((wanted == 0) | (tl.load(turn_ptr) == before), "expected its turn to have come")
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p, w; .reg .s32 polls;
            setp.eq.s32 w, $3, 0;
            @w bra done;
            mov.s32 polls, 0;
            again: ld.acquire.gpu.global.s32 $0, [$1];
            setp.eq.s32 p, $0, $2;
            @p bra done;
            add.s32 polls, polls, 1;
            setp.lt.s32 p, polls, 16777216;
            @p bra again;
            trap;
            done: }""",
            "=&r,l,r,r", [turn_ptr.to(tl.int64, bitcast=True), before, wanted], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def pass_on(turn_ptr, wanted):
    """If ``wanted``, add 1 to the count at ``turn_ptr``, after all that the program's threads have added before.

    In assembly, because Triton loads nothing ahead in a loop with a barrier.
    """
    if INTERPRETED:
        tl.atomic_add(turn_ptr, wanted)
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p, w;
            setp.eq.s32 w, $2, 0;
            @w bra done;
            bar.sync 0;
            mov.u32 $0, %tid.x;
            setp.eq.u32 p, $0, 0;
            @p red.release.gpu.global.add.u32 [$1], 1;
            done: }""",
            "=&r,l,r", [turn_ptr.to(tl.int64, bitcast=True), wanted], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def one_pass_kernel(
    q, k, v, dout, rows_ptr, dq_sum, dk, dv, turns, places, scale, length, heads, side_by_side,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one head. ``rows_ptr`` is the output of `delta_kernel`.

    A turn lasts for TURN tiles of queries. If that is 0, additions come in any order: to see what the order costs.
    """
    place = tl.atomic_add(places, 1)
    kv_tiles = length // BLOCK_N
    group, in_group = place // (kv_tiles * side_by_side), place % (kv_tiles * side_by_side)
    tile = kv_tiles - 1 - in_group // side_by_side
    head = (group * side_by_side + in_group % side_by_side).to(tl.int64)
    first = head * length * HEAD_DIM
    dims = tl.arange(0, HEAD_DIM)[None, :]
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    own = first + cols.to(tl.int64) * HEAD_DIM + dims
    in_tile = tl.arange(0, BLOCK_M)[:, None] * HEAD_DIM + dims
    k_tile, v_tile = tl.load(k + own), tl.load(v + own)
    dk_acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    plane = heads.to(tl.int64) * length
    rows_ptr += head * length
    q_tiles = length // BLOCK_M
    turns += head * q_tiles
    start, inner_start = 0, 0
    if CAUSAL:
        start, inner_start = tile * BLOCK_N // BLOCK_M, tl.cdiv((tile + 1) * BLOCK_N - 1, BLOCK_M)
    present = -1  # the turn whose tiles of queries it adds to
    for INNER in tl.static_range(2):
        for number in tl.range(inner_start if INNER else start, q_tiles if INNER else inner_start):
            row = tl.cast(number, tl.int64) * BLOCK_M  # 64 bits from the start: see `ranges.tile_position`
            rows = row.to(tl.int32) + tl.arange(0, BLOCK_M)
            tile_at = first + row * HEAD_DIM
            q_tile = tl.load(q + tile_at + in_tile)
            s = dot(k_tile, tl.trans(q_tile), None, "ieee")
            if not INNER:
                s = tl.where(cols <= rows[None, :], s, float("-inf"))
            dout_tile = tl.load(dout + tile_at + in_tile)
            row_max = tl.load(rows_ptr + rows)
            log_sum = tl.load(rows_ptr + plane + rows)
            delta = tl.load(rows_ptr + 2 * plane + rows)
            dp = dot(v_tile, tl.trans(dout_tile), None, "ieee")
            p = tl.math.exp2(s * (scale * LOG2E) - row_max[None, :] - log_sum[None, :])
            ds = cast(p * (dp - delta[None, :]), q_tile.dtype)
            dv_acc = dot(cast(p, dout_tile.dtype), dout_tile, dv_acc, "ieee")
            dk_acc = dot(ds, q_tile, dk_acc, "ieee")
            if TURN:  # here, where two products are under way: it takes two round trips to the L2 cache
                turn = tl.cast(number, tl.int32) // TURN
                pass_on(turns + present, ((turn != present) & (present >= 0)).to(tl.int32))
                last = kv_tiles - 1
                if CAUSAL:
                    last = tl.minimum(((turn + 1) * TURN * BLOCK_M - 1) // BLOCK_N, last)
                wait_for(turns + turn, last - tile, (turn != present).to(tl.int32))
                present = turn
            share = dot(tl.trans(ds), k_tile, None, "ieee")
            tl.atomic_add(dq_sum + tile_at + in_tile, share, sem="relaxed")
    if TURN:
        pass_on(turns + present, (present >= 0).to(tl.int32))
    tl.store(dk + own, cast(dk_acc * scale, dk.dtype.element_ty))
    tl.store(dv + own, cast(dv_acc, dv.dtype.element_ty))


@triton.jit
def finish_kernel(dq_sum, dq, scale, BLOCK: tl.constexpr):
    """The sums, scaled, in the dtype of ``dq``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dq + at, cast(tl.load(dq_sum + at) * scale, dq.dtype.element_ty))


def prepared(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, statistics) of the package's forward kernel, for tensors (B, H, L, D)."""
    statistics = torch.empty((2, *q.shape[:3]), dtype=torch.float32, device=q.device)
    out, lse = torch.empty_like(q), torch.empty_like(statistics[0])
    options = Options(right=0 if causal else None, scale=q.shape[3] ** -0.5)
    attention_forward(out, lse, statistics, q, k, v, Operands(), options)
    return out, statistics


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, scale: float, causal: bool,
    tile: tuple[int, ...], turn: int, first_place: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of attention over (B, H, L, D); ``tile`` is (block_m, block_n, warps, stages).

    ``out`` and ``statistics`` are those of `prepared`. Programs take their places from ``first_place`` on; another one
    than 0 leaves out those that have to come first.
    """
    batch, heads, length, dim = q.shape
    block_m, block_n, warps, stages = tile
    if length % block_m or length % block_n:
        raise ValueError(f"expected a length that {block_m} and {block_n} divide, got {length}")
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dq_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    rows = torch.empty((3, batch, heads, length), dtype=torch.float32, device=q.device)
    turns = torch.zeros(batch * heads * (length // block_m), dtype=torch.int32, device=q.device)
    places = torch.full((1,), first_place, dtype=torch.int32, device=q.device)
    unit = launch.stride_unit(out, dout)
    of_rows: tuple[Any, ...] = (
        launch.rows(out, unit), launch.rows(dout, unit), None, statistics, rows, heads, length, unit, dim, 64,
    )  # fmt: skip
    delta_kernel[(triton.cdiv(length, 64) * batch * heads,)](*of_rows)
    heads *= batch
    arguments: tuple[Any, ...] = (
        q, k, v, dout, rows, dq_sum, dk, dv, turns, places, scale, length, heads, together(length, heads, dim),
        dim, block_m, block_n, causal, turn,
    )  # fmt: skip
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    one_pass_kernel[(heads * (length // block_n),)](*arguments, **options)
    block: Any = 1024
    finish_kernel[(dq.numel() // block,)](dq_sum, dq, scale, block)
    return dq, dk, dv

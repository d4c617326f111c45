"""Launch configurations: the only place where a tile size, warp count or pipeline depth is written.

The tables are looked up, never tuned at run time: a training step must not stop to search. ``search_space`` is what an
offline tuner may try, already pruned of shapes that cannot fit.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

Kernel = Literal["forward", "dkdv", "dk", "dv", "dq", "dbias", "delta", "decode", "combine", "append"]
KERNELS: tuple[Kernel, ...] = ("forward", "dkdv", "dk", "dv", "dq", "dbias", "delta", "decode", "combine", "append")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Tile of ``block_m`` queries by ``block_n`` keys, worked on by ``num_warps`` warps."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_programs: int = 2
    """For how many programs on each multiprocessor the decode kernel divides the keys."""
    pipelined: bool = False
    """Whether the forward kernel starts the next product of queries and keys before the softmax of this tile."""

    def options(self) -> dict[str, int]:
        """The arguments that Triton's launcher itself consumes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _table(**kernels: dict[int, tuple[int, ...]]) -> dict[str, dict[int, LaunchConfig]]:
    return {name: {d: LaunchConfig(*c) for d, c in by_dim.items()} for name, by_dim in kernels.items()}


# Per architecture and kernel: padded head dim -> (block_m, block_n, num_warps, num_stages[, split_programs]), 16-bit.
_SIXTEEN_BIT = {
    # A100: 164 KB of shared memory, mma.sync. FlashAttention-2's tiles, with 8 warps where 4 would spill.
    "sm_80": _table(
        forward={64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        dkdv={64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 1)},
        dq={64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 1)},
        dbias={64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (32, 32, 4, 1)},
        decode={64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 32, 4, 2)},
    ),
    # H100: 228 KB, wgmma on warp groups of 4 warps and 64 rows. With 3 stages a copy is under way for a whole
    # iteration; with 2 it is awaited as soon as it is issued. Registers may spill outside the loops, where that costs
    # nothing, and inside where each smaller tile is predicted to be slower nevertheless (tests/kernels). At D 256
    # the accumulators of dk and dv would not fit into the registers together: each has a pass.
    "sm_90": _table(
        forward={64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
        dkdv={64: (64, 128, 8, 3), 128: (64, 128, 8, 3)},
        dk={256: (32, 128, 8, 3)},
        dv={256: (32, 128, 8, 3)},
        dq={64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
        dbias={64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 32, 4, 1)},
        decode={64: (16, 128, 4, 3), 128: (16, 64, 4, 4), 256: (16, 32, 4, 3)},
    ),
    # B200: accumulators live in tensor memory; Hopper's tiles are the safe start.
    "sm_100": _table(
        forward={64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        dkdv={64: (32, 128, 8, 2), 128: (16, 128, 8, 2), 256: (32, 32, 8, 1)},
        dq={64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        dbias={64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 32, 4, 1)},
        decode={64: (16, 128, 4, 3), 128: (16, 64, 4, 4), 256: (16, 32, 4, 3)},
    ),
    # MI300: 64 KB of LDS and 64-wide waves, so smaller tiles and no deep pipelines.
    "gfx942": _table(
        forward={64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
        dkdv={64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
        dq={64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
        dbias={64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        decode={64: (16, 64, 4, 1), 128: (16, 64, 4, 1), 256: (16, 32, 4, 1)},
    ),
    # Small tiles, so that short sequences already take every path: inner, diagonal and tail.
    "interpreter": _table(
        forward={256: (32, 64, 1, 1)},
        dkdv={128: (32, 64, 1, 1)},
        dk={256: (32, 64, 1, 1)},
        dv={256: (32, 64, 1, 1)},
        dq={256: (64, 32, 1, 1)},
        dbias={256: (32, 64, 1, 1)},
        decode={256: (16, 32, 1, 1)},
    ),
}  # fmt: skip

# Where registers or shared memory hold more: a mask or bias with a row per query, rows that are read in pieces, and
# beside the two accumulators of dkdv also random bits or the derivative of a softcap.
_CROWDED = {
    "sm_90": _table(
        forward={64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (128, 16, 8, 3)},
        dkdv={64: (32, 128, 8, 3), 128: (32, 128, 8, 3)},
        dk={256: (16, 128, 8, 3)},
        dv={256: (16, 128, 8, 3)},
        dq={64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (128, 16, 8, 3)},
    ),
}  # fmt: skip

LARGEST_AHEAD = {"sm_90": 2, "interpreter": 4}
"""Where tiles of a mask or bias are loaded ahead: bytes of the largest numbers for which shared memory has room."""

# Where shared memory has no room for them beside the tiles of three stages.
_AHEAD = {"sm_90": _table(dk={256: (32, 128, 8, 2)}, dq={256: (128, 16, 8, 3)})}

# 16-bit inputs with a mask or bias that has one row for all queries, where one warp group keeps more in registers.
_ONE_ROW = {"sm_90": _table(forward={64: (64, 64, 4, 3)}, dq={64: (64, 64, 4, 3)})}

# 32-bit inputs where half the tile along both sides would spill so much that it is predicted to be slower.
_SINGLE = {
    "sm_90": _table(
        forward={256: (32, 32, 8, 1)},
        dkdv={128: (16, 64, 8, 1)},
        dk={256: (16, 16, 8, 1)},
        dq={128: (32, 32, 8, 1), 256: (16, 64, 8, 1)},
    ),
}

# Where tiles are found through memory and twice the stages would not fit into shared memory.
_INDIRECT = {"sm_90": _table(dk={256: (32, 128, 8, 3)}, dq={256: (128, 32, 8, 3)})}

# At which padded head dims the forward kernel is `pipelined`, where nothing beside q, k and v takes registers.
_PIPELINED = {"sm_90": (64, 128)}

_override: LaunchConfig | None = None


def lookup(
    kernel: Kernel, architecture: str, head_dim: int, element_size: int, crowded: bool = False, ahead: bool = False,
    one_row: bool = False, rows: int = 1, indirect: bool = False,
) -> LaunchConfig:  # fmt: skip
    """The launch config for one kernel.

    ``head_dim`` is the larger of D and Dv; ``element_size`` is in bytes. 32-bit inputs take half the tile along the
    loop dimension, since shared memory holds half as many elements. ``crowded``: a mask or bias with a row per query
    is read and not ``ahead``, or rows begin at no multiple of 16 bytes, or dkdv has dropout or a softcap; smaller tiles
    leave registers for that. ``ahead``: one is read whose tiles are loaded ahead, into shared memory (`launch.ahead`).
    ``one_row``: a mask or bias is read that has one row for all queries. ``rows``: how many share a key head, query
    heads times queries; beyond a few the decode kernel takes taller tiles.
    ``indirect``: where a tile lies stands in memory, in a block table or a block mask. Each load of a tile then waits
    for another, so that Triton halves the distance over which it loads ahead: twice the stages keep it.
    """
    if _override is not None:
        return _override
    if kernel == "delta":  # one pass over (rows, Dv): memory-bound, any shape does
        return LaunchConfig(64, 1, 4, 1)
    if kernel == "combine":  # one row, and so many splits at a time
        return LaunchConfig(1, 16, 4, 1)
    if kernel == "append":  # so many rows; a decode step appends one per key head
        return LaunchConfig(16, 1, 4, 1)
    by_dim = _SIXTEEN_BIT[architecture][kernel]
    padded = min(d for d in by_dim if d >= head_dim)
    config = by_dim[padded]

    def exception(table: dict[str, dict[str, dict[int, LaunchConfig]]]) -> LaunchConfig | None:
        return table.get(architecture, {}).get(kernel, {}).get(padded)

    if crowded and (own := exception(_CROWDED)):
        config = own
    elif ahead and (own := exception(_AHEAD)):
        config = own
    elif one_row and not crowded and element_size == 2 and (own := exception(_ONE_ROW)):
        config = own
    elif crowded and kernel == "forward" and architecture != "interpreter":
        config = dataclasses.replace(config, block_n=max(16, config.block_n // 2))
    if kernel == "decode" and rows > 2 * config.block_m:
        warps = 8 if head_dim > (64 if crowded or architecture == "sm_80" else 128) else 4  # with 4 they would spill
        widest = 4096 // padded if crowded else 64
        config = LaunchConfig(64, min(config.block_n, widest), warps, min(config.num_stages, 2))
    if kernel == "decode" and element_size > 2:
        config = dataclasses.replace(config, block_n=min(config.block_n, 64))
    if kernel == "forward" and not indirect:
        wins = padded in _PIPELINED.get(architecture, ()) and element_size == 2 and not crowded
        config = dataclasses.replace(config, pipelined=wins or architecture == "interpreter")
    if indirect and not crowded and (own := exception(_INDIRECT)):
        config = own
    elif indirect:
        config = dataclasses.replace(config, num_stages=2 * config.num_stages - 1)
    if element_size > 2 and (own := exception(_SINGLE)):
        config = own
    elif element_size > 2 and architecture != "interpreter":
        config = dataclasses.replace(
            config, block_m=max(16, config.block_m // 2), block_n=max(16, config.block_n // 2), num_stages=1
        )
    return config


def current_override() -> LaunchConfig | None:
    """The config of the `override` that is in force."""
    return _override


def key_passes(architecture: str, head_dim: int) -> tuple[Kernel, ...]:
    """The kernels that make dk and dv: one pass, or one for each where both accumulators leave too few registers."""
    return ("dkdv",) if head_dim <= max(_SIXTEEN_BIT[architecture]["dkdv"]) else ("dk", "dv")


@contextlib.contextmanager
def override(config: LaunchConfig | None) -> Iterator[None]:
    """Use ``config`` for every kernel inside the block: for tests and tuners."""
    global _override
    previous, _override = _override, config
    try:
        yield
    finally:
        _override = previous


# Tiles that a program keeps: of inputs in shared memory, of float32 scores and accumulators in registers.
_OPERANDS: dict[Kernel, tuple[int, int, int]] = {
    "forward": (1, 1, 1), "dkdv": (2, 2, 2), "dk": (2, 2, 1), "dv": (1, 1, 1), "dq": (2, 2, 1), "dbias": (1, 3, 0),
}  # fmt: skip


def search_space(kernel: Kernel, head_dim: int) -> list[LaunchConfig]:
    """Candidates for an offline tuner, without those that exceed 227 KB of shared memory or a thread's registers.

    More warps than one for 8 rows of the tile that a program keeps would have too little to do.

    A decode step is bound by memory: its tiles are of 16 rows, and at least 16 KB of keys and values are on their way.
    """
    dim = max(64, 1 << (head_dim - 1).bit_length())
    fits = []
    pipelined = (False, True) if kernel == "forward" else (False,)
    if kernel == "decode":
        for n, warps, stages, programs in itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2, 4)):
            tile_bytes, accumulators = 4 * dim * n, 16 * (n + dim) // (32 * warps)
            ahead = tile_bytes * (stages - 1)
            resident = programs * tile_bytes * stages <= 227 * 1024  # programs that wait for room gain nothing
            if ahead >= 16 * 1024 and tile_bytes * stages <= 227 * 1024 and accumulators <= 208:
                if resident or programs == 1:
                    fits.append(LaunchConfig(16, n, warps, stages, programs))
        return fits
    for m, n, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        own, walked = (n, m) if kernel in ("dkdv", "dk", "dv") else (m, n)  # rows: kept, and passed in tiles
        inputs, scores, accumulators = _OPERANDS[kernel]
        tile_bytes = 2 * dim * (inputs * own + 2 * walked * stages)
        registers = (scores * m * n + accumulators * own * dim) // (32 * warps)
        if own >= 8 * warps and tile_bytes <= 227 * 1024 and registers <= 208:
            fits += [LaunchConfig(m, n, warps, stages, pipelined=flag) for flag in pipelined]
    return fits

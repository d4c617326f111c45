"""Launch configurations: the only place with tile sizes, warp counts and pipeline depths.

Kernels read the tables and never tune at run time, because a training step must not stop to search. ``search_space``
gives the candidates for an offline tuner, without shapes that cannot fit.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

from .tiles import padded_columns

Kernel = Literal["forward", "dkdv", "dk", "dv", "dq", "dbias", "delta", "decode", "combine", "append"]
KERNELS: tuple[Kernel, ...] = ("forward", "dkdv", "dk", "dv", "dq", "dbias", "delta", "decode", "combine", "append")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """A tile of ``block_m`` queries by ``block_n`` keys, computed by ``num_warps`` warps."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_programs: int = 2
    """The number of programs per multiprocessor for which the decode kernel divides the keys."""
    pipelined: bool = False
    """Whether the forward kernel starts the next product of queries and keys before the softmax of this tile."""

    def options(self) -> dict[str, int]:
        """The arguments for Triton's launcher itself."""
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
        decode={64: (16, 128, 4, 3), 128: (16, 64, 4, 3), 256: (16, 32, 4, 2), 576: (16, 16, 4, 3)},
    ),
    # H100: 228 KB, wgmma on warp groups of 4 warps and 64 rows. With 3 stages a copy has a whole iteration to arrive;
# with 2 the kernel waits as soon as it has issued the copy. Registers may spill outside the loops, where that costs
# nothing. Inside, they may spill only if every smaller tile is predicted to be slower (tests/kernels). At D 256 the
# accumulators of dk and dv do not fit into the registers together, so each has its own pass; at D 192, too.
    "sm_90": _table(
        forward={
            64: (128, 64, 8, 3), 96: (128, 64, 4, 3), 128: (128, 64, 8, 3), 192: (128, 64, 8, 3), 256: (128, 32, 8, 3),
        },
        dkdv={64: (64, 128, 8, 3), 128: (64, 128, 8, 3)},
        dk={192: (64, 128, 8, 2), 256: (32, 128, 8, 3)},
        dv={192: (64, 128, 8, 3), 256: (32, 128, 8, 3)},
        dq={64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 192: (128, 64, 8, 2), 256: (128, 32, 8, 3)},
        dbias={64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 32, 4, 1)},
        decode={64: (16, 128, 4, 3), 128: (16, 64, 4, 4), 256: (16, 32, 4, 3), 576: (16, 32, 8, 2)},
    ),
    # B200: accumulators live in tensor memory; Hopper's tiles are the safe start.
    "sm_100": _table(
        forward={64: (128, 128, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        dkdv={64: (32, 128, 8, 2), 128: (16, 128, 8, 2), 256: (32, 32, 8, 1)},
        dq={64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (32, 32, 8, 1)},
        dbias={64: (64, 64, 4, 1), 128: (64, 64, 8, 1), 256: (64, 32, 4, 1)},
        decode={64: (16, 128, 4, 3), 128: (16, 64, 4, 4), 256: (16, 32, 4, 3), 576: (16, 32, 8, 2)},
    ),
    # MI300: 64 KB of LDS and 64-wide waves, so smaller tiles and no deep pipelines.
    "gfx942": _table(
        forward={64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
        dkdv={64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 32, 4, 1)},
        dq={64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 16, 4, 1)},
        dbias={64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 4, 1)},
        decode={64: (16, 64, 4, 1), 128: (16, 64, 4, 1), 256: (16, 32, 4, 1), 576: (16, 16, 4, 1)},
    ),
    # Small tiles, so that even short sequences take every path: inner, diagonal and tail.
    "interpreter": _table(
        forward={256: (32, 64, 1, 1)},
        dkdv={128: (32, 64, 1, 1)},
        dk={256: (32, 64, 1, 1)},
        dv={256: (32, 64, 1, 1)},
        dq={256: (64, 32, 1, 1)},
        dbias={256: (32, 64, 1, 1)},
        decode={256: (16, 32, 1, 1), 576: (16, 32, 1, 1)},
    ),
}  # fmt: skip

# For cases with more data in registers or shared memory: a mask or bias with a row per query, rows read in pieces, and
# in dkdv, beside its two accumulators, random bits or the derivative of a softcap.
_CROWDED = {
    "sm_90": _table(
        forward={64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (128, 16, 8, 3)},
        dkdv={64: (32, 128, 8, 3), 128: (32, 128, 8, 3)},
        dk={192: (32, 128, 8, 3), 256: (16, 128, 8, 3)},
        dv={192: (32, 128, 8, 3), 256: (16, 128, 8, 3)},
        dq={64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 192: (128, 32, 8, 3), 256: (128, 16, 8, 3)},
    ),
}  # fmt: skip

LARGEST_AHEAD = {"sm_90": 2, "interpreter": 4}
"""For kernels that load tiles of a mask or bias ahead: the largest element size, in bytes, that fits shared memory."""

# For kernels without shared memory for them beside the tiles of three stages, and for dq with a mask at D 128: ptxas
# lets the products of its usual tile wait for each other.
_AHEAD: dict[str, dict[str, dict[str, dict[int, LaunchConfig]]]] = {
    "mask": {"sm_90": _table(dk={256: (32, 128, 8, 2)}, dq={128: (64, 64, 4, 3), 256: (128, 16, 8, 3)})},
    "bias": {
        "sm_90": _table(dk={256: (32, 128, 8, 2)}, dv={192: (32, 128, 8, 3)}, dq={256: (128, 16, 8, 3)}),
    },
}

# For 16-bit inputs with a mask or bias of one row for all queries: one warp group then keeps more in registers.
_ONE_ROW = {"sm_90": _table(forward={64: (64, 64, 4, 3)}, dq={64: (64, 64, 4, 3)})}

# For 32-bit inputs whose half tile along both sides spills so much that it is predicted to be slower.
_SINGLE = {
    "sm_90": _table(
        forward={192: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
        dkdv={128: (16, 64, 8, 1)},
        dk={192: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
        dv={192: (16, 64, 8, 1)},
        dq={128: (32, 32, 8, 1), 192: (16, 64, 8, 1), 256: (16, 64, 8, 1)},
    ),
}

# For tiles whose place is loaded from memory, if twice the stages do not fit into shared memory.
_INDIRECT = {
    "sm_90": _table(
        forward={192: (128, 32, 8, 5)},
        dk={192: (32, 128, 8, 5), 256: (32, 128, 8, 3)},
        dv={192: (32, 128, 8, 5)},
        dq={192: (128, 32, 8, 5), 256: (128, 32, 8, 3)},
    ),
}  # fmt: skip

# Padded head dims at which the forward kernel is `pipelined`, if nothing beside q, k and v takes registers.
_PIPELINED = {"sm_90": (64, 128)}

_override: LaunchConfig | None = None


def lookup(
    kernel: Kernel, architecture: str, head_dim: int, element_size: int, crowded: bool = False,
    ahead: Literal["", "mask", "bias"] = "", one_row: bool = False, rows: int = 1, indirect: bool = False,
    in_pieces: bool = False,
) -> LaunchConfig:  # fmt: skip
    """The launch config for one kernel.

    ``head_dim`` is the larger of D and Dv; ``element_size`` is in bytes. 32-bit inputs take half the tile along the
    loop dimension, because shared memory holds half as many elements. ``ahead``: of which of the two the kernel loads
    tiles ahead into shared memory (`launch.ahead`). ``crowded``: the kernel reads a mask or bias with a row per query
    that is not ``ahead``, or rows do not begin at multiples of 16 bytes, or dkdv has dropout or a softcap; smaller
    tiles then leave registers. ``one_row``: the kernel reads a mask or bias with one row for all queries. ``rows``: the
    rows that share a key head, query heads times queries; beyond a few, the decode kernel takes taller tiles.

    ``indirect``: the kernel loads a tile's address from a block table or a block mask. Each load of a tile then waits
    for another load, which costs one pipeline stage per stage. Twice the stages keep the prefetch distance.

    ``in_pieces``: D or Dv is (`tiles.pieces`). ptxas lets the products of pieces wait for each other where the
    next product of queries and keys runs beside them.
    """
    if _override is not None:
        return _override
    if kernel == "delta":  # one pass over (rows, Dv): memory-bound, so any shape works
        return LaunchConfig(64, 1, 4, 1)
    if kernel == "combine":  # one row, and this many splits at a time
        return LaunchConfig(1, 16, 4, 1)
    if kernel == "append":  # this many rows; a decode step appends one per key head
        return LaunchConfig(16, 1, 4, 1)
    by_dim = _SIXTEEN_BIT[architecture][kernel]
    padded = min(d for d in by_dim if d >= head_dim)
    config = by_dim[padded]

    def exception(table: dict[str, dict[str, dict[int, LaunchConfig]]]) -> LaunchConfig | None:
        return table.get(architecture, {}).get(kernel, {}).get(padded)

    if crowded and (own := exception(_CROWDED)):
        config = own
    elif ahead and (own := exception(_AHEAD[ahead])):
        config = own
    elif one_row and not crowded and element_size == 2 and (own := exception(_ONE_ROW)):
        config = own
    elif crowded and kernel == "forward" and architecture != "interpreter":
        config = dataclasses.replace(config, block_n=max(16, config.block_n // 2))
    if kernel == "decode" and rows > 2 * config.block_m:
        warps = 8 if head_dim > (64 if crowded or architecture == "sm_80" else 128) else 4  # 4 warps would spill
        widest = max(16, 4096 // padded) if crowded or padded > 256 else 64
        config = LaunchConfig(64, min(config.block_n, widest), warps, min(config.num_stages, 2))
    if kernel == "decode" and element_size > 2:
        config = dataclasses.replace(config, block_n=min(config.block_n, 64))
    if kernel == "forward" and not indirect:
        wins = padded in _PIPELINED.get(architecture, ()) and element_size == 2 and not crowded and not in_pieces
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
    """The config of the active `override`."""
    return _override


def key_passes(architecture: str, head_dim: int) -> tuple[Kernel, ...]:
    """The kernels that make dk and dv: one for both, or one each if both accumulators leave too few registers."""
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


# Tiles that a program keeps: inputs in shared memory, float32 scores and accumulators in registers.
_OPERANDS: dict[Kernel, tuple[int, int, int]] = {
    "forward": (1, 1, 1), "dkdv": (2, 2, 2), "dk": (2, 2, 1), "dv": (1, 1, 1), "dq": (2, 2, 1), "dbias": (1, 3, 0),
}  # fmt: skip


def search_space(kernel: Kernel, head_dim: int) -> list[LaunchConfig]:
    """Candidates for an offline tuner, without those that exceed 227 KB of shared memory or a thread's registers.

    More than one warp for 8 rows of a program's own tile would have too little work. A decode step is memory-bound: its
    tiles have 16 rows, and at least 16 KB of keys and values are in flight.
    """
    dim = max(64, padded_columns(head_dim))
    fits = []
    pipelined = (False, True) if kernel == "forward" else (False,)
    if kernel == "decode":
        for n, warps, stages, programs in itertools.product((32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2, 4)):
            tile_bytes, accumulators = 4 * dim * n, 16 * (n + dim) // (32 * warps)
            ahead = tile_bytes * (stages - 1)
            resident = programs * tile_bytes * stages <= 227 * 1024  # programs that wait for shared memory gain nothing
            if ahead >= 16 * 1024 and tile_bytes * stages <= 227 * 1024 and accumulators <= 208:
                if resident or programs == 1:
                    fits.append(LaunchConfig(16, n, warps, stages, programs))
        return fits
    for m, n, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        own, walked = (n, m) if kernel in ("dkdv", "dk", "dv") else (m, n)  # rows: kept, and looped over in tiles
        inputs, scores, accumulators = _OPERANDS[kernel]
        tile_bytes = 2 * dim * (inputs * own + 2 * walked * stages)
        registers = (scores * m * n + accumulators * own * dim) // (32 * warps)
        if own >= 8 * warps and tile_bytes <= 227 * 1024 and registers <= 208:
            fits += [LaunchConfig(m, n, warps, stages, pipelined=flag) for flag in pipelined]
    return fits

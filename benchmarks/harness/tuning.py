"""The launch configurations to try for a kernel, in order, and the results of a search."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fastattn.kernels import config
from fastattn.kernels.config import LaunchConfig

from . import resources, results, summary
from .flops import attention_flops
from .problems import Problem
from .provenance import code_digest

TOKENS, HIDDEN, LENGTH = 16384, 2048, 4096
STEPS = ((8, 8192), (1, 32768))
"""Batches and cached keys of the decode steps that are timed together, at 32 query heads on 8 key heads."""


@dataclass(frozen=True)
class Group:
    """One search. Time is that of the forward pass, of the whole backward pass with one of its kernels varied, or of
    decode steps over contiguous caches.
    """

    kernel: config.Kernel
    dtype: str
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} D={self.head_dim} {'causal' if self.causal else 'full'}"

    @property
    def mode(self) -> str:
        return self.kernel if self.kernel in ("forward", "decode") else "backward"

    def flops(self) -> float:
        if self.kernel != "decode":
            return self.problem().flops(self.mode)
        return sum(attention_flops(batch, 32, 1, length, self.head_dim) for batch, length in STEPS)

    def problem(self, length: int = LENGTH) -> Problem:
        heads = HIDDEN // self.head_dim
        return Problem(max(1, TOKENS // length), heads, heads, length, self.head_dim, self.dtype, self.causal)

    def key(self, candidate: LaunchConfig) -> dict[str, str]:
        return {
            "kernel": self.kernel, "dtype": self.dtype, "head_dim": str(self.head_dim),
            "causal": results.text(self.causal), "block_m": str(candidate.block_m), "block_n": str(candidate.block_n),
            "num_warps": str(candidate.num_warps), "num_stages": str(candidate.num_stages),
            "split_programs": str(candidate.split_programs), "pipelined": results.text(candidate.pipelined),
        }  # fmt: skip


def groups() -> list[Group]:
    """Most important first: bfloat16, the common head dims, causal."""
    found = [
        Group(kernel, dtype, head_dim, causal)
        for dtype, head_dim in itertools.product(("bf16", "fp16"), (128, 64, 256))
        for kernel in ("forward", *config.key_passes("sm_90", head_dim), "dq", "decode")
        for causal in (True, False)
        if causal or kernel != "decode"  # one query sees all keys
    ]
    return sorted(found, key=lambda group: (group.dtype != "bf16", group.head_dim == 256))


def config_of(row: results.Row) -> LaunchConfig:
    names = ("block_m", "block_n", "num_warps", "num_stages", "split_programs")
    numbers = {name: int(row[name]) for name in names if row[name]}
    return LaunchConfig(**numbers, pipelined=row["pipelined"] == results.text(True))


def fact_key(kernel: str, head_dim: int, candidate: LaunchConfig) -> tuple[str, ...]:
    """What is known of a candidate holds for causal and not, and for both types of 16 bits."""
    numbers = (head_dim, candidate.block_m, candidate.block_n, candidate.num_warps, candidate.num_stages)
    return kernel, *map(str, numbers), results.text(candidate.pipelined)


def candidates(group: Group, arch: str, facts: dict[tuple[str, ...], results.Row]) -> list[LaunchConfig]:
    """The present choice, then the space, most promising first.

    Where something is known of the present kernels, only what is known and promising is tried, and what is near the
    present choice unless that is known to be slow. What is known of older kernels decides the order alone.
    """
    present = config.lookup(group.kernel, arch, group.head_dim, 2)
    current = code_digest(without=UNRELATED)

    def facts_of(candidate: LaunchConfig) -> results.Row:
        return facts.get(fact_key(group.kernel, group.head_dim, candidate), {})

    def is_current(candidate: LaunchConfig) -> bool:
        return facts_of(candidate).get("digest") == current

    def share(candidate: LaunchConfig) -> float:
        return float(facts_of(candidate).get("share") or 0.0)

    close = list(near(present, group.kernel, group.head_dim))
    space = [c for c in dict.fromkeys([*close, *config.search_space(group.kernel, group.head_dim)]) if c != present]
    best = max(map(share, (present, *space)))

    def slow(candidate: LaunchConfig) -> bool:
        """It does not compile, or accesses spilled registers in its loop, or is predicted far below the best."""
        known = facts_of(candidate)
        spills = 20 * int(known.get("local") or 0) > int(known.get("instructions") or 0)
        return bool(known) and (bool(known["error"]) or spills or share(candidate) < PROMISING * best)

    def unpromising(candidate: LaunchConfig) -> tuple[bool, bool, bool, int, int]:
        serialised = facts_of(candidate).get("serialised") == "yes"
        tile = candidate.block_m * candidate.block_n
        far = candidate not in close
        return slow(candidate), serialised, far, -tile, abs(candidate.num_stages - present.num_stages)

    if any(map(is_current, space)):
        space = [c for c in space if (c in close or is_current(c)) and not (slow(c) and is_current(c))]
    elif not any(map(facts_of, space)):  # nothing is known: compiling all would take the time
        space = space[:UNKNOWN_AT_MOST]
    return [present, *sorted(space, key=unpromising)]


def near(present: LaunchConfig, kernel: config.Kernel, head_dim: int) -> Iterator[LaunchConfig]:
    """The present choice with one or two of its numbers a step away; of the decode kernel those of its space."""
    allowed = config.search_space(kernel, head_dim)
    steps = {
        "block_m": () if kernel == "decode" else (present.block_m // 2, present.block_m * 2),
        "block_n": (present.block_n // 2, present.block_n * 2),
        "num_warps": (4, 8),
        "num_stages": (present.num_stages - 1, present.num_stages + 1),
        "split_programs": (1, 2, 4) if kernel == "decode" else (),
        "pipelined": (not present.pipelined,) if kernel == "forward" else (),
    }
    single = [{name: value} for name, values in steps.items() for value in values]
    double = [a | b for a, b in itertools.combinations(single, 2) if a.keys() != b.keys()]
    for changes in (*single, *double):
        candidate = dataclasses.replace(present, **changes)
        possible = min(candidate.block_m, candidate.block_n) >= 16 and candidate.num_stages >= 1
        possible = possible and candidate.block_m * candidate.block_n <= 128 * 128
        if candidate != present and (candidate in allowed if kernel == "decode" else possible):
            yield candidate


UNKNOWN_AT_MOST = 24
"""Candidates of a search of which nothing is known: those near the present choice come first."""
PROMISING = 0.7
"""Of the best predicted share: twice the difference that the static model can resolve."""
UNRELATED = ("config.py", "append.py", "decode.py")
"""Files of `kernels/` that do not count in the digest of facts: candidates do not depend on them."""


def facts_path(arch: str, folder: Path = resources.HERE) -> Path:
    """Where `gpu_tune --resources` writes what is known of candidates."""
    return folder / f"candidates-{arch}.csv"


def load_facts(arch: str) -> dict[tuple[str, ...], results.Row]:
    rows = results.read(facts_path(arch))
    return {tuple(row[name] for name in results.CANDIDATES_KEY): row for row in rows}


def table(rows: Sequence[results.Row]) -> str:
    """Per kernel and head dim the best compromise, as a line for `kernels/config.py`, and each search's winner.

    The compromise has the least geometric mean of time over the best time, over causal and not and the dtypes that
    were searched.
    """
    lines = []
    searches: dict[tuple[str, int], dict[tuple[str, str], dict[LaunchConfig, results.Row]]] = {}
    for row in rows:
        if row["p50_ms"] and row["stage"] != "wrong":
            search = searches.setdefault((row["kernel"], int(row["head_dim"])), {})
            search.setdefault((row["dtype"], row["causal"]), {})[config_of(row)] = row
    for (kernel, head_dim), by_group in sorted(searches.items()):
        shared = set.intersection(*(set(found) for found in by_group.values()))
        if not shared:
            continue

        def cost(candidate: LaunchConfig, by_group: dict = by_group) -> float:
            return summary.geometric_mean(
                [
                    float(found[candidate]["p50_ms"]) / min(float(row["p50_ms"]) for row in found.values())
                    for found in by_group.values()
                ]
            )

        best = min(shared, key=cost)
        rates = ", ".join(
            f"{dtype} {'causal' if causal == 'yes' else 'full'} {float(found[best]['tflops']):.0f}"
            for (dtype, causal), found in sorted(by_group.items())
        )
        numbers, slower = (best.block_m, best.block_n, best.num_warps, best.num_stages), 100 * (cost(best) - 1)
        numbers += (best.split_programs,) if kernel == "decode" else ()
        pipelined = " pipelined;" * best.pipelined
        lines.append(f"{kernel}: {head_dim}: {numbers},  #{pipelined} TFLOP/s: {rates}; {slower:.1f} % off the best")
    for row in rows:
        if row["stage"] == "winner":
            group = Group(
                cast(config.Kernel, row["kernel"]), row["dtype"], int(row["head_dim"]), row["causal"] == "yes"
            )
            lines.append(
                f"  {group}: {row['block_m']}x{row['block_n']} w{row['num_warps']} s{row['num_stages']}, "
                + "pipelined, " * (row["pipelined"] == "yes")
                + f"{row['split_programs']} programs, " * (row["kernel"] == "decode")
                + f"{float(row['p50_ms']):.3f} ms, {float(row['tflops']):.0f} TFLOP/s"
            )
    return "\n".join(lines) or "nothing measured"

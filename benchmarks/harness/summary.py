"""Summaries of rows: tables by length, ratios to the best peer, geometric means, and the targets."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .results import KEY, Row

OWN = "fastattn"
CUDA = "fastattn-cuda"
"""The provider that asks for this package's CUDA C++ kernels: shown beside the peers, and none of them."""
READ = "read"
"""The provider that only reads as many bytes as a step over a KV cache."""
UNQUANTISED = "unquantised"
"""The provider that takes the same step over a cache in bfloat16."""


def number(row: Row, column: str) -> float | None:
    return float(row[column]) if row.get(column) else None


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


class Cell(NamedTuple):
    """Rows of one problem: this package's and its peers', by provider."""

    line: str
    """What it computes, without the length."""
    length: int
    own: Row | None
    peers: dict[str, Row]

    def measured_peers(self, column: str = "p50_ms") -> dict[str, float]:
        return {name: value for name, row in self.peers.items() if (value := number(row, column)) is not None}

    def best_peer(self, column: str = "p50_ms") -> tuple[str, float] | None:
        others = {name: value for name, value in self.measured_peers(column).items() if name != CUDA}
        return min(others.items(), key=lambda item: item[1], default=None)

    def ratio(self, peer: str | None = None, column: str = "p50_ms") -> float | None:
        """How many times less fastattn needs than a peer, or than the best one."""
        own = number(self.own, column) if self.own else None
        best = self.best_peer(column)
        theirs = self.measured_peers(column).get(peer) if peer else best[1] if best else None
        return theirs / own if own and theirs else None


def line_of(row: Row) -> str:
    mask = "causal" if row["causal"] == "yes" else "full"
    parts = [f"D={row['head_dim']}", mask] if row["case"] == "grid" else [row["case"]]
    return ", ".join([*parts, row["dtype"], row["mode"]])


def problem_of(row: Row) -> tuple[str, ...]:
    """The values that the rows of a problem's providers share."""
    return tuple(row.get(name, "") for name in ("suite", *KEY) if name != "provider")


def cells(rows: Iterable[Row]) -> list[Cell]:
    """Rows grouped into problems, in the order of lines and lengths."""
    found: dict[tuple[str, ...], Cell] = {}
    for row in rows:
        if row["case"].startswith("matmul"):
            continue
        key = problem_of(row)
        length = row["kv_len"] if row["mode"] == "decode" else row["q_len"]
        cell = found.setdefault(key, Cell(line_of(row), int(length or 0), None, {}))
        if row["provider"] == OWN:
            found[key] = cell._replace(own=row)
        else:
            cell.peers[row["provider"]] = row
    return sorted(found.values(), key=lambda cell: cell.length)


def mean_ratios(rows: Iterable[Row], column: str = "p50_ms") -> dict[str, tuple[float, int]]:
    """Geometric mean of the ratio to each peer over the cells that both have, and their number; "best peer" too."""
    found = cells(rows)
    names: dict[str | None, str] = {name: name for cell in found for name in cell.peers} | {None: "best peer"}
    means = {}
    for peer, label in names.items():
        ratios = [ratio for cell in found if (ratio := cell.ratio(peer, column)) is not None]
        if ratios:
            means[label] = (geometric_mean(ratios), len(ratios))
    return means


def figure(cell: Cell, column: str) -> str:
    """One entry of a table: rate or time, and the ratio to the best peer."""
    if cell.own is None:
        return ""
    if cell.own.get("note", "").startswith("cannot"):
        return "cannot"
    if column == "peak_mib":
        value = f"{number(cell.own, column) or 0:.0f} MiB"
    elif column == "min_ms":
        value = milliseconds(number(cell.own, column) or 0.0)
    elif cell.own["mode"] == "decode":
        value = f"{1e3 * (number(cell.own, 'p50_ms') or 0):.3g} us"
        value += f", {of_copy:.0%} of copy" if (of_copy := number(cell.own, "of_copy")) else ""
    elif tflops := number(cell.own, "tflops"):
        value = f"{tflops:.3g}"
    else:
        value = milliseconds(number(cell.own, "p50_ms") or 0.0)
    ratio = cell.ratio(column=column)
    return value if ratio is None else f"{value} ({ratio:.2f}x)"


def table(rows: Sequence[Row], column: str = "p50_ms", lengths: Iterable[int] = ()) -> list[list[str]]:
    """Header and one line per problem, a column per length: those given, else all that occur."""
    found = cells(rows)
    lengths = list(lengths) or sorted({cell.length for cell in found})
    lines: dict[str, dict[int, str]] = {}
    for cell in found:
        if entry := figure(cell, column):
            lines.setdefault(cell.line, {})[cell.length] = entry
    header = ["", *(f"L={length}" for length in lengths)]
    return [header, *([line, *(lines[line].get(n, "") for n in lengths)] for line in sorted(lines, key=natural))]


def held_against_reading(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of steps over a KV cache beside which reading its bytes was measured, and all other rows."""
    split: tuple[list[Row], list[Row]] = [], []
    rows = list(rows)
    keys = {problem_of(row) for row in rows if row["provider"] == READ}
    for row in rows:
        split[problem_of(row) not in keys].append(row)
    return split


def decode_table(rows: Iterable[Row]) -> list[list[str]]:
    """A line for each step over a KV cache: its time, its rate, and that as a share of the rate of reading."""
    lines = [["", "median", "GB/s", "of the rate of reading", "speed beside a bfloat16 cache"]]
    for cell in sorted(cells(rows), key=lambda cell: natural(cell.line)):
        if cell.own is not None and (time := number(cell.own, "p50_ms")):
            beside = cell.ratio(UNQUANTISED)
            lines.append([
                cell.line, milliseconds(time), f"{(number(cell.own, 'mbytes') or 0.0) / time:.1f}",
                f"{cell.ratio(READ) or 0.0:.2f}", "" if beside is None else f"{beside:.2f}x",
            ])  # fmt: skip
    return lines


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key with D=64 before D=128."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", text)]


def markdown(table: Sequence[Sequence[str]]) -> str:
    header, *lines = table
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *("| " + " | ".join(x) + " |" for x in lines)]
    )


def aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    padded = [[entry.ljust(width) for entry, width in zip(row, widths, strict=True)] for row in table]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def column_of(suite: str) -> str:
    """The column that a suite is judged by. On a CPU it is the least time, since other work changes that least."""
    least = ("cpu", "generation", "huggingface", "launch")
    return "peak_mib" if suite == "memory" else "min_ms" if suite in least else "p50_ms"


UNITS = {
    "memory": "MiB at the peak",
    "cpu": "least ms",
    "layers": "median ms",
    "generation": "least ms",
    "huggingface": "least ms",
    "features": "TFLOP/s",
    "decode": "median us",
    "launch": "least ms",
}


def short(rows: Sequence[Row]) -> str:
    """All suites of one run as text, for the end of its output."""
    parts = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        of_suite = [row for row in rows if row["suite"] == suite]
        column = column_of(suite)
        if suite == "overhead":
            parts.append(f"{suite}, microseconds per call\n{aligned(overhead_table(of_suite))}")
            continue
        if suite == "scaling":
            parts.append(f"{suite}, the quickest way\n{aligned(scaling_table(of_suite))}")
            continue
        steps, of_suite = held_against_reading(of_suite)
        if steps:
            parts.append(f"{suite}, steps over a KV cache\n{aligned(decode_table(steps))}")
        lines = table(of_suite, column)
        if len(lines) == 1:
            continue
        unit = UNITS.get(suite, "TFLOP/s")
        means = ", ".join(f"{name} {mean:.2f}x ({n})" for name, (mean, n) in mean_ratios(of_suite, column).items())
        parts.append(f"{suite}, {unit} (ratio to the best peer)\n{aligned(lines)}\ngeometric means (cells): {means}")
    return "\n\n".join(parts)


def overhead_table(rows: Sequence[Row]) -> list[list[str]]:
    """Median and minimum in microseconds, and what fastattn adds to torch's own function by both."""
    lines = [["call", "fastattn p50", "min", "torch p50", "min", "added p50", "min"]]
    for cell in cells(rows):
        if cell.own is None or cell.own["mode"] not in ("host", "graph replay"):
            continue
        own = [1e3 * (number(cell.own, column) or 0.0) for column in ("p50_ms", "min_ms")]
        entries = [f"{x:.1f}" for x in own]
        if sdpa := cell.peers.get("sdpa"):
            theirs = [1e3 * (number(sdpa, column) or 0.0) for column in ("p50_ms", "min_ms")]
            entries += [f"{x:.1f}" for x in theirs] + [f"{a - b:+.1f}" for a, b in zip(own, theirs, strict=True)]
        name = cell.own["case"] + (", CUDA graph" if cell.own["mode"] == "graph replay" else "")
        lines.append([name, *entries, *[""] * (6 - len(entries))])
    return lines


PLAYED = "step, played"
"""The mode of rows of the suite `scaling` that were not measured."""


def working_share(row: Row) -> float:
    """The part of a simulated step in which the busiest rank works and does not wait."""
    exposed = float(row["note"].partition("exposed ")[2].partition(" ms")[0])
    return 1.0 - exposed / float(row["p50_ms"])


def length(row: Row) -> str:
    tokens = int(row["q_len"])
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}k"


def quickest(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Case -> tokens, rising -> the row of the quickest way that was played."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted((row for row in rows if row["mode"] == PLAYED), key=lambda row: float(row["p50_ms"])):
        found.setdefault(row["case"], {}).setdefault(int(row["q_len"]), row)
    cases = dict.fromkeys(row["case"] for row in rows if row["case"] in found)
    return {case: dict(sorted(found[case].items())) for case in cases}


def scaling_table(rows: Sequence[Row]) -> list[list[str]]:
    """The quickest way for each number of GPUs and length: its step, how much of it is work, and the memory."""
    lengths = {int(row["q_len"]): length(row) for row in rows if row["mode"] == PLAYED}
    lines = [["GPUs, network", *(lengths[n] for n in sorted(lengths))]]
    for case, ways in quickest(rows).items():
        line = [case]
        for tokens in sorted(lengths):
            best = ways.get(tokens)
            line.append("")
            if best is not None:
                time, memory = float(best["p50_ms"]), float(best["peak_mib"]) / 1024
                step = milliseconds(time) if time < 1000 else f"{time / 1000:.3g} s"
                line[-1] = f"{best['provider']}: {step}, {int(100 * working_share(best))}% work, {memory:.2g} GiB"
        lines.append(line)
    return lines


def breakeven_table(rows: Sequence[Row]) -> list[list[str]]:
    """From which of the played lengths on which way is the quickest, and from which on it works 90 % of the step."""
    lines = [["GPUs, network", "quickest", "90 % at work"]]
    for case, ways in quickest(rows).items():
        best = list(ways.values())
        changes = [row for before, row in zip([None, *best], best, strict=False)
                   if before is None or before["provider"] != row["provider"]]  # fmt: skip
        busy = next((f"from {length(row)}" for row in best if working_share(row) >= 0.9), "at none of these lengths")
        lines.append([case, "; ".join(f"{row['provider']} from {length(row)}" for row in changes), busy])
    return lines


RATIO = "predicted / measured"


def checks_table(rows: Sequence[Row]) -> list[list[str]]:
    """Steps as measured on processes and as predicted."""
    lines = [["processes", "strategy", "measured", "predicted", RATIO]]
    predicted = {(r["case"], r["provider"]): r for r in rows if r["mode"] == "step, predicted"}
    for row in rows:
        if row["mode"] == "step":
            other = predicted[row["case"], row["provider"]]
            times = [float(x["p50_ms"]) for x in (row, other)]
            of_rounds = other["note"].partition(f"{RATIO} ")[2]
            ratio = of_rounds or f"{times[1] / times[0]:.2f}"
            lines.append([row["case"], row["provider"], *map(milliseconds, times), ratio])
    return lines


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def first_call_table(rows: Sequence[Row]) -> list[list[str]]:
    """Milliseconds of a fresh process, by state of the compilation cache."""
    modes = ("empty cache", "filled cache")
    names = list(dict.fromkeys(row["case"] for row in rows if row["mode"] in modes))
    found = {(row["case"], row["mode"]): milliseconds(float(row["p50_ms"])) for row in rows if row["p50_ms"]}
    return [["", *modes], *([name, *(found.get((name, mode), "") for mode in modes)] for name in names)]


# Targets of the first stage, plain Triton on an H100


class Target(NamedTuple):
    text: str
    least: float
    measure: Callable[[dict[str, list[Row]]], float | None]


def mean_against(suite: str, peer: str) -> Callable[[dict[str, list[Row]]], float | None]:
    def measure(rows: dict[str, list[Row]]) -> float | None:
        return mean_ratios(rows.get(suite, [])).get(peer, (None, 0))[0]

    return measure


def worst_feature(rows: dict[str, list[Row]]) -> float | None:
    return min((ratio for cell in cells(rows.get("features", [])) if (ratio := cell.ratio())), default=None)


def layer_ratios(rows: dict[str, list[Row]], padded: bool) -> list[float]:
    found = [cell for cell in cells(rows.get("layers", [])) if cell.own and "training step" not in cell.own["case"]]
    if padded:
        found = [cell for cell in found if cell.own and "padded" in cell.own["case"] and cell.length >= 1024]
    return [ratio for cell in found if (ratio := cell.ratio("torch"))]


TARGETS = (
    Target("forward against SDPA-FLASH, geometric mean over the grid", 1.25, mean_against("forward", "sdpa-flash")),
    Target("forward against SDPA-cuDNN, geometric mean over the grid", 0.80, mean_against("forward", "sdpa-cudnn")),
    Target("backward against SDPA-FLASH, geometric mean over the grid", 1.10, mean_against("backward", "sdpa-flash")),
    Target("each feature against the best peer that has it, worst row", 1.50, worst_feature),
    Target("each layer against torch.nn, worst row", 1.00, lambda rows: min(layer_ratios(rows, False), default=None)),
    Target(
        "layers with key padding at L >= 1024 against torch.nn, worst row", 1.50,
        lambda rows: min(layer_ratios(rows, True), default=None),
    ),
)  # fmt: skip


def targets_table(rows: dict[str, list[Row]]) -> list[list[str]]:
    """Each target, what was measured and whether that meets it."""
    lines = [["target", "at least", "measured", "met"]]
    for target in TARGETS:
        value = target.measure(rows)
        measured, met = "not measured yet", ""
        if value is not None:
            measured, met = f"{value:.2f}x", "yes" if value >= target.least else "no"
        lines.append([target.text, f"{target.least:.2f}x", measured, met])
    return lines

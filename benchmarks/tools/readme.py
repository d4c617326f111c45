"""Writes measured numbers into the texts, between markers, and checks that they still agree with the data.

    <!-- numbers:NAME -->anything here is replaced<!-- end -->

    python -m benchmarks.tools.readme --write      or --check
    python -m benchmarks.tools.readme --list       the names, and what each would write now

A block whose figures come from older kernels than those of this checkout says so, since its text is made from the data
and the digest of the sources.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import predictions, results, summary
from benchmarks.harness.provenance import ROOT, digest
from benchmarks.harness.results import Row

from .cpu_ratios import ratios

COMMAND = "python -m benchmarks.tools.readme"
MARKER = re.compile(r"(<!-- numbers:([a-z][a-z0-9-]*) -->)(.*?)(<!-- end -->)", re.DOTALL)
NOTHING = "not measured yet"
NO_GPU = "No row has been measured on a GPU yet."


@dataclass
class Data:
    """All rows, by folder of the device and suite; GPUs first."""

    folder: Path = results.HERE
    current: str = field(default_factory=digest)

    def suite(self, name: str, gpu: bool | None = None) -> list[Row]:
        """Rows of the first device that has the suite, of both kinds or of one kind."""
        for path in results.devices(self.folder):
            if gpu is not None and path.name.startswith("cpu") == gpu:
                continue
            if rows := results.read(path / f"{name}.csv"):
                return rows
        return []

    def gpu_suites(self) -> dict[str, list[Row]]:
        return {name: self.suite(name, gpu=True) for name in ("forward", "backward", "features", "layers", "memory")}

    def conditions(self, rows: Sequence[Row]) -> str:
        """One sentence: the device, versions and date, and whether the kernels have changed since."""
        last = max(rows, key=lambda row: row["date"])
        where = last["gpu"] if last["gpu"] != "none" else f"{last['cpu']}, {last['threads']} thread(s)"
        text = f"Measured on {where}, torch {last['torch']}, triton {last['triton']}, commit {last['commit']}"
        text += " with uncommitted changes" if last["dirty"] == "yes" else ""
        text += f", {last['date'][:10]}."
        notes = {part for row in rows for part in row["note"].split("; ") if part}
        notes = {part for part in notes if not part.startswith(("cannot", "backend", summary.RATIO))}
        text += "".join(f" {part[0].upper()}{part[1:]}." for part in sorted(notes))
        if last["gpu"] != "none" and any(row["digest"] != self.current for row in rows):
            text += " **Some rows are of older kernels than those of this checkout.**"
        return text


def block(table: Sequence[Sequence[str]], *sentences: str) -> str:
    """A table and its notes, as separate paragraphs."""
    return "\n".join(["", summary.markdown(table), "", *sentences, ""])


def suite_block(name: str, gpu: bool) -> Callable[[Data], str]:
    """The table of one suite, with its geometric means."""

    def make(data: Data) -> str:
        rows = data.suite(name, gpu)
        if not rows:
            return f"\n{NO_GPU}\n" if gpu else f"\n{NOTHING}\n"
        _, rows = summary.held_against_reading(rows)
        column = summary.column_of(name)
        ratios = summary.mean_ratios(rows, column).items()
        means = "; ".join(f"{peer} {mean:.2f}x over {n}" for peer, (mean, n) in ratios)
        unit = summary.UNITS.get(name, "TFLOP/s")
        unit = unit[0].upper() + unit[1:]
        return block(
            summary.table(rows, column), f"{unit}; in brackets the ratio to the best peer, more than 1 is better.",
            f"Geometric means against each peer, over cells: {means}.", data.conditions(rows),
        )  # fmt: skip

    return make


def decode_cpu_block(data: Data) -> str:
    rows, _ = summary.held_against_reading(data.suite("cpu", gpu=False))
    return block(summary.decode_table(rows), data.conditions(rows)) if rows else f"\n{NOTHING}\n"


GAINS = {
    "full, 1 thread": ("128", ("forward", "backward")),
    "causal, 1 thread": ("128", ("forward", "backward")),
    "window 256, 1 thread": ("64", ("backward",)),
    "dropout 0.1, 1 thread": ("64", ("forward", "backward")),
    "bias with gradient, 1 thread": ("64", ("backward",)),
}
"""Cases of the suite cpu that show what a user gains, in float32: the head dim and the passes of each."""
GAIN_LENGTHS = ("128", "512", "1024")


def cpu_gains_block(data: Data) -> str:
    """A few lines of the suite cpu, in the order of GAINS."""
    rows = [row for row in data.suite("cpu", gpu=False) if row["q_len"] in GAIN_LENGTHS and row["dtype"] == "fp32"]
    tables, chosen = [], []
    for case, (head_dim, modes) in GAINS.items():
        for mode in modes:
            found = [row for row in rows if (row["case"], row["head_dim"], row["mode"]) == (case, head_dim, mode)]
            chosen += found
            tables += summary.table(found, summary.column_of("cpu"), map(int, GAIN_LENGTHS))[1:]
    if not chosen:
        return f"\n{NOTHING}\n"
    header = ["", *(f"L={length}" for length in GAIN_LENGTHS)]
    return block([header, *tables], data.conditions(chosen))


def cpu_ratios_block(data: Data) -> str:
    rows = data.suite("cpu", gpu=False)
    lines = ["```", *ratios(rows), "```", "", data.conditions(rows)] if rows else [NOTHING]
    return "\n".join(["", "", *lines, ""])


def generation_range(data: Data) -> str:
    """The least and the greatest speed of a small Llama beside transformers' best cache, for a sentence."""
    rows = [row for row in data.suite("generation", gpu=False) if row["case"].startswith("Llama")]
    found = [ratio for cell in summary.cells(rows) if (ratio := cell.ratio(column="min_ms"))]
    return f"{min(found):.1f} to {max(found):.1f} times" if found else NOTHING


def overhead_block(data: Data) -> str:
    rows = data.suite("overhead", gpu=False)
    if not rows:
        return f"\n{NOTHING}\n"
    return block(summary.overhead_table(rows), "Microseconds per call on a tiny CPU input.", data.conditions(rows))


def first_call_block(data: Data) -> str:
    rows = data.suite("overhead")
    rows = [row for row in rows if row["mode"].endswith("cache")]
    return block(summary.first_call_table(rows), data.conditions(rows)) if rows else f"\n{NOTHING}\n"


def added_microseconds(case: str) -> Callable[[Data], str]:
    """The time that a call adds to torch's own, by the minimum, as a bare number for a sentence."""

    def make(data: Data) -> str:
        for line in summary.overhead_table(data.suite("overhead", gpu=False)):
            if line[0] == case and line[-1]:
                return f"{float(line[-1]):.1f}"
        return NOTHING

    return make


def targets_block(data: Data) -> str:
    suites = data.gpu_suites()
    rows = [row for found in suites.values() for row in found]
    return block(summary.targets_table(suites), data.conditions(rows) if rows else NO_GPU)


def gpu_sentence(data: Data) -> str:
    rows = [row for found in data.gpu_suites().values() for row in found]
    return data.conditions(rows) if rows else NO_GPU


def predictions_block(data: Data) -> str:
    """Shares of the tensor cores' peak by head dim, of kernels that no GPU has run yet."""
    folder = data.folder / predictions.HERE.name
    found = predictions.rows(folder)
    rows = [row for row in found if row["case"] == "grid" and row["dtype"] == "bf16"]
    if not rows:
        return f"\n{NOTHING}\n"
    head_dims = sorted({int(row["head_dim"]) for row in rows})
    shares = {(row["mode"], row["causal"], int(row["head_dim"])): float(row["of_matmul"]) for row in rows}
    table = [["", *(f"D={head_dim}" for head_dim in head_dims)]]
    for mode in ("forward", "backward"):
        for causal, name in (("no", "full"), ("yes", "causal")):
            cells = [shares.get((mode, causal, head_dim)) for head_dim in head_dims]
            table.append([f"{mode}, {name}", *("" if share is None else f"{share:.0%}" for share in cells)])
    made = {f"with Triton {row['triton']} at commit {row['commit']}" for row in rows}
    errors = [
        f"D={row['head_dim']} {row['note'].rpartition(': ')[2]}" for row in predictions.every(folder)
        if row["case"] == "tutorial"
    ]  # fmt: skip
    return block(
        table, f"Compiled {' and '.join(sorted(made))}; predicted, never run on a GPU.",
        f"For Triton's own tutorial kernel, whose rates are published, the model is too high by {'; '.join(errors)}.",
    )  # fmt: skip


def scaling_block(data: Data) -> str:
    rows = [row for row in data.suite("scaling", gpu=False) if row["mode"] == summary.PLAYED]
    if not rows:
        return f"\n{NOTHING}\n"
    return block(summary.scaling_table(rows), f"Played, not measured, at commit {rows[-1]['commit']}.")


def breakeven_block(data: Data) -> str:
    rows = data.suite("scaling", gpu=False)
    return f"\n\n{summary.markdown(summary.breakeven_table(rows))}\n\n" if rows else f"\n{NOTHING}\n"


def scaling_checks_block(data: Data) -> str:
    rows = [row for row in data.suite("scaling", gpu=False) if row["mode"] in ("step", "step, predicted")]
    return block(summary.checks_table(rows), data.conditions(rows)) if rows else f"\n{NOTHING}\n"


BLOCKS: dict[str, Callable[[Data], str]] = {
    "forward": suite_block("forward", gpu=True),
    "backward": suite_block("backward", gpu=True),
    "features": suite_block("features", gpu=True),
    "layers": suite_block("layers", gpu=True),
    "memory": suite_block("memory", gpu=True),
    "memory-cpu": suite_block("memory", gpu=False),
    "cpu": suite_block("cpu", gpu=False),
    "cpu-gains": cpu_gains_block,
    "cpu-ratios": cpu_ratios_block,
    "decode-cpu": decode_cpu_block,
    "generation": suite_block("generation", gpu=True),
    "generation-cpu": suite_block("generation", gpu=False),
    "generation-range": generation_range,
    "huggingface": suite_block("huggingface", gpu=True),
    "huggingface-cpu": suite_block("huggingface", gpu=False),
    "overhead": overhead_block,
    "first-call": first_call_block,
    "overhead-us": added_microseconds("sdpa"),
    "overhead-grad-us": added_microseconds("sdpa, gradients recorded"),
    "targets": targets_block,
    "gpu": gpu_sentence,
    "predictions": predictions_block,
    "scaling": scaling_block,
    "scaling-breakeven": breakeven_block,
    "scaling-checks": scaling_checks_block,
}


def render(text: str, data: Data) -> str:
    """The text with every marked part made from the data.

    Raises:
        KeyError: a marker names no block.
    """

    def replacement(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise KeyError(f"numbers:{name}: expected one of {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[name](data)}{match[4]}"

    return MARKER.sub(replacement, text)


def pages(root: Path = ROOT) -> list[Path]:
    """Every text that may hold markers."""
    patterns = ("*.md", "docs/**/*.md", "benchmarks/*.md", "csrc/**/*.md", "examples/**/*.md")
    found = [path for pattern in patterns for path in root.glob(pattern)]
    return sorted(path for path in found if MARKER.search(path.read_text(encoding="utf-8")))


def outdated(root: Path = ROOT, data: Data | None = None, write: bool = False) -> list[str]:
    """The pages that disagree with the data; rewrites them if asked to."""
    data = data or Data()
    changed = []
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        if (new := render(text, data)) != text:
            changed.append(path.relative_to(root).as_posix())
            if write:
                path.write_text(new, encoding="utf-8")
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    if args.list:
        for name, make in BLOCKS.items():
            print(f"== {name}\n{make(Data())}")
        return 0
    changed = outdated(write=args.write)
    for name in changed:
        print(f"{name}: {'written' if args.write else f'not what the data says: {COMMAND} --write'}")
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

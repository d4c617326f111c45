"""Draws the charts and prints the tables of one device's results.

    python -m benchmarks.tools.plot                          every device in benchmarks/results
    python -m benchmarks.tools.plot FOLDER --output FOLDER   one folder of CSV files
    python -m benchmarks.tools.plot FOLDER --scaling FILE    the chart of docs/distributed.md alone

Needs matplotlib (``pip install fastattn[bench]``); without it only the tables.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import results, summary
from benchmarks.harness.results import Row
from benchmarks.harness.summary import CUDA, OWN, Cell, number

# Each provider has the same colour in every chart: this package's stands out, related providers share a hue.
COLOURS = {
    OWN: "#d62728", CUDA: "#ff9896", "sdpa-cudnn": "#1f77b4", "sdpa-flash": "#2ca02c", "sdpa-efficient": "#98df8a",
    "sdpa-math": "#c7c7c7", "sdpa": "#1f77b4", "flex": "#ff7f0e", "varlen": "#9467bd", "flash-attn-2": "#8c564b",
    "flash-attn-3": "#e377c2", "flash-attn-4": "#17becf", "xformers": "#bcbd22", "flashinfer": "#7f7f7f",
    "torch": "#1f77b4", "torch-compile": "#aec7e8",
}  # fmt: skip


def rank(provider: str) -> int:
    """The same order in every chart."""
    return list(COLOURS).index(provider) if provider in COLOURS else len(COLOURS)


def providers_in(cells: Sequence[Cell]) -> list[str]:
    found = {name for cell in cells for name in cell.peers} | {OWN}
    return sorted(found, key=rank)


def value_of(cell: Cell, provider: str, column: str) -> float | None:
    row = cell.own if provider == OWN else cell.peers.get(provider)
    return number(row, column) if row else None


def bars(axes: Any, cells: Sequence[Cell], column: str, title: str) -> None:
    """Groups of bars by length, one bar per provider."""
    lengths = sorted({cell.length for cell in cells})
    names = [name for name in providers_in(cells) if any(value_of(cell, name, column) for cell in cells)]
    width = 0.8 / max(1, len(names))
    for position, name in enumerate(names):
        points = [
            (lengths.index(cell.length) + (position - (len(names) - 1) / 2) * width, value)
            for cell in cells if (value := value_of(cell, name, column))
        ]  # fmt: skip
        axes.bar([x for x, _ in points], [y for _, y in points], width, label=name, color=COLOURS.get(name))
    axes.set_xticks(range(len(lengths)), [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.set_title(title, fontsize=10)


def lines(axes: Any, cells: Sequence[Cell], column: str, title: str) -> None:
    """One line per provider over length, both axes logarithmic."""
    for name in providers_in(cells):
        points = [(cell.length, value) for cell in cells if (value := value_of(cell, name, column))]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS.get(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)


def by_line(rows: Sequence[Row]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in summary.cells(rows):
        found.setdefault(cell.line, []).append(cell)
    return {line: found[line] for line in sorted(found, key=summary.natural)}


def figure(panels: dict[str, list[Cell]], column: str, label: str, draw: Any, columns: int, path: Path) -> None:
    """A grid of charts with one legend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = -(-len(panels) // columns)
    fig, grid = pyplot.subplots(height, columns, figsize=(5.0 * columns, 2.9 * height), squeeze=False)
    for axes, (title, cells) in zip(grid.flat, panels.items(), strict=False):
        draw(axes, cells, column, title)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel(label)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    names = sorted(handles, key=rank)
    fig.set_layout_engine("constrained")
    columns = min(7, len(names))
    fig.legend([handles[name] for name in names], names, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(fig)


def ratio_cells(cells: Sequence[Cell], against: str) -> list[Cell]:
    """Cells that hold how many times faster than ``against`` each provider is, as their ``tflops``."""
    found = []
    for cell in cells:
        base = cell.measured_peers().get(against)
        if base is None:
            continue

        def relative(row: Row, base: float = base) -> Row:
            time = number(row, "p50_ms")
            return row | {"tflops": f"{base / time:.4f}" if time else ""}

        peers = {name: relative(row) for name, row in cell.peers.items()}
        found.append(Cell(cell.line, cell.length, relative(cell.own) if cell.own else None, peers))
    return found


WAYS = {"ring": "o", "all_gather": "s", "ulysses": "^", "ring, heads by 8": "D", "all_gather, heads by 8": "v"}
GROUPS = ("#1f77b4", "#2ca02c", "#ff7f0e", "#d62728")


def scaling(rows: Sequence[Row], path: Path) -> None:
    """By network, number of GPUs and length: the part of a step in which a rank works, with the fastest strategy.

    It is narrow with large type, to be read on half a page.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "scaling", "svg.fonttype": "none"}  # the same small file from the same rows
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    quickest = summary.quickest(rows)
    networks = list(dict.fromkeys(case.partition(", ")[2] for case in quickest))
    fig, grid = pyplot.subplots(len(networks), 1, figsize=(5.2, 3.0 * len(networks) + 1.1), sharex=True, squeeze=False)
    used: set[str] = set()
    for axes, network in zip(grid[:, 0], networks, strict=True):
        cases = [case for case in quickest if case.partition(", ")[2] == network]
        for case, colour in zip(cases, GROUPS, strict=False):
            points = [(tokens, 100.0 * summary.working_share(row)) for tokens, row in quickest[case].items()]
            axes.plot(*zip(*points, strict=True), color=colour, label=case.partition(", ")[0])
            for (tokens, share), row in zip(points, quickest[case].values(), strict=True):
                axes.plot(tokens, share, WAYS[row["provider"]], markersize=7, color=colour)
                used.add(row["provider"])
        axes.set_title(network, fontsize=13)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 105)
        axes.set_ylabel("% of the step at work", fontsize=13)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
    lengths = {tokens: summary.length(row) for found in quickest.values() for tokens, row in found.items()}
    axes = grid[-1, 0]
    axes.set_xticks(sorted(lengths), [lengths[tokens] for tokens in sorted(lengths)])
    axes.set_xlabel("tokens", fontsize=13)
    lines, _ = axes.get_legend_handles_labels()
    ways = [
        Line2D([], [], color="#444444", linestyle="", marker=WAYS[name], label=name) for name in WAYS if name in used
    ]
    fig.set_layout_engine("constrained")
    fig.legend(handles=[*lines, *ways], loc="outside lower center", ncols=2, frameon=False, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, metadata={"Date": None})
    pyplot.close(fig)


def draw_all(folder: Path, output: Path) -> list[Path]:
    """Every chart that the folder has data for."""
    made = []

    def draw(
        name: str, panels: dict[str, list[Cell]], column: str, label: str, how: Any = bars, columns: int = 2
    ) -> None:
        panels = {title: cells for title, cells in panels.items() if any(value_of(c, OWN, column) for c in cells)}
        if panels:
            made.append(output / f"{name}.png")
            figure(panels, column, label, how, columns, made[-1])

    for suite in ("forward", "backward", "decode"):
        rows = results.read(folder / f"{suite}.csv")
        dtypes = dict.fromkeys(row["dtype"] for row in rows if not row["case"].startswith("matmul"))
        for dtype in dtypes:
            panels = by_line([row for row in rows if row["dtype"] == dtype])
            draw(f"{suite}-{dtype}", panels, "tflops", "TFLOP/s")
    draw("features", by_line(results.read(folder / "features.csv")), "tflops", "TFLOP/s", columns=3)
    draw("memory", by_line(results.read(folder / "memory.csv")), "peak_mib", "MiB at the peak", lines)
    layers = by_line(results.read(folder / "layers.csv"))
    base = {line: "sdpa" if "training step" in line else "torch" for line in layers}
    faster = {line: ratio_cells(cells, base[line]) for line, cells in layers.items()}
    draw("layers", faster, "tflops", "times as fast as torch", columns=4)
    if panels := cpu_panels(results.read(folder / "cpu.csv")):
        made.append(output / "cpu.png")
        draw_rates(panels, results.read(folder / "cpu.csv"), made[-1])
    played = [row for row in results.read(folder / "scaling.csv") if row["mode"] == summary.PLAYED]
    if played:
        made.append(output / "scaling.svg")
        scaling(played, made[-1])
    return made


def rate(row: Row) -> float | None:
    """GFLOP/s by the least time, like the tables of a CPU."""
    tflops, least, median = (number(row, name) for name in ("tflops", "min_ms", "p50_ms"))
    return None if not tflops or not least or not median else 1e3 * tflops * median / least


def cpu_panels(rows: Sequence[Row]) -> dict[str, list[Cell]]:
    """Case -> its cells of one thread at head dim 64, forward and backward."""
    wanted = [row for row in rows if row["threads"] == "1" and row["head_dim"] == "64" and row["mode"] in STYLES]
    panels: dict[str, list[Cell]] = {}
    for case in dict.fromkeys(row["case"] for row in wanted):
        cells = summary.cells([row for row in wanted if row["case"] == case])
        if any(cell.own and rate(cell.own) for cell in cells):
            panels[case.removesuffix(", 1 thread")] = cells
    return panels


STYLES: dict[str, Any] = {"forward": "-", "backward": "--"}


def draw_rates(panels: dict[str, list[Cell]], rows: Sequence[Row], path: Path) -> None:
    """A panel for each case: GFLOP/s over allowed pairs by length, with the best peer and a matrix product."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    columns = min(4, len(panels))
    height = -(-len(panels) // columns)
    fig, grid = pyplot.subplots(
        height, columns, figsize=(3.1 * columns, 2.1 * height + 0.6), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    ceiling = next((rate(row) for row in rows if row["case"].startswith("matmul") and row["threads"] == "1"), None)
    for axes, (title, cells) in zip(grid.flat, panels.items(), strict=False):
        for mode, style in STYLES.items():
            of_mode = [cell for cell in cells if line_mode(cell) == mode]
            own = [(cell.length, value) for cell in of_mode if cell.own and (value := rate(cell.own))]
            peers = [
                (cell.length, max(values)) for cell in of_mode
                if (values := [value for row in cell.peers.values() if (value := rate(row))])
            ]  # fmt: skip
            for points, colour in ((own, COLOURS[OWN]), (peers, COLOURS["sdpa"])):
                if points:
                    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colour)
        if ceiling:
            axes.axhline(ceiling, color="#7f7f7f", linewidth=1)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    lengths = sorted({cell.length for cells in panels.values() for cell in cells})
    grid[0][0].set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    grid[0][0].set_ylim(bottom=0)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    for axes in list(grid.flat)[max(len(panels) - columns, 0) : len(panels)]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("length")
    for row in grid:
        row[0].set_ylabel("GFLOP/s")
    legend = [
        *(Line2D([], [], color=colour, label=name) for name, colour in
          ((OWN, COLOURS[OWN]), ("best of PyTorch", COLOURS["sdpa"]), ("float32 matrix product", "#7f7f7f"))),
        *(Line2D([], [], color="black", linestyle=style, label=mode) for mode, style in STYLES.items()),
    ]  # fmt: skip
    fig.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(fig)


def line_mode(cell: Cell) -> str:
    return next(row["mode"] for row in (cell.own, *cell.peers.values()) if row)


def tables(folder: Path) -> str:
    """Every suite as markdown: the ratio to the best peer per cell, and geometric means."""
    parts = []
    for path in sorted(folder.glob("*.csv")):
        suite = path.stem
        if suite in results.LAYOUTS:
            continue
        rows = results.read(path)
        if suite == "scaling":
            parts.append(f"## scaling\n\n{summary.markdown(summary.scaling_table(rows))}")
            continue
        if suite == "overhead":
            parts.append(f"## overhead, microseconds\n\n{summary.markdown(summary.overhead_table(rows))}")
            continue
        steps, rows = summary.held_against_reading(rows)
        if steps:
            parts.append(f"## {suite}, steps over a KV cache\n\n{summary.markdown(summary.decode_table(steps))}")
        column = summary.column_of(suite)
        means = [[name, f"{mean:.2f}x", str(n)] for name, (mean, n) in summary.mean_ratios(rows, column).items()]
        parts.append(
            f"## {suite}\n\n{summary.markdown(summary.table(rows, column))}\n\n"
            f"{summary.markdown([['against', 'geometric mean', 'cells'], *means])}"
        )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="*", type=Path, help="folders of CSV files; default: all in benchmarks/results")
    parser.add_argument("--output", type=Path, help="folder for the charts; default: beside the data")
    parser.add_argument("--scaling", type=Path, help="an SVG file: that chart alone, of the first folder")
    args = parser.parse_args(argv)
    if args.scaling:
        folder = (args.folder or results.devices())[0]
        scaling([row for row in results.read(folder / "scaling.csv") if row["mode"] == summary.PLAYED], args.scaling)
        return 0
    for folder in args.folder or results.devices():
        print(f"# {folder.name}\n\n{tables(folder)}\n")
        if importlib.util.find_spec("matplotlib") is None:
            print("matplotlib is not installed: no charts", file=sys.stderr)
        else:
            for path in draw_all(folder, args.output or folder):
                print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draws the pictures of masks.md: which pairs take part is read off `fastattn.attention` itself.

``python docs/draw_masks.py`` writes docs/images/*.svg. With values that are unit vectors the output of attention is its
probabilities, and a pair takes part where its probability is not 0. Each file holds a digest of the data it shows, so
that a test finds a picture that was not drawn again.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from fastattn import BlockMask

IMAGES = Path(__file__).parent / "images"

INK, GREY = "#2b3440", "#7c8794"
ALLOWED, OPEN, FORBIDDEN, NOTHING = "#2f5d8a", "#6f9fcf", "#e9edf2", "#f6cfbd"
TESTED = "#cfe0f1"  # forbidden, but in a tile that is computed


class Panel(NamedTuple):
    """One small picture."""

    title: str
    data: Tensor
    """bool (Lq, Lk) which pairs take part; for `draw_heat` the term of the scores"""
    positions: Sequence[int] = ()
    """where each query stands among the keys"""
    joint: str = ""
    """what stands between this picture and the one before it"""


def probabilities(q_len: int, kv_len: int, batch: int = 1, heads: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """(p (B, H, Lq, Lk), lse) of `fastattn.attention` where all products of q and k are 0."""
    q, k = torch.zeros(batch, heads, q_len, 1), torch.zeros(batch, heads, kv_len, 1)
    v = torch.eye(kv_len).expand(batch, heads, kv_len, kv_len)
    return fastattn.attention(q, k, v, return_lse=True, **options)


def allowed(q_len: int, kv_len: int, batch: int = 1, **options: Any) -> Tensor:
    """bool (B, Lq, Lk): which pairs take part."""
    return probabilities(q_len, kv_len, batch, **options)[0][:, 0] > 0


def causal() -> list[Panel]:
    return [
        Panel("Lq = Lk", allowed(6, 6, causal=True)[0], range(6)),
        Panel("q_offset=0\n(PyTorch's is_causal)", allowed(4, 8, causal=True, q_offset=0)[0], range(4)),
        Panel("Lq < Lk, default\nq_offset = Lk - Lq = 4", allowed(4, 8, causal=True)[0], range(4, 8)),
        Panel("Lq > Lk, default\nq_offset = Lk - Lq = -3", allowed(8, 5, causal=True)[0], range(-3, 5)),
    ]


def offsets() -> list[Panel]:
    starts = [0, 4, 9]
    each = allowed(3, 12, 3, causal=True, q_offset=torch.tensor(starts))
    return [
        Panel(f"b = {b}, q_offset[{b}] = {start}", each[b], range(start, start + 3)) for b, start in enumerate(starts)
    ]


def windows() -> list[Panel]:
    def panel(title: str, **options: Any) -> Panel:
        return Panel(title, allowed(8, 8, **options)[0], range(8))

    return [
        panel("window=(2, 2)", window=(2, 2)),
        panel("window=(3, 0)\nor causal, (3, None)", window=(3, 0)),
        panel("window=(None, 2)", window=(None, 2)),
        panel("window=(5, -2)\nonly keys well before", window=(5, -2)),
    ]


def padding() -> list[Panel]:
    lengths = torch.tensor([8, 5, 0])
    mask = torch.arange(8) < lengths[:, None]
    each = allowed(8, 8, 3, mask=mask[:, None, None, :])
    return [Panel(f"b = {b}, {n} keys", each[b]) for b, n in enumerate(lengths.tolist())]


def packed() -> list[Panel]:
    starts = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    q, v = torch.zeros(12, 1, 1), torch.eye(12)[:, None]

    def panel(title: str, **options: Any) -> Panel:
        return Panel(title, fastattn.attention_varlen(q, q, v, starts, **options)[:, 0] > 0, range(12))

    return [
        panel("cu_seqlens = [0, 3, 8, 12]"),
        panel("the same, causal=True", causal=True),
        panel("the same, window=(1, 0)", window=(1, 0)),
    ]


def combined() -> list[Panel]:
    mask = torch.ones(8, dtype=torch.bool)
    mask[2], mask[5] = False, False

    def panel(title: str, joint: str, **options: Any) -> Panel:
        return Panel(title, allowed(8, 8, **options)[0], range(8), joint)

    return [
        panel("causal=True", "", causal=True),
        panel("window=(3, 3)", "and", window=(3, 3)),
        panel("mask (without keys 2, 5)", "and", mask=mask),
        panel("all three in one call", "=", causal=True, window=(3, 3), mask=mask),
    ]


def alibi() -> list[Panel]:
    """The term that slopes add, read off the scores: ``log p + lse``."""
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125])
    p, lse = probabilities(8, 8, heads=4, alibi_slopes=slopes, causal=True)
    scores = torch.log(p) + lse[..., None]
    return [Panel(f"head {h}, slope {slope:g}", scores[0, h]) for h, slope in enumerate(slopes.tolist())]


def block_masks() -> list[tuple[str, BlockMask]]:
    size = (1, 1, 1024, 1024)
    documents = (torch.arange(1024)[:, None] >= torch.tensor([300, 500, 900])).sum(1)
    return [
        ("prefix LM, prefix 300", BlockMask.from_predicate(lambda b, h, i, j: (j <= i) | (j < 300), size)),
        ("four documents, causal", BlockMask.from_documents(documents, causal=True)),
        ("causal window of 200", BlockMask.from_predicate(lambda b, h, i, j: (j <= i) & (j > i - 200), size)),
    ]


CELLS: dict[str, Callable[[], list[Panel]]] = {
    "causal": causal,
    "q-offset": offsets,
    "window": windows,
    "key-padding": padding,
    "packed": packed,
    "combined": combined,
}
NAMES = (*CELLS, "alibi", "block-mask")


def digest(name: str) -> str:
    """Of the data that the picture shows."""
    if name == "block-mask":
        data = [tensor for _, mask in block_masks() for tensor in (mask.to_dense(), mask.tensors.table)]
    elif name == "alibi":
        data = [panel.data.mul(64).round() + 0.0 for panel in alibi()]
    else:
        data = [panel.data for panel in CELLS[name]()]
    text = ";".join(f"{tuple(x.shape)}:{x.double().flatten().tolist()}" for x in data)
    return hashlib.sha256(text.encode()).hexdigest()


def kinds(mask: BlockMask) -> Tensor:
    """int (row tiles, column tiles): 0 empty, 1 full, 2 partial."""
    return mask.tensors.table[0, 0].clamp(max=2)


CELL, GAP, MARGIN, TOP, BELOW = 15.0, 50.0, 46.0, 40.0, 34.0  # points; TOP: a title of two lines, BELOW: axis labels
PER_ROW = 2
"""panels beside each other: a picture of two is still read where a page shows it 400 pixels wide"""
LINE = 15.0  # of the legend


def draw_cells(name: str, panels: list[Panel]) -> None:
    """Squares for pairs; a dot where the query stands; a row that sees nothing in its own colour."""
    from matplotlib.path import Path as Outline

    cell = min(CELL, 8 * CELL / max(panel.data.shape[1] for panel in panels))
    entries: list[tuple[str | None, str]] = [(ALLOWED, "takes part"), (FORBIDDEN, "does not")]
    if any(panel.positions for panel in panels):
        entries.append((None, "where the query stands"))
    if any(not panel.data.any(1).all() for panel in panels):
        entries.append((NOTHING, "the row sees nothing: output 0"))
    sizes = [(columns * cell, rows * cell) for rows, columns in (panel.data.shape for panel in panels)]
    figure, all_axes = _figure(sizes, entries)
    rounded = _rounded_square(Outline)
    for panel, axes in zip(panels, all_axes, strict=True):
        rows, columns = panel.data.shape
        _matrix_axes(axes, rows, columns, panel.title)
        for colour, chosen in (
            (ALLOWED, panel.data),
            (NOTHING, ~panel.data & ~panel.data.any(1, keepdim=True)),
            (FORBIDDEN, ~panel.data & panel.data.any(1, keepdim=True)),
        ):
            i, j = chosen.nonzero(as_tuple=True)
            axes.scatter(j, i, s=(cell - 1.6) ** 2, marker=rounded, color=colour, linewidths=0)
        stands = [(i, j) for i, j in enumerate(panel.positions) if 0 <= j < columns]
        on, off = ([p for p in stands if bool(panel.data[p]) is seen] for seen in (True, False))
        for points, colour in ((on, "white"), (off, GREY)):
            axes.scatter([j for _, j in points], [i for i, _ in points], s=9, color=colour, linewidths=0)
        if panel.joint:
            axes.annotate(panel.joint, (0, 0.5), (-33, 0), xycoords="axes fraction", textcoords="offset points",
                          ha="center", va="center", fontsize=11, color=INK)  # fmt: skip
    _save(figure, name)


def draw_heat(name: str, panels: list[Panel]) -> None:
    """Values as colours on one scale; what is forbidden stays empty."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.path import Path as Outline

    rows, columns = panels[0].data.shape
    colours = LinearSegmentedColormap.from_list("bias", ["#dfe9f3", OPEN, ALLOWED, "#17324d"])
    lowest = min(float(panel.data[panel.data.isfinite()].min()) for panel in panels)
    figure, all_axes = _figure([(columns * CELL, rows * CELL)] * len(panels), [], right=44.0)
    shown: Any = None
    for panel, axes in zip(panels, all_axes, strict=True):
        _matrix_axes(axes, rows, columns, panel.title)
        i, j = panel.data.isfinite().nonzero(as_tuple=True)
        shown = axes.scatter(
            j, i, c=panel.data[i, j], s=(CELL - 1.6) ** 2, marker=_rounded_square(Outline), cmap=colours,
            vmin=lowest, vmax=0.0, linewidths=0,
        )  # fmt: skip
    width = figure.get_size_inches()[0] * 72
    bar = figure.colorbar(shown, cax=figure.add_axes(((width - 52) / width, 0.3, 9 / width, 0.4)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, colors=GREY, length=0)
    bar.ax.set_title("added", fontsize=10, color=INK, pad=6)
    _save(figure, name)


def draw_tiles(name: str, masks: list[tuple[str, BlockMask]]) -> None:
    """Element by element, coloured by the kind of tile it is in; lines between tiles."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([FORBIDDEN, TESTED, OPEN, ALLOWED])
    entries: list[tuple[str | None, str]] = [
        (ALLOWED, "full tile: computed, not masked"), (FORBIDDEN, "empty tile: not visited"),
        (OPEN, "partial tile: takes part"), (TESTED, "partial tile: masked"),
    ]  # fmt: skip
    figure, all_axes = _figure([(136.0, 136.0)] * len(masks), entries)
    for axes, (title, mask) in zip(all_axes, masks, strict=True):
        dense, kind = mask.to_dense()[0, 0], kinds(mask)
        kind = kind.repeat_interleave(128, 0).repeat_interleave(128, 1)
        shade = torch.where(kind == 0, 0, torch.where(kind == 1, 3, 1 + dense.int()))
        axes.imshow(shade[::4, ::4], cmap=colours, vmin=0, vmax=3, extent=(0, 1024, 1024, 0), interpolation="none")
        for edge in range(128, 1024, 128):
            axes.axhline(edge, color="white", linewidth=1.2)
            axes.axvline(edge, color="white", linewidth=1.2)
        _plain(axes, f"{title}\n{mask.sparsity:.0%} of the tiles are empty")
        axes.set_xticks(range(0, 1025, 512))
        axes.set_yticks(range(0, 1025, 512))
    _save(figure, name)


def _figure(
    sizes: list[tuple[float, float]], entries: list[tuple[str | None, str]], right: float = 0.0
) -> tuple[Any, list[Any]]:
    """A figure with axes of the sizes (width, height) in points, PER_ROW beside each other, and a legend below.

    Args:
        entries: colour and text of each part of the legend; without a colour, the dot.
        right: room to leave at the right.
    """
    import matplotlib.pyplot as plt

    lines = [sizes[start : start + PER_ROW] for start in range(0, len(sizes), PER_ROW)]
    column = max(width for width, _ in sizes)  # all panels of a column begin at the same place
    width = MARGIN + PER_ROW * column + (PER_ROW - 1) * GAP + 14 + right
    legend = _legend_lines(entries, width)
    footer = LINE * len(legend) + 14 if legend else 0.0
    height = sum(TOP + max(tall for _, tall in line) + BELOW for line in lines) + footer
    figure = plt.figure(figsize=(width / 72, height / 72))
    all_axes, top = [], height
    for line in lines:
        top -= TOP
        for number, (wide, tall) in enumerate(line):
            left = MARGIN + number * (column + GAP)
            all_axes.append(figure.add_axes((left / width, (top - tall) / height, wide / width, tall / height)))
        top -= max(tall for _, tall in line) + BELOW
    if legend:
        _draw_legend(figure, legend, width, height, footer)
    return figure, all_axes


def _rounded_square(outline: Any) -> Any:
    """A marker of side 1: one shape that every cell of the file refers to."""
    r, c = 0.5, 0.34
    points = [(-c, -r), (c, -r), (r, -r), (r, -c), (r, c), (r, r), (c, r), (-c, r), (-r, r), (-r, c), (-r, -c),
              (-r, -r), (-c, -r), (-c, -r)]  # fmt: skip
    move, line, curve, close = outline.MOVETO, outline.LINETO, outline.CURVE3, outline.CLOSEPOLY
    codes = [move, line, curve, curve, line, curve, curve, line, curve, curve, line, curve, curve, close]
    return outline(points, codes)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, pad=5, linespacing=1.25)
    axes.set_xlabel("key j", fontsize=10, color=INK, labelpad=2)
    axes.set_ylabel("query i", fontsize=10, color=INK, labelpad=2)
    axes.tick_params(length=0, pad=2, labelsize=9, colors=GREY)
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _matrix_axes(axes: Any, rows: int, columns: int, title: str) -> None:
    _plain(axes, title)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(0, columns, 1 if columns <= 8 else 2))
    axes.set_yticks(range(0, rows, 1 if rows <= 8 else 2))


def _legend_lines(entries: list[tuple[str | None, str]], width: float) -> list[list[tuple[str | None, str]]]:
    """The entries in as many lines as the width asks for."""
    lines: list[list[tuple[str | None, str]]] = []
    used = width
    for entry in entries:
        if used + _entry_width(entry[1]) > width:
            lines.append([])
            used = 14.0
        lines[-1].append(entry)
        used += _entry_width(entry[1])
    return lines


def _entry_width(text: str) -> float:
    return 15 + 5.6 * len(text) + 14


def _draw_legend(
    figure: Any, lines: list[list[tuple[str | None, str]]], width: float, height: float, footer: float
) -> None:
    """Swatches with their texts; without a colour, the dot."""
    axes = figure.add_axes((0, 0, 1, footer / height))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, footer)
    for number, line in enumerate(lines):
        x, y = 14.0, footer - LINE * (number + 0.5)
        for colour, text in line:
            axes.scatter([x + 5], [y], s=70, marker="s", color=colour or ALLOWED, linewidths=0)
            if colour is None:
                axes.scatter([x + 5], [y], s=9, color="white", linewidths=0)
            axes.text(x + 15, y, text, fontsize=10, color=INK, va="center_baseline")
            x += _entry_width(text)


def _save(figure: Any, name: str) -> None:
    import matplotlib.pyplot as plt

    IMAGES.mkdir(exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Title": name, "Description": f"data {digest(name)}"}
    figure.savefig(IMAGES / f"{name}.svg", metadata=metadata, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Draw every picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "fastattn", "font.family": "DejaVu Sans", "image.composite_image": False}
    )
    for name, panels in CELLS.items():
        draw_cells(name, panels())
    draw_heat("alibi", alibi())
    draw_tiles("block-mask", block_masks())


if __name__ == "__main__":
    main()

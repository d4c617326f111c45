"""How close packed documents can come to the rate of one long causal sequence on this CPU, and how close they are.

`python -m benchmarks.tools.cpu_documents`: float32, one thread, 8 heads of 64, rates per allowed pair. Tiles of
registers compute whole vectors of keys for groups of rows, so a short document computes more pairs than it allows:
"products" is the limit if only products took time. "and memory" adds the time of one pass over the tensors, by
`torch.addcmul`, which reads three and writes one; it adds two for a backward pass, which reads five and writes three.
"batch" is the rate of `fastattn.attention` on a batch of sequences of that length, which packs nothing.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import fastattn
from benchmarks.harness.problems import document_lengths
from fastattn.backends.cpu import library

HEADS, HEAD_DIM, TOKENS = 8, 64, 1024
SECONDS = 1.5  # for each line
MODES = ("forward", "backward")
PASSES = {"forward": 1, "backward": 2}


class Tile(NamedTuple):
    """Rows and lanes of a tile of registers, and rows of a part at the diagonal: csrc/cpu/product.h, problem.h."""

    rows: int
    lanes: int
    part: int


TILES = {"baseline": Tile(6, 4, 6), "avx2": Tile(6, 8, 6), "avx512": Tile(12, 16, 6), "avx512_bf16": Tile(12, 16, 6)}


def computed_pairs(length: int, tile: Tile) -> dict[str, float]:
    """Pairs for which a causal sequence up to 128 long is multiplied, in the mean over the products of each mode."""
    groups = [(row, min(row + tile.rows, length)) for row in range(0, length, tile.rows)]
    parts = [(row, min(row + tile.part, end)) for start, end in groups for row in range(start, end, tile.part)]
    scores = sum((end - row) * -(-end // tile.lanes) * tile.lanes for row, end in groups)
    values = sum((end - row) * end for row, end in parts)
    of_keys = sum((end - key) * (length - key) for key, end in groups)
    # Forward: S, O. Backward: S, dP; dQ; dV, dK.
    return {"forward": (scores + values) / 2, "backward": (2 * scores + values + 2 * of_keys) / 5}


def bound(lengths: Sequence[int], tile: Tile, mode: str) -> float:
    """Allowed pairs beside those computed."""
    allowed = sum(n * (n + 1) / 2 for n in lengths)
    return allowed / sum(computed_pairs(n, tile)[mode] if n <= 128 else n * (n + 1) / 2 for n in lengths)


class Case:
    """Documents of these lengths, packed or as a batch, and what their calls and a pass over their tensors took,
    seconds."""

    def __init__(self, lengths: Sequence[int], packed: bool = True):
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        shape = (int(starts[-1]), HEADS, HEAD_DIM) if packed else (len(lengths), HEADS, lengths[0], HEAD_DIM)
        self.inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        self.plain = [x.detach() for x in self.inputs]
        self.gradient, self.target = torch.randn(shape), torch.empty(shape)
        self.call = functools.partial(fastattn.attention, causal=True, backend="cpu")
        if packed:
            self.call = functools.partial(
                fastattn.attention_varlen, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, backend="cpu"
            )
        self.pairs = sum(n * (n + 1) // 2 for n in lengths)
        self.times: dict[str, list[float]] = {name: [] for name in (*MODES, "pass")}

    def run(self) -> None:
        out = self.call(*self.inputs)
        self.time("backward", lambda: torch.autograd.grad(out, self.inputs, self.gradient))
        self.time("forward", lambda: self.call(*self.plain))
        self.time("pass", lambda: torch.addcmul(*self.plain, out=self.target))

    def time(self, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        self.times[name].append(time.perf_counter() - start)

    def of(self, name: str) -> float:
        """Seconds for each allowed pair."""
        return statistics.median(self.times[name]) / self.pairs


def measure(lengths: Sequence[int], tile: Tile) -> dict[str, tuple[float, ...]]:
    """(share of the rate of one causal sequence, the most that products allow, and that memory allows beside them, and
    the share of a batch; NaN for documents of different lengths)."""
    own, one = Case(lengths), Case([TOKENS])
    batch = None if len(set(lengths)) > 1 else Case(lengths, packed=False)
    end = time.perf_counter() + SECONDS
    while len(own.times["forward"]) < 3 or time.perf_counter() < end:
        for case in (own, one, batch):
            if case:
                case.run()
    found = {}
    for mode in MODES:
        products, reading = bound(lengths, tile, mode), PASSES[mode] * own.of("pass") / one.of(mode)
        as_batch = one.of(mode) / batch.of(mode) if batch else math.nan
        found[mode] = one.of(mode) / own.of(mode), products, 1 / (1 / products + reading), as_batch
    return found


def main() -> None:
    torch.set_num_threads(1)
    variant = library.load().fastattn_cpu_variant().decode()
    if variant not in TILES:
        raise SystemExit(f"expected a processor whose kernels are {', '.join(TILES)}, got {variant}")
    print(f"share of the rate of one causal sequence of {TOKENS} tokens, {variant}, one thread")
    print("documents of    " + "".join(f"{mode:>9} products and memory batch" for mode in MODES))
    mixed = document_lengths(TOKENS)
    named = {str(n): [n] * (TOKENS // n) for n in (17, 43, 100)} | {f"{TOKENS // len(mixed)}, mixed": mixed}
    for name, lengths in named.items():
        columns = measure(lengths, TILES[variant]).values()
        print(f"{name:16}" + "".join("{:9.2f} {:8.2f} {:10.2f} {:5.2f}".format(*column) for column in columns))


if __name__ == "__main__":
    main()

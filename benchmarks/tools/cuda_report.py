"""Which resources the kernels of csrc/cuda need, and how close to the matrix peak their loops can come, without a GPU.

    python -m benchmarks.tools.cuda_report

compiles them with nvcc and prints of each kernel registers, spills, the counts of the inner loop on tiles without a
mask, and two predictions for it by the figures of `static_model`: ``in step``, as if all consumers did the same at the
same time, and ``apart``, where a walk through the loop lets each go on when it can. In the forward kernels consumers
take turns in starting products; in the backward passes they do not. A backward computation is the passes of its head
dim one after another. Nothing is fitted to a GPU; loads are taken to be there in time, within what the L2 cache gives.
``--store`` keeps the shares where the first run on a GPU looks for them, to print them beside what it measures.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import predictions, provenance, results
from benchmarks.harness.peers import CUDA
from fastattn.backends import cuda
from fastattn.kernels import config

from . import sass, static_model
from .sass import Loop

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
STORED = predictions.HERE / "sm_90-cuda.csv"
KEPT = Path(__file__).resolve().parents[2] / ".cache" / "cuda_report"
COMMAND = (
    "nvcc",
    "-O3",
    "-std=c++17",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-cubin",
    "-Xptxas=-v",
    "-Werror=all-warnings",
)
GROUP_ROWS = 64  # that a warp group computes
SCORES: dict[config.Kernel, int] = {"forward": 1, "dkdv": 2, "dk": 2, "dv": 1, "dq": 2}
"""products over the head dim in each pass: scores, and of the gradient with the values"""
SUMS: dict[config.Kernel, int] = {"forward": 1, "dkdv": 2, "dk": 1, "dv": 1, "dq": 1}
"""products over the rows of a tile in each pass"""
QUEUED_PRODUCTS = 3  # that a warp group may have waiting behind the one that runs
QUEUED = 2  # instructions of a slow unit


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    dtype: str
    dim: int
    capped: bool
    """with a softcap"""
    what: config.Kernel
    """which pass: forward, or of the backward ``dkdv``, ``dk``, ``dv`` or ``dq``"""
    registers: int
    spilled: int
    """bytes"""
    remark: bool
    """warnings of the assembler about wgmma or setmaxnreg: products wait for one another, or registers are not moved"""
    loop: Loop
    """over tiles, without the instructions of the mask"""

    def consumers(self) -> int:
        """Warp groups that compute: all registers are given out at the start, and one group more loads."""
        return static_model.REGISTERS // (128 * self.registers) - 1


def main_loop(section: str) -> Loop:
    """The first of the innermost loops with products and exponentials, as it runs on a tile without a mask.

    What a branch around the mask leaves out is left out: the mask finds the sequence of a row in a loop of its own.
    """
    code, labels, jumps = [], {}, []
    for line in section.splitlines():
        if label := sass._LABEL.match(line):
            labels[label[1]] = len(code)
        elif (instruction := sass._INSTRUCTION.search(line)) is not None:
            code.append(sass.Instruction(instruction[1], instruction[2].strip()))
            if code[-1].starts("BRA") and (target := sass._TARGET.search(instruction[2])):
                jumps.append((len(code) - 1, target[1]))
    branches = [(at, labels[name]) for at, name in jumps if name in labels]
    spans = [(to, at + 1) for at, to in branches if to <= at]
    spans = [span for span in spans if _computes(code[slice(*span)])]
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    first, last = min(inner)
    masks = [n for n in range(first, last) if code[n].starts("FSEL") and "-INF" in code[n].operands]
    for at, to in branches:
        if masks and first <= at < masks[0] and masks[-1] < to < last:
            return code[first : at + 1] + code[to:last]
    return code[first:last]


def _computes(loop: Loop) -> bool:
    return any(i.wgmma_shape() for i in loop) and any(i.opcode.startswith("MUFU.EX2") for i in loop)


def compile_source() -> tuple[str, str]:
    """The assembler's report and the machine code, as text. Kept in ``.cache`` until a source or the compiler changes.

    Raises:
        FileNotFoundError: nvcc is not installed.
        RuntimeError: it fails; with what it says.
    """
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((COMMAND, version, cuda.source_digest(SOURCES))).encode()).hexdigest()[:16]
    kept = KEPT / f"{digest}.json"
    if not kept.is_file():
        with ThreadPoolExecutor() as pool:
            parts = list(pool.map(_compile, sorted(SOURCES.glob("*.cu"))))
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=KEPT, delete=False) as file:
            json.dump(["".join(part) for part in zip(*parts, strict=True)], file)
        Path(file.name).rename(kept)
    report, listing = json.loads(kept.read_text())
    return report, listing


def _compile(source: Path) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.cubin"
        run = subprocess.run([*COMMAND, str(source), "-o", str(target)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        return run.stdout + run.stderr, sass.disassemble(target.read_bytes())


_NAME = re.compile(r"attention_(?:forward|backward)I\w*?(Half|BFloat)E(?:Li(\d+)E)(?:L\w*?4PassE(\d)E)?Lb([01])")
_PASSES: tuple[config.Kernel, ...] = ("dkdv", "dk", "dv", "dq")
"""by number, as csrc/cuda/passes.cuh has them"""
Name = tuple[str, int, bool, config.Kernel]
"""dtype, head dim, whether there is a softcap, and which pass"""


def _name(text: str) -> Name | None:
    """None for a kernel without products."""
    found = _NAME.search(text)
    if found is None:
        return None
    what: config.Kernel = "forward" if found[3] is None else _PASSES[int(found[3])]
    return found[1], int(found[2]), found[4] == "1", what


def sections(listing: str) -> dict[Name, str]:
    """The machine code of each kernel."""
    parts = re.split(r"\.section\s+\.text\.", listing)[1:]
    return {name: part for part in parts if (name := _name(part.partition("\n")[0])) is not None}


def kernels(report: str, listing: str) -> list[Kernel]:
    """Every kernel, by softcap, head dim and dtype."""
    remarks = [_name(line) for line in report.splitlines() if "(C75" in line]
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        if (name := _name(part.partition("'")[0])) is not None:
            found[name] = int(re.findall(r"Used (\d+) registers", part)[0]), spilled
    compiled = []
    for name, section in sections(listing).items():
        registers, spilled = found[name]
        compiled.append(Kernel(*name, registers, spilled, name in remarks, main_loop(section)))
    return sorted(compiled, key=lambda kernel: (kernel.what, kernel.capped, kernel.dim, kernel.dtype))


class _Unit:
    """A unit that takes an instruction every so many cycles; a warp continues while few instructions wait."""

    def __init__(self, queue: int) -> None:
        self.queue, self.free = queue, 0.0

    def take(self, now: float, cycles: float) -> float:
        """When the warp that gives it work at ``now`` goes on."""
        self.free = max(self.free, now) + cycles
        return max(now, self.free - self.queue * cycles)


def apart(loop: Loop, consumers: int, iterations: int = 12) -> float:
    """Cycles of an iteration of all consumers on a quarter of a multiprocessor, which has one warp of each.

    BAR.SYNC waits for the turn, BAR.ARV passes it on; the first is the first consumer's. A loop without them has no
    turns.
    """
    issue, tensor = _Unit(0), _Unit(QUEUED_PRODUCTS)
    exponentials, half_rate = _Unit(QUEUED), _Unit(QUEUED)
    now = [0.0] * consumers
    position = [0] * consumers
    groups = [collections.deque([0.0] * 4, maxlen=4) for _ in range(consumers)]
    passed: list[list[float]] = [[0.0], *([] for _ in range(consumers - 1))]  # to each: when its turns came
    taken = [0] * consumers
    ends: list[list[float]] = [[] for _ in range(consumers)]
    while any(len(e) < iterations for e in ends):
        ready = []
        for c in range(consumers):
            instruction = loop[position[c]]
            if instruction.opcode.startswith("BAR.SYNC"):
                if taken[c] < len(passed[c]):
                    ready.append((max(now[c], passed[c][taken[c]]), c))
            else:
                ready.append((now[c], c))
        start, c = min(ready)
        instruction = loop[position[c]]
        start = max(start, issue.free)
        issue.free = start + 1
        end = start + 1
        if cycles := static_model.wgmma_cycles(instruction):
            end = tensor.take(end, cycles)
            if instruction.operands.endswith("gsb0"):
                groups[c].append(tensor.free + static_model.WGMMA_LATENCY)
        elif instruction.starts("MUFU"):
            end = exponentials.take(end, static_model.EXPONENTIAL_CYCLES)
        elif instruction.starts(*static_model._HALF_RATE):
            end = half_rate.take(end, static_model.HALF_RATE_CYCLES)
        elif instruction.opcode == "WARPGROUP.DEPBAR.LE":
            end = max(end, groups[c][-1 - int(instruction.operands.split(",")[1], 16)])
        elif instruction.opcode.startswith("BAR.SYNC"):
            taken[c] += 1
        elif instruction.opcode.startswith("BAR.ARV"):
            passed[(c + 1) % consumers].append(end)
        now[c] = end
        position[c] = (position[c] + 1) % len(loop)
        if position[c] == 0:
            ends[c].append(end)
    return (ends[0][iterations - 1] - ends[0][2]) / (iterations - 3)


def tile_of(kernel: Kernel) -> int:
    """How many rows that pass by, keys or queries, an iteration handles."""
    over_tile = sass.count(kernel.loop).wgmma - SCORES[kernel.what] * kernel.dim // 16
    return 16 * over_tile // SUMS[kernel.what]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Of the inner loop of a kernel: cycles of a tile and block by unit, and shares of the tensor peak."""

    rows: int
    """that a block computes"""
    tile: int
    limits: dict[str, float]
    cycles: float
    """with the consumers apart"""
    in_step: float
    apart: float

    def bound(self) -> str:
        """The name of what limits, or ``waits`` where no unit is busy for 80 % of the time."""
        busiest = max(self.limits, key=lambda name: self.limits[name])
        return busiest if self.limits[busiest] >= 0.8 * self.cycles else "waits"


def predict(kernel: Kernel) -> Predicted:
    """The two predictions for a kernel."""
    tile, consumers = tile_of(kernel), kernel.consumers()
    rows, warps = GROUP_ROWS * consumers, 4 * consumers
    blocks = (rows, tile) if kernel.what in ("forward", "dq") else (tile, rows)
    units = static_model.predict(kernel.loop, kernel.what, *blocks, kernel.dim, warps, kernel.registers, 0)
    useful = static_model.PRODUCTS[kernel.what] * 2 * rows * tile * kernel.dim / static_model.FLOP_PER_CYCLE
    limits = {name: getattr(units, name) for name in ("tensor", "issue", "exponentials", "half_rate", "shared", "l2")}
    cycles = max(apart(kernel.loop, consumers), *limits.values())
    in_step = useful / max(units.l2, static_model.walk(kernel.loop, warps))
    return Predicted(rows, tile, limits, cycles, in_step, useful / cycles)


def row(kernel: Kernel) -> dict[str, str]:
    """The table's row of a kernel."""
    counts, predicted = sass.count(kernel.loop), predict(kernel)
    return {
        "pass": kernel.what,
        "dtype": kernel.dtype,
        "dim": str(kernel.dim),
        "softcap": "yes" if kernel.capped else "no",
        "rows": str(predicted.rows),
        "tile": str(predicted.tile),
        "registers": str(kernel.registers),
        "spilled": str(kernel.spilled),
        "serialised": "yes" if counts.serialised or kernel.remark else "no",
        "instructions": str(counts.instructions),
        "wgmma": str(counts.wgmma),
        **{name: f"{cycles:.0f}" for name, cycles in predicted.limits.items()},
        "in step": f"{predicted.in_step:.3f}",
        "apart": f"{predicted.apart:.3f}",
        "bound": predicted.bound(),
    }


def backward(compiled: list[Kernel]) -> list[dict[str, str]]:
    """The passes of each backward computation together, as a share of the peak that counts five products."""
    groups: dict[tuple[str, int, bool], list[Kernel]] = collections.defaultdict(list)
    for kernel in compiled:
        if kernel.what != "forward":
            groups[kernel.dtype, kernel.dim, kernel.capped].append(kernel)
    table = []
    for (dtype, dim, capped), passes in groups.items():
        predicted: dict[config.Kernel, Predicted] = {kernel.what: predict(kernel) for kernel in passes}
        in_step: dict[config.Kernel, float] = {what: p.in_step for what, p in predicted.items()}
        by_themselves: dict[config.Kernel, float] = {what: p.apart for what, p in predicted.items()}
        shares = {"in step": in_step, "apart": by_themselves}
        table.append(
            {"dtype": dtype, "dim": str(dim), "softcap": "yes" if capped else "no", "passes": " ".join(predicted)}
            | {"products": str(sum(static_model.PRODUCTS[what] for what in predicted))}
            | {name: f"{static_model.backward_share(of):.3f}" for name, of in shares.items()}
        )
    return table


DTYPES = {"BFloat": "bf16", "Half": "fp16"}


def stored(compiled: list[Kernel]) -> list[results.Row]:
    """The predictions as rows of results, for calls without a softcap of any length, causal or not."""
    commit, dirty = provenance.revision()
    stamp = {"commit": commit, "dirty": dirty, "digest": cuda.source_digest(SOURCES)}
    forward = [row(kernel) for kernel in compiled if kernel.what == "forward"]
    return [
        dict.fromkeys(results.FIELDS, "")
        | {"case": "grid", "mode": mode, "provider": CUDA, "dtype": DTYPES[r["dtype"]], "head_dim": r["dim"]}
        | {"of_matmul": r["apart"], "note": f"static model, consumers apart; in step {r['in step']}"}
        | stamp
        for mode, table in (("forward", forward), ("backward", backward(compiled)))
        for r in table
        if r["softcap"] == "no"
    ]


def main() -> None:
    """Command line: compile, print the tables, and store the predictions where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help=f"also write the shares to {STORED}")
    args = parser.parse_args()
    compiled = kernels(*compile_source())
    print("Cycles of a tile and block. Shares of the tensor peak in the inner loop: a filter for gaps above 15 %.")
    print(static_model.text([row(kernel) for kernel in compiled]))
    print("\nThe passes of the backward together, as shares that count five products")
    print(static_model.text(backward(compiled)))
    if args.store:
        results.upsert(STORED, stored(compiled))


if __name__ == "__main__":
    main()

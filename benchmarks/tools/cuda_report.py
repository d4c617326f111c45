"""Which resources the kernels of csrc/cuda need, and how close to the matrix peak their loops can come, without a GPU.

    python -m benchmarks.tools.cuda_report

compiles them with nvcc and prints registers and spills; of the forward kernels also the counts of the inner loop on
tiles without a mask, and two predictions for it by the figures of `static_model`: ``in step``, as if all consumers did
the same at the same time, and ``in turns``, for which a simulation lets each start products only in its turn.
Nothing is fitted to a GPU. Loads are assumed to arrive in time, within the rate of the L2 cache.
"""

import collections
import dataclasses
import hashlib
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastattn.backends import cuda

from . import sass, static_model
from .sass import Loop

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
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
GROUP_ROWS = 64  # query rows of a warp group that computes
QUEUED_PRODUCTS = 3  # that a warp group may have waiting after the one that runs
QUEUED = 2  # instructions of a slow unit


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    dtype: str
    dim: int
    capped: bool
    """with a softcap"""
    what: str
    """which pass: forward, or of the backward ``dkdv``, ``dk``, ``dv`` or ``dq``"""
    registers: int
    spilled: int
    """bytes"""
    remark: bool
    """warnings of the assembler about wgmma or setmaxnreg: products wait for one another, or registers are not moved"""
    loop: Loop
    """over keys, without the instructions of the mask; of a backward pass none"""

    def consumers(self) -> int:
        """Warp groups that compute: all registers are given out at the start, and one group more loads."""
        return static_model.REGISTERS // (128 * self.registers) - 1


def without_mask(loop: Loop) -> Loop:
    """The loop on a tile that every row sees, without the code that a branch around the mask skips."""
    masks = [n for n, i in enumerate(loop) if i.starts("FSEL") and "-INF" in i.operands]
    if not masks:
        return loop
    branch = max(n for n, i in enumerate(loop[: masks[0]]) if i.starts("BRA"))
    return loop[: branch + 1] + loop[masks[-1] + 1 :]


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
_PASSES = ("dkdv", "dk", "dv", "dq")
"""by number, as csrc/cuda/passes.cuh has them"""
Name = tuple[str, int, bool, str]
"""dtype, head dim, whether there is a softcap, and which pass"""


def _name(text: str) -> Name | None:
    """None for a kernel without products."""
    found = _NAME.search(text)
    if found is None:
        return None
    what = "forward" if found[3] is None else _PASSES[int(found[3])]
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
        loop = without_mask(*sass.main_loops(section)) if name[3] == "forward" else []
        registers, spilled = found[name]
        compiled.append(Kernel(*name, registers, spilled, name in remarks, loop))
    return sorted(compiled, key=lambda kernel: (kernel.what, kernel.capped, kernel.dim, kernel.dtype))


class _Unit:
    """A unit that takes an instruction every so many cycles; a warp continues while few instructions wait."""

    def __init__(self, queue: int) -> None:
        self.queue, self.free = queue, 0.0

    def take(self, now: float, cycles: float) -> float:
        """When the warp that gives it work at ``now`` goes on."""
        self.free = max(self.free, now) + cycles
        return max(now, self.free - self.queue * cycles)


def in_turns(loop: Loop, consumers: int, iterations: int = 12) -> float:
    """Cycles of an iteration of all consumers on a quarter of a multiprocessor, which has one warp of each.

    BAR.SYNC waits for the turn, BAR.ARV passes it on; the first is the first consumer's.
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


def keys_of(loop: Loop, dim: int) -> int:
    """How many keys an iteration handles: it has dim / 16 products for the scores, the others take 16 keys each."""
    return 16 * (sass.count(loop).wgmma - dim // 16)


def resources(kernel: Kernel) -> dict[str, str]:
    """The table's row of a backward pass."""
    return {
        "pass": kernel.what,
        "dtype": kernel.dtype,
        "dim": str(kernel.dim),
        "softcap": "yes" if kernel.capped else "no",
        "registers": str(kernel.registers),
        "spilled": str(kernel.spilled),
        "remarks": "yes" if kernel.remark else "none",
    }


def row(kernel: Kernel) -> dict[str, str]:
    """The table's row of a forward kernel."""
    counts, keys, consumers = sass.count(kernel.loop), keys_of(kernel.loop, kernel.dim), kernel.consumers()
    rows, warps = GROUP_ROWS * consumers, 4 * consumers
    units = static_model.predict(kernel.loop, "forward", rows, keys, kernel.dim, warps, kernel.registers, 0)
    useful = static_model.PRODUCTS["forward"] * 2 * rows * keys * kernel.dim / static_model.FLOP_PER_CYCLE
    turns = max(in_turns(kernel.loop, consumers), units.l2)
    limits = {name: getattr(units, name) for name in ("tensor", "issue", "exponentials", "half_rate", "l2")}
    busiest = max(limits, key=lambda name: limits[name])
    return {
        "dtype": kernel.dtype,
        "dim": str(kernel.dim),
        "softcap": "yes" if kernel.capped else "no",
        "rows": str(rows),
        "keys": str(keys),
        "registers": str(kernel.registers),
        "spilled": str(kernel.spilled),
        "remarks": "yes" if kernel.remark else "none",
        "instructions": str(counts.instructions),
        "wgmma": str(counts.wgmma),
        **{name: f"{cycles:.0f}" for name, cycles in limits.items()},
        "in step": f"{useful / max(units.l2, static_model.walk(kernel.loop, warps)):.3f}",
        "in turns": f"{useful / turns:.3f}",
        "bound": busiest if limits[busiest] >= 0.8 * turns else "waits",
    }


def main() -> None:
    """Command line: compile and print the table."""
    print(
        "Cycles per tile of keys and block. Shares of the tensor peak in the inner loop: a filter for gaps above 15 %."
    )
    compiled = kernels(*compile_source())
    print(static_model.text([row(kernel) for kernel in compiled if kernel.what == "forward"]))
    print("\nThe backward passes")
    print(static_model.text([resources(kernel) for kernel in compiled if kernel.what != "forward"]))


if __name__ == "__main__":
    main()

"""How close to the matrix peak can a compiled kernel come? This finds gaps above 15 %; it gives no figure in TFLOP/s.

It counts the inner main loop of the compiled code (`sass`) and adds up, per tile and multiprocessor, the cycles of the
tensor cores, of instruction issue, of the exponentials, of shared memory and of the L2 cache. One warp per warp group
then executes the loop in order: products run asynchronously until it waits for them, and it also waits for a copy that
cannot have arrived yet. Nothing here was fitted to a GPU. Compare configurations with it, and distrust differences
below 15 %. Beside published rates it predicts too much: `calibration` states by how much. `tile_search` searches by it.

    python -m benchmarks.tools.static_model --dims 64 128 256 --features plain causal

Only for Hopper (sm_90): `calibration` says what the model lacks of others, `loop_counts` counts the loops of those.
`--store` keeps the shares for the first run on a GPU, which prints them with its measurements.
"""

import argparse
import collections
import csv
import dataclasses
import math
import sys
from pathlib import Path

import triton

from benchmarks.harness import predictions, provenance, results
from fastattn.kernels import config, launch

from . import calls, compile_report
from .sass import Instruction, Loop

# One H100 multiprocessor: NVIDIA's figures for throughput, published microbenchmarks for latencies.
FLOP_PER_CYCLE = 4096  # dense 16-bit products
MULTIPROCESSORS = 132
REGISTERS = 65536
SHARED_MEMORY = 227 * 1024
SHARED_RESERVED = 1024  # by the system, for each program
SHARED_BYTES = 128  # a cycle
L2_BYTES = 28  # a cycle, sustained, when all multiprocessors read
COPY_LATENCY = 700
WGMMA_LATENCY = 32  # from the last product of a group to its result
HMMA_CYCLES = 6.5  # of a quarter's tensor core, for each 16x8x16 product of a warp
EXPONENTIAL_CYCLES = 8  # a quarter of a multiprocessor takes 4 threads a cycle
HALF_RATE_CYCLES = 2  # integer, minimum, maximum, comparison, conversion: 16 threads a cycle

_HALF_RATE = (
    "IADD3", "IMAD", "LEA", "LOP3", "SHF", "SEL", "ISETP", "FSETP", "FMNMX", "FSEL", "PRMT", "F2FP", "PLOP3", "VIADD",
    "IMNMX", "VIMNMX", "MOV", "P2R", "R2P",
)  # fmt: skip
_ACCESS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
PRODUCTS: dict[config.Kernel, int] = {"forward": 2, "dkdv": 4, "dk": 3, "dv": 2, "dq": 3}
OF_KEYS: dict[config.Kernel, int] = {"forward": 1, "dkdv": 2, "dk": 2, "dv": 1, "dq": 2}
"""Of these products those over D columns; the others are over Dv."""
BACKWARD: tuple[config.Kernel, ...] = ("dkdv", "dk", "dv", "dq")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Cycles per tile and multiprocessor, by unit, and what follows from them."""

    tensor: float
    issue: float
    exponentials: float
    half_rate: float
    shared: float
    l2: float
    serial: float
    """of one resident program"""
    programs: int
    """resident on a multiprocessor"""
    share: float
    """useful products of the kernel, as a share of what the tensor cores could do in the same time"""

    def bound(self) -> str:
        """The name of the limit: a unit, or ``waits`` if none is busy for 80 % of the time."""
        units = {name: getattr(self, name) for name in ("tensor", "issue", "exponentials", "half_rate", "shared", "l2")}
        name = max(units, key=lambda unit: units[unit])
        return name if units[name] >= 0.8 * self.cycles() else "waits"

    def cycles(self) -> float:
        """Per tile of each resident program: two programs hide half of each other's waits."""
        overlapped = max(self.tensor, self.issue, self.exponentials, self.half_rate, self.shared, self.l2)
        return max(overlapped, self.serial if self.programs == 1 else (overlapped + self.serial) / 2)


def wgmma_cycles(instruction: Instruction) -> float:
    """Cycles of the tensor cores for one warp group's product, 0 for another instruction.

    Operands from shared memory arrive at 128 bytes a cycle: small n is bound by A.
    """
    shape = instruction.wgmma_shape()
    if shape is None:
        return 0.0
    n, k, shared = shape
    return max(64 * n * k * 2 / FLOP_PER_CYCLE, (n * k * 2 + 64 * k * 2 * shared) / SHARED_BYTES)


def shared_bytes(instruction: Instruction) -> float:
    """The bytes that one warp's instruction moves through shared memory, which is also the first-level cache."""
    shape = instruction.wgmma_shape()
    if shape is not None:
        n, k, shared = shape
        return (n * k * 2 + 64 * k * 2 * shared) / 4  # a warp's share of the group's operands
    if instruction.starts("LDSM", "STSM"):
        return 512.0 if instruction.opcode.endswith(".4") else 256.0 if instruction.opcode.endswith(".2") else 128.0
    if instruction.starts("LDS", "STS", "LDGSTS", "LDL", "STL"):
        bits = next((_ACCESS_BITS[part] for part in instruction.opcode.split(".") if part in _ACCESS_BITS), 32)
        return 32 * bits / 8
    return 0.0


def walk(loop: Loop, warps: int) -> float:
    """Cycles of an iteration if every warp executes the loop in order, with all warps of a quarter in step."""
    resident = warps / 4  # warps of a quarter of the multiprocessor, and warp groups
    now, tensor_free, unit_free = 0.0, 0.0, 0.0
    groups: collections.deque[float] = collections.deque([0.0], maxlen=64)
    copies: collections.deque[float] = collections.deque([-math.inf] * 64, maxlen=64)
    ends = []
    for _ in range(6):
        for instruction in loop:
            now += resident
            if cycles := wgmma_cycles(instruction):
                tensor_free = max(tensor_free, now) + cycles * resident
                if instruction.operands.endswith("gsb0"):
                    groups.append(tensor_free + WGMMA_LATENCY)
            elif instruction.starts("HMMA"):
                tensor_free = max(tensor_free, now) + HMMA_CYCLES * resident
                now = max(now, tensor_free - 2 * HMMA_CYCLES * resident)  # a short queue, then the warp waits
            elif instruction.starts("MUFU"):
                unit_free = max(unit_free, now) + EXPONENTIAL_CYCLES * resident
                now = max(now, unit_free - 2 * EXPONENTIAL_CYCLES * resident)
            elif instruction.starts("LDGDEPBAR"):
                copies.append(now + COPY_LATENCY)
            elif instruction.starts("DEPBAR") and instruction.operands.startswith("SB0,"):
                now = max(now, copies[-1 - int(instruction.operands.split(",")[1], 16)])
            elif instruction.opcode == "WARPGROUP.DEPBAR.LE":
                pending = int(instruction.operands.split(",")[1], 16)
                now = max(now, groups[-1 - pending] if pending < len(groups) else now)
        ends.append(now)
    return (ends[-1] - ends[2]) / (len(ends) - 3)


def resident_programs(registers: int, warps: int, shared: int) -> int:
    """How many programs a multiprocessor holds by registers, which come in units of 8 a thread, and shared memory."""
    by_registers = REGISTERS // (32 * warps * 8 * math.ceil(registers / 8))
    return max(1, min(by_registers, SHARED_MEMORY // (shared + SHARED_RESERVED), 64 // warps))


def predict(
    loop: Loop, kernel: config.Kernel, block_m: int, block_n: int, dim: int, warps: int, registers: int, shared: int,
    v_dim: int | None = None,
) -> Prediction:  # fmt: skip
    """The model for one main loop of one of ``PRODUCTS`` with head dims D and Dv, by default the same."""
    v_dim = dim if v_dim is None else v_dim
    resident = warps / 4
    walked = block_n if kernel in ("forward", "dq") else block_m
    hmma = sum(i.starts("HMMA") for i in loop) * HMMA_CYCLES
    programs = resident_programs(registers, warps, shared)
    prediction = Prediction(
        tensor=(sum(map(wgmma_cycles, loop)) + hmma) * resident,
        issue=len(loop) * resident,
        exponentials=sum(i.starts("MUFU") for i in loop) * EXPONENTIAL_CYCLES * resident,
        half_rate=sum(i.starts(*_HALF_RATE) for i in loop) * HALF_RATE_CYCLES * resident,
        shared=sum(map(shared_bytes, loop)) * warps / SHARED_BYTES,
        l2=walked * (dim + v_dim) * 2 / L2_BYTES,  # two tiles of rows in each iteration
        serial=walk(loop, warps),
        programs=programs,
        share=0.0,
    )
    columns = OF_KEYS[kernel] * dim + (PRODUCTS[kernel] - OF_KEYS[kernel]) * v_dim
    useful = 2 * block_m * block_n * columns / FLOP_PER_CYCLE
    return dataclasses.replace(prediction, share=useful / prediction.cycles())


def wave_share(tiles: int, programs: int) -> float:
    """How much of the machine ``tiles`` equal programs keep busy, ``programs`` at a time on each multiprocessor."""
    slots = MULTIPROCESSORS * programs
    return tiles / (math.ceil(tiles / slots) * slots)


def backward_share(shares: dict[config.Kernel, float]) -> float:
    """The share for the five products of a backward pass, if its kernels do those in PRODUCTS at these shares."""
    return 5 / sum(PRODUCTS[kernel] / share for kernel, share in shares.items())


def rows(results: list[compile_report.Result], batch: int, heads: int, length: int) -> list[dict[str, str]]:
    """A row of the table for each kernel that was compiled, and one for each backward pass."""
    table: list[dict[str, str]] = []
    backward: dict[tuple[int, str], dict[config.Kernel, float]] = collections.defaultdict(dict)
    for r in results:
        if r.error or r.loop is None or r.kernel not in PRODUCTS:
            continue
        block_m, block_n, warps = r.tile()
        v_dim = calls.value_dim(r.dim, calls.FEATURES[r.feature])
        p = predict(r.loop, r.kernel, block_m, block_n, r.dim, warps, r.registers, r.shared, v_dim)
        rows = block_m if r.kernel in ("forward", "dq") else block_n
        waves = wave_share(math.ceil(length / rows) * batch * heads, p.programs)
        if r.kernel in BACKWARD:
            backward[r.dim, r.feature][r.kernel] = p.share
        cycles = {
            name: f"{getattr(p, name):.0f}" for name in ("tensor", "issue", "exponentials", "half_rate", "shared")
        }
        table.append(
            {"triton": triton.__version__, "kernel": r.kernel, "dim": str(r.dim), "feature": r.feature}
            | {"config": r.config, **cycles, "l2": f"{p.l2:.0f}", "serial": f"{p.serial:.0f}"}
            | {"local": str(r.local), "programs": str(p.programs), "waves": f"{waves:.2f}"}
            | {"bound": p.bound(), "share": f"{p.share:.3f}"}
        )
    for (dim, feature), shares in backward.items():
        if shares.keys() == {*config.key_passes("sm_90", dim), "dq"}:
            head = {"triton": triton.__version__, "kernel": "backward", "dim": str(dim), "feature": feature}
            table.append(dict.fromkeys(table[0], "") | head | {"share": f"{backward_share(shares):.3f}"})
    return table


def stored(table: list[dict[str, str]]) -> list[results.Row]:
    """The table's forward and backward rows as rows of results: for plain and causal calls of any length."""
    commit, dirty = provenance.revision()
    stamp = {"triton": triton.__version__, "commit": commit, "dirty": dirty, "digest": provenance.digest()}
    found = []
    for row in table:
        if row["kernel"] in ("forward", "backward") and row["feature"] in ("plain", "causal"):
            key = {"case": "grid", "mode": row["kernel"], "provider": "fastattn", "dtype": "bf16"}
            key |= {"head_dim": row["dim"], "causal": results.text(row["feature"] == "causal")}
            note = f"static model, {row['config']}" if row["config"] else "static model"
            found.append(dict.fromkeys(results.FIELDS, "") | key | {"of_matmul": row["share"], "note": note} | stamp)
    return found


def text(table: list[dict[str, str]]) -> str:
    """The table as aligned text."""
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    lines = ["  ".join(name.rjust(width) for name, width in widths.items())]
    lines += ["  ".join(row[name].rjust(width) for name, width in widths.items()) for row in table]
    return "\n".join(lines)


def main() -> None:
    """Command line: compile, print the table, and write it to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(compile_report.DIMS))
    parser.add_argument("--features", nargs="+", choices=calls.FEATURES, default=["plain", "causal"])
    parser.add_argument("--problem", nargs=3, type=int, default=(4, 16, 4096), metavar=("BATCH", "HEADS", "LENGTH"))
    parser.add_argument(
        "--tile", help="instead of the shipped one: block_m,block_n,warps,stages[,split_programs,pipelined]"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parser.add_argument("--store", action="store_true", help=f"also write the shares to {predictions.HERE}")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    cases = compile_report.all_cases(["sm_90"], args.kernel, args.dims, args.features)
    for case in cases:
        case.override = args.tile or ""
    table = rows(compile_report.compile_all(cases, args.jobs), *args.problem)
    if not table:
        sys.exit("no kernel compiled: see python -m benchmarks.tools.compile_report")
    print("A filter for gaps above 15 %: cycles per tile; share of the tensor peak in the inner loop, without waves.")
    print(text(table))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    if args.store:
        results.upsert(predictions.HERE / "sm_90.csv", stored(table))


if __name__ == "__main__":
    main()

"""What can be counted of the kernels compiled for other GPUs than Hopper, too? Nothing here is a rate.

For each kernel: registers and spilled bytes of a thread, shared memory, programs on a multiprocessor; and of the loop
over inner tiles the instructions, those for 1,000 scores, products by their kind, exponentials, spilled registers and
accesses to tensor memory. Low is good but for products. `static_model` predicts a share of the peak for sm_90 alone:
for an A100 it lacks the rates of mma.sync, and for a B200 the products that one thread starts out of tensor memory.

    python -m benchmarks.tools.loop_counts --arch sm_80 sm_90 sm_100 --dims 64 128 256 --features plain causal
"""

import argparse
import dataclasses
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn.kernels import config, launch

from . import calls, compile_report, sass, static_model
from .compile_report import Case, Compiled, Result

ARCHS = ("sm_80", "sm_90", "sm_100")
TENSOR_MEMORY = 512
"""Columns of a multiprocessor of sm_100."""
NOTE = "Counted in compiled code. No rate or share of the peak is predicted here: only `static_model` does, for sm_90."


@dataclasses.dataclass
class Row(Result):
    """A compiled kernel, with the counts of its inner main loop for each warp."""

    programs: int = 0
    tcgen05: int = 0
    exponentials: int = 0
    tensor_memory: int = 0
    """loads and stores"""


COLUMNS = {
    "registers": "registers", "spills": "spills", "shared": "shared", "programs": "programs",
    "instructions": "loop", "per_1000": "per 1000", "mma_sync": "mma.sync", "wgmma": "wgmma", "tcgen05": "tcgen05",
    "exponentials": "exp2", "local": "local", "tensor_memory": "tmem",
}  # fmt: skip
"""Field -> its name in the table."""


def compile_kernel(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[Compiled, int]:
    """As `compile_report.compile_kernel`, but with every target's disassembly, and the columns of tensor memory."""
    kernel, log = compile_report.compile_with_log(source, target, options)
    code = sass.disassemble(kernel.asm["cubin"])
    made = Compiled(compile_report.describe_config(kernel), kernel.metadata.shared, log, code)
    return made, getattr(kernel.metadata, "tmem_size", 0)


def programs(arch: str, registers: int, warps: int, shared: int, columns: int) -> int:
    """How many fit a multiprocessor at a time."""
    reserved = static_model.SHARED_RESERVED
    by_shared = (compile_report.SHARED_LIMIT[arch] + reserved) // (shared + reserved)
    by_columns = TENSOR_MEMORY // columns if columns else by_shared
    return max(1, min(static_model.resident_programs(registers, warps, shared), by_shared, by_columns))


def read(row: Row, made: Compiled, columns: int) -> None:
    """Fill a row in."""
    row.config, row.shared = made.config, made.shared
    compile_report.read_nvidia(row, made)
    block_m, block_n, warps = row.tile()
    row.programs = programs(row.arch, row.registers, warps, row.shared, columns)
    loops = sass.main_loops(made.code)
    if not loops or not block_m:
        return
    counts = sass.count(loops[0])
    row.instructions, row.local, row.exponentials = counts.instructions, counts.local, counts.exponentials
    row.per_1000 = round(counts.instructions * warps * 1000 / (block_m * block_n), 1)
    row.mma_sync, row.wgmma = counts.mma_sync, counts.wgmma
    row.tcgen05 = sum(i.opcode.startswith(("UTCHMMA", "UTCQMMA")) for i in loops[0])
    row.tensor_memory = sum(i.starts("LDTM", "STTM") for i in loops[0])


def count(case: Case) -> Row:
    """Compile a case and count."""
    row = Row(**dataclasses.asdict(case))
    try:
        with compile_report.compiling_for(case, compile_kernel) as compiled:
            calls.launch_kernels(case.kernel, case.dim, calls.FEATURES[case.feature])
        ((made, columns),) = compiled
    except Exception as error:  # any error of a compiler is reported
        row.error = f"{type(error).__name__}: {error}".splitlines()[0]
        return row
    read(row, made, columns)
    return row


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'target':7} {'kernel':8} {'dim':>4} {'features':11} {'config':22} " + " ".join(COLUMNS.values())]
    for row in rows:
        head = f"{row.arch:7} {row.kernel:8} {row.dim:4} {row.feature:11} {row.config:22} "
        values = (f"{getattr(row, field):>{len(name)}}" for field, name in COLUMNS.items())
        lines.append(head + (row.error or " ".join(values)))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["sm_80", "sm_100"])
    parser.add_argument("--kernel", nargs="+", choices=static_model.PRODUCTS, default=list(static_model.PRODUCTS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(compile_report.DIMS))
    parser.add_argument("--features", nargs="+", choices=calls.FEATURES, default=["plain"])
    parser.add_argument("--jobs", type=int, default=2, help="compile this many at a time (default: %(default)s)")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    kernels: list[config.Kernel] = args.kernel
    cases = compile_report.all_cases(args.arch, kernels, args.dims, args.features)
    rows = compile_report.in_processes(count, cases, args.jobs)
    print(f"Triton {triton.__version__}. {NOTE}")
    print(table(rows))
    if any(row.error for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

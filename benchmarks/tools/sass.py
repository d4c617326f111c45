"""The main loops of a compiled kernel, counted from NVIDIA's disassembly: no calibration, no GPU.

A main loop is an innermost loop that takes exponentials. Kernels of `fastattn.kernels` have two: first the one over
inner tiles, then the one over edge tiles. After them some have one more, which runs only if a result is not finite.
"""

import dataclasses
import re
import subprocess
import tempfile

from triton import knobs

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_WGMMA = re.compile(r"[HQI]GMMA\.64x(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``opcode`` with its modifiers, and its operands as text; predicates are left out."""

    opcode: str
    operands: str

    def starts(self, *names: str) -> bool:
        """Whether the opcode without modifiers is one of ``names``."""
        return self.opcode.split(".")[0] in names

    def wgmma_shape(self) -> tuple[int, int, bool] | None:
        """(n, k, whether A comes from shared memory) of a warp group's product; None for other instructions."""
        shape = _WGMMA.match(self.opcode)
        if shape is None:
            return None
        return int(shape[1]), int(shape[2]), self.operands.split(",")[1].strip().startswith("gdesc")


Loop = list[Instruction]


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin, by the nvdisasm that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--no-dataflow", "--no-vliw", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loops(sass: str) -> list[Loop]:
    """The innermost loops that take exponentials, in the order of the code."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append(Instruction(found[1], found[2].strip()))
            target = _TARGET.search(found[2]) if code[-1].starts("BRA") else None
            if target and target[1] in labels:  # backwards
                spans.append((labels[target[1]], len(code)))
    spans = [s for s in set(spans) if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    loops = [code[first:last] for first, last in sorted(spans)]
    return [loop for loop in loops if any(i.opcode.startswith("MUFU.EX2") for i in loop)]


@dataclasses.dataclass(frozen=True)
class Counts:
    """The contents of a main loop: numbers of instructions, for each thread."""

    instructions: int
    local: int
    """loads and stores of spilled registers"""
    wgmma: int
    smallest_n: int
    """of the wgmma shapes 64 x n; 0 without wgmma"""
    serialised: bool
    """each wgmma waits for the one before"""
    mma_sync: int
    exponentials: int
    prefetch: float
    """over how many iterations a copy into shared memory has been under way when it is awaited; 0: issued and awaited
    at once, or loaded into registers"""


def count(loop: Loop) -> Counts:
    """Count one main loop."""
    shapes = [shape for i in loop if (shape := i.wgmma_shape())]
    arrivals = sum(i.opcode == "WARPGROUP.ARRIVE" for i in loop)
    groups = sum(i.starts("LDGDEPBAR") for i in loop)
    waits = [int(i.operands.split(",")[1], 16) for i in loop if i.starts("DEPBAR") and i.operands.startswith("SB0,")]
    return Counts(
        instructions=len(loop),
        local=sum(i.starts("LDL", "STL") for i in loop),
        wgmma=len(shapes),
        smallest_n=min((n for n, _, _ in shapes), default=0),
        serialised=0 < len(shapes) <= arrivals,
        mma_sync=sum(i.starts("HMMA") for i in loop),
        exponentials=sum(i.opcode.startswith("MUFU.EX2") for i in loop),
        prefetch=min(waits) / groups if waits and groups else 0.0,
    )

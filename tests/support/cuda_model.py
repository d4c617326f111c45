"""The model of a Hopper multiprocessor (emulator.cpp, hopper/) as a library that the backend "cuda" calls.

    python -m tests.support.cuda_model

writes csrc/mutations.md again: what the model explored, and what it reports of each mistake.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from fastattn.backends import cuda
from tests.support.cuda_calls import check_backward, check_forward, make_inputs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = ROOT / "csrc" / "mutations.md"
MUTATED_DIM, MUTATED_PASS_DIM = 128, 64


def compile_cpp(source: Path, target: Path, *flags: str) -> Path:
    """A shared library of one C++ source.

    Raises:
        RuntimeError: there is no compiler.
    """
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("no C++ compiler is installed")
    command = [compiler, "-std=c++17", "-shared", "-fPIC", *flags, f"-I{SOURCES}", str(source), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    return target


def build(folder: Path) -> Path:
    """The model in ``folder``, compiled once whoever asks at the same time."""
    target = folder / "emulator.so"
    with (folder / "emulator.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            digest = f'-DFASTATTN_DIGEST="{cuda.source_digest(SOURCES)}"'
            source = Path(__file__).with_name("emulator.cpp")
            compile_cpp(source, folder / "part.so", "-O1", "-Wall", "-Wextra", "-Werror", digest).rename(target)
    return target


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of an exploration. ``report`` is empty where no order broke a rule; ``all`` says whether that was every order."""

    report: str
    states: int
    all: bool
    text: str
    schedule: list[str]


class Model:
    """The library; what it says of an order is about the first block of a kernel of the call before."""

    def __init__(self, path: Path) -> None:
        self.library = cuda.load(path)
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.emulator_explore.restype = self.library.emulator_mutation.restype = ctypes.c_char_p
        self.library.emulator_explore.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

    def settings(self, seed: int = 0, blocks: int = 2) -> None:
        """The order of the calls that follow, by chance from ``seed``, and the most blocks that share their works."""
        self.library.emulator_seed(seed)
        self.library.emulator_blocks(blocks)
        self.library.emulator_flaw(0)

    def flaws(self) -> range:
        """Mistakes in what TMA is told, which results alone can show; `flaw` makes one, until the next `settings`."""
        return range(1, self.library.emulator_flaw(0))

    def flaw(self, number: int) -> None:
        self.library.emulator_flaw(number)

    def kernels(self) -> int:
        """How many kernels the last call started."""
        return self.library.emulator_kernels()

    def search(self, mutation: int = -1, limit: int = 1_000_000, kernel: int = 0) -> Outcome:
        """Every order, as far as ``limit`` states go."""
        return self._explore(kernel, mutation, limit, -1)

    def wander(self, seed: int, kernel: int = 0) -> Outcome:
        """One order at random."""
        return self._explore(kernel, -1, 0, seed)

    def _explore(self, kernel: int, mutation: int, limit: int, seed: int) -> Outcome:
        found = self.library.emulator_explore(kernel, mutation, limit, seed).decode().split("\t")
        report, states, all_orders, text, schedule = found
        return Outcome(report, int(states), all_orders == "all", text, schedule.splitlines())

    def mutations(self) -> list[tuple[str, str]]:
        """(mistake, the report that it must lead to) of each mutation."""
        texts = (self.library.emulator_mutation(n).decode() for n in itertools.count())
        return [tuple(text.split("\t")) for text in itertools.takewhile(bool, texts)]


@contextlib.contextmanager
def serving(path: Path) -> Iterator[Model]:
    """The backend "cuda" is the model at ``path``, for CPU tensors."""
    before = cuda._LIBRARY, cuda._current
    cuda._LIBRARY, cuda._current = path, lambda device: contextlib.nullcontext(0)
    try:
        model = Model(path)
        model.settings()
        yield model
    finally:
        cuda._LIBRARY, cuda._current = before


# Name -> lengths, heads, options, blocks: small enough for every order of their first block.
EXPLORED = {
    "one tile": ((64, 64), (1, 1), {}, 1),
    "two works of one tile": ((256, 64), (1, 1), {}, 1),
    "four tiles, then two": ((300, 500), (1, 1), {"causal": True, "q_offset": 0}, 1),
    "a work that sees nothing between others": ((200, 130), (2, 1), {"causal": True, "q_offset": -128}, 1),
    "seven tiles": ((128, 896), (1, 1), {}, 1),
    "seven heads in one tile": ((30, 150), (7, 1), {}, 1),
    "packed sequences, one of them without queries": (([70, 0, 9], [20, 50, 140]), (2, 1), {"causal": True}, 1),
}


def call(model: Model, name: str, dim: int) -> None:
    """Run a problem of EXPLORED, in parity."""
    lengths, heads, options, blocks = EXPLORED[name]
    model.settings(blocks=blocks)
    torch.manual_seed(0)
    qkv, bounds = make_inputs("cpu", lengths, dim=dim, heads=heads)
    check_forward(*qkv, **bounds, **options)


def call_mutated(model: Model, dim: int = MUTATED_DIM) -> None:
    """Run the problem in which mistakes are made: of its first block, two works of four tiles with D = 64 and 128."""
    model.settings(blocks=2)
    torch.manual_seed(0)
    check_forward(*make_inputs("cpu", (200, 500), dim=dim)[0], causal=True)


# The same of the backward passes, of which each call has two or three.
EXPLORED_PASSES = {
    "one tile": ((64, 64), (1, 1), {}),
    "two works, rows that see nothing": ((200, 130), (1, 1), {"causal": True}),
    "five tiles": ((300, 70), (1, 1), {}),
    "two heads that share a key head": ((70, 150), (2, 1), {}),
    "packed sequences, one of them without queries": (([70, 0, 9], [20, 50, 140]), (1, 1), {"causal": True}),
}


def call_passes(model: Model, name: str, dim: int) -> list[Outcome]:
    """Run the backward pass of a problem of EXPLORED_PASSES, in parity; every order of each of its kernels."""
    lengths, heads, options = EXPLORED_PASSES[name]
    model.settings(blocks=1)
    torch.manual_seed(0)
    qkv, bounds = make_inputs("cpu", lengths, dim=dim, heads=heads)
    check_backward(*qkv, **bounds, **options)
    return [model.search(kernel=kernel) for kernel in range(model.kernels())]


def call_mutated_pass(model: Model) -> None:
    """Run the pass in which mistakes are made: of its first block, two works of five tiles."""
    model.settings(blocks=1)
    torch.manual_seed(0)
    check_backward(*make_inputs("cpu", (300, 200), dim=MUTATED_PASS_DIM, heads=(1, 1))[0])


def table(model: Model) -> str:
    """csrc/mutations.md"""
    lines = [
        "# What the model of the hardware finds",
        "",
        "Written by `python -m tests.support.cuda_model`; a test compares it. The model is",
        "[tests/support/hopper](../tests/support/hopper). A state is one of all barriers, tiles, registers and",
        "positions in the program.",
        "",
        "## The kernels as they are",
        "",
        "Every order in which the loader, the consumers and TMA can proceed, until no state is new. None breaks a",
        "rule. Forward:",
        "",
        "| works of a block | states, D = 64 | D = 128 | D = 256 |",
        "|---|---|---|---|",
    ]
    for name in EXPLORED:
        counts = []
        for dim in cuda.HEAD_DIMS:
            call(model, name, dim)
            outcome = model.search()
            assert outcome.all and not outcome.report, (name, dim, outcome)
            counts.append(f"{outcome.states:,}")
        lines.append(f"| {name} | {' | '.join(counts)} |")
    lines += ["", "The backward passes, in the order dK and dV, dQ; from D = 128 on dK, dV, dQ:", ""]
    lines += ["| works of a block | states, D = 64 | D = 128 | D = 256 |", "|---|---|---|---|"]
    for name in EXPLORED_PASSES:
        cells = []
        for dim in cuda.HEAD_DIMS:
            outcomes = call_passes(model, name, dim)
            assert all(outcome.all and not outcome.report for outcome in outcomes), (name, dim, outcomes)
            cells.append(", ".join(f"{outcome.states:,}" for outcome in outcomes))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    call_mutated(model)
    lines += _mistakes(model, f"a block with D = {MUTATED_DIM}", "")
    call_mutated_pass(model)
    lines += _mistakes(model, f"a backward pass for dK and dV with D = {MUTATED_PASS_DIM}", " in a backward pass")
    return "\n".join(lines) + "\n"


def _mistakes(model: Model, program: str, where: str) -> list[str]:
    """A section of the table: the mistakes that are made in the last call."""
    mutations = model.mutations()
    lines = ["", f"## {len(mutations)} mistakes{where}", ""]
    lines += [f"Made in the program of {program}; the search stops at the first report.", ""]
    lines += ["| mistake | report | states until then |", "|---|---|---|"]
    for number, (mistake, _) in enumerate(mutations):
        outcome = model.search(number)
        lines.append(f"| {mistake} | {outcome.report} | {outcome.states} |")
    return lines


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, serving(build(Path(folder))) as model:
        TABLE.write_text(table(model))

"""Would one backward pass of five products be faster than the two kernels in use, which take seven?

It compiles the trial kernel of `one_pass_kernel` for Hopper and predicts its share of the tensor cores' peak, by the
static model, beside that of the kernels in use. Each column adds something to the one before: the loop without a wait;
the loop with turns, which take two round trips to the L2 cache; the programs' waits for one another; the passes over
memory that clear the buffer of dQ and convert it. Rows without a turn add in any order, so that their repeats differ.

    python -m benchmarks.tools.one_pass --dims 64 128 --length 4096
    python -m benchmarks.tools.one_pass --measure          # on a GPU: times both, and compares repeats bit by bit

Not in the model: the rate of additions in the L2 cache beyond their bytes, and what delays a round trip under load. So
the last column has the ratio if a round trip takes twice as long as a copy.
"""

import argparse
import dataclasses
import heapq
import re
import sys
from pathlib import Path

import numpy
import torch
import triton
from triton.compiler import ASTSource

from benchmarks.harness import device
from fastattn import attention
from fastattn.kernels import config, launch

from . import calibration, compile_report, one_pass_kernel, sass, static_model, tile_search

TILES = {
    64: ("64,128,8,3", "128,128,8,3"),
    128: ("64,128,8,3",),
}
"""block_m,block_n,warps,stages by head dim: the best of those tried by this model. At head dim 128 tiles of 32x128 let
the products wait for each other, and 64x64 with 4 warps spills 400 bytes."""
TURNS = (2, 4)
"""Tiles of queries for which a turn lasts."""
PRODUCTS = 5
TOKENS, COLUMNS = 16384, 2048
"""Of the benchmark grid: batch times length, and heads times head dim."""
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MEMORY_RATE = 3.35e12
"""Bytes a second of an H100 SXM."""
PASS_BYTES = 4 + 4 + 2
"""For each element of dQ: cleared, read, converted."""
_LABEL = re.compile(r"(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b[^;]*`\((\.L_x_\d+)\)")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compile the kernel."""

    dim: int
    tile: str
    causal: bool
    turn: int = 0
    """Tiles of queries for which a turn lasts; 0 without turns."""

    def numbers(self) -> tuple[int, ...]:
        """block_m, block_n, warps, stages."""
        return tuple(map(int, self.tile.split(",")))


def without_polls(code: str) -> str:
    """The disassembly without branches backwards over code that takes no exponentials: polls are no main loops."""
    lines, starts, kept = code.splitlines(), dict[str, int](), list[str]()
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            starts[label[1]] = number
        branch = _BRANCH.search(line)
        poll = branch and branch[1] in starts and not any("MUFU" in part for part in lines[starts[branch[1]] : number])
        if not poll:
            kept.append(line)
    return "\n".join(kept)


def compiled(form: Form) -> compile_report.Result:
    """What the compiler makes of it."""
    block_m, block_n, warps, stages = form.numbers()
    signature = dict.fromkeys(("q", "k", "v", "dout"), "*bf16") | dict.fromkeys(("rows_ptr", "dq_sum"), "*fp32")
    signature |= dict.fromkeys(("dk", "dv"), "*bf16") | dict.fromkeys(("turns", "places"), "*i32") | {"scale": "fp32"}
    signature |= dict.fromkeys(("length", "heads", "side_by_side"), "i32")
    constants = {"HEAD_DIM": form.dim, "BLOCK_M": block_m, "BLOCK_N": block_n, "CAUSAL": form.causal}
    constants |= {"TURN": form.turn}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name == "length"]
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(one_pass_kernel.one_pass_kernel, signature, constants, attributes)
    result = compile_report.Result("sm_90", "dkdv", form.dim, "causal" if form.causal else "plain", form.tile)
    options = {"num_warps": warps, "num_stages": stages}
    made = compile_report.compile_kernel(source, compile_report.TARGETS["sm_90"], options)
    result.config, result.shared = made.config, made.shared
    code = without_polls(made.code)
    compile_report.read_nvidia(result, dataclasses.replace(made, code=code))
    result.loop = sass.main_loops(code)[-1]  # here the loop over inner tiles comes last
    result.local = sass.count(result.loop).local
    return result


def round_trip(instruction: sass.Instruction) -> bool:
    """Whether a thread waits here for the L2 cache: a read of the counter, or a fence before it is raised."""
    return instruction.opcode.startswith(("MEMBAR.ALL.GPU", "MEMBAR.SC.GPU", "LDG.E.STRONG.GPU"))


def with_waits(loop: sass.Loop, warps: int, cycles: float) -> sass.Loop:
    """The loop with idle instructions where threads wait for the L2 cache, for ``cycles`` each time."""
    idle = [sass.Instruction("NOP", "")] * round(cycles * 4 / warps)
    return [part for i in loop for part in ([i, *idle] if round_trip(i) else [i])]


def l2_bytes(block_m: int, dim: int) -> int:
    """That a tile of scores moves: queries and dO in 16 bits, additions to dQ in 32."""
    return block_m * dim * (2 + 2 + 4)


def predict(form: Form, result: compile_report.Result, latency: float) -> static_model.Prediction:
    """The model for the trial's loop, where a round trip to the L2 cache takes ``latency`` cycles."""
    block_m, block_n, warps = result.tile()
    assert result.loop is not None
    found = static_model.predict(
        result.loop, "dkdv", block_m, block_n, form.dim, warps, result.registers, result.shared
    )
    serial = static_model.walk(with_waits(result.loop, warps, latency / max(1, form.turn)), warps)
    found = dataclasses.replace(found, l2=l2_bytes(block_m, form.dim) / static_model.L2_BYTES, serial=serial)
    useful = PRODUCTS * 2 * block_m * block_n * form.dim / static_model.FLOP_PER_CYCLE
    return dataclasses.replace(found, share=useful / found.cycles())


def makespan(form: Form, length: int, heads: int, slots: int, tile_cycles: float, latency: float | None) -> float:
    """Cycles until the last program ends, with ``slots`` at a time; without waits for turns if ``latency`` is None."""
    block_m, block_n, *_ = form.numbers()
    q_tiles, together = length // block_m, one_pass_kernel.together(length, heads, form.dim)
    free = [0.0] * slots
    passed = {head: numpy.full(q_tiles, -numpy.inf) for head in range(heads)}
    end = 0.0
    for group in range(0, heads, together):
        for tile in reversed(range(length // block_n)):
            turn_of = numpy.arange(tile * block_n // block_m if form.causal else 0, q_tiles) // max(1, form.turn)
            visited, tiles = numpy.unique(turn_of, return_counts=True)
            work = tiles * tile_cycles
            before = numpy.cumsum(work) - work
            for head in range(group, group + together):
                entered = before + heapq.heappop(free)
                if latency is not None:
                    late = numpy.maximum(entered, passed[head][visited] + latency) - before
                    entered = before + numpy.maximum.accumulate(late)
                passed[head][visited] = entered + work
                heapq.heappush(free, entered[-1] + work[-1])
                end = max(end, float(entered[-1] + work[-1]))
    return end


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Shares of the peak for the five products; each leaves out what the next one counts."""

    loop: float
    turns: float
    queue: float
    passes: float


def outcome(form: Form, result: compile_report.Result, length: int, latency: float) -> Outcome:
    """All steps of the prediction, for a length of the benchmark grid."""
    heads = TOKENS // length * (COLUMNS // form.dim)
    found = predict(form, result, latency)
    slots = static_model.MULTIPROCESSORS * found.programs
    tile_cycles = found.cycles() * found.programs  # of one program, which shares its multiprocessor
    waits = latency if form.turn else None
    never, queued = (makespan(form, length, heads, slots, tile_cycles, wait) for wait in (None, waits))
    queue = found.share * never / queued
    pairs = length * length * (0.5 if form.causal else 1.0)
    rate = static_model.FLOP_PER_CYCLE * static_model.MULTIPROCESSORS
    products = PRODUCTS * 2 * pairs * heads * form.dim / rate
    passes = heads * length * form.dim * PASS_BYTES / MEMORY_RATE * calibration.CLOCK
    return Outcome(predict(form, result, 0.0).share, found.share, queue, 1 / (1 / queue + passes / products))


def in_use(dim: int, causal: bool, memory: Path | None) -> dict[config.Kernel, float]:
    """The predicted shares of the two kernels that the package launches."""
    cases = compile_report.all_cases(["sm_90"], ["dkdv", "dq"], [dim], ["causal" if causal else "plain"])
    results = [compile_report.compile_case(case, memory) for case in cases]
    return {r.kernel: p.share for r in results if (p := tile_search.predicted(r))}


def line(form: Form, result: compile_report.Result, length: int, two: float) -> str:
    """What the compiler and the model say of one form, beside the share ``two`` of the kernels in use."""
    block_m, _, _ = result.tile()
    found, slow = (outcome(form, result, length, static_model.COPY_LATENCY * times) for times in (1, 2))
    programs = predict(form, result, 0.0).programs
    return (
        f"  {result.config:14} {form.turn or 'none':>4} {result.registers:9} {result.spills:6} {result.local:5} "
        f"{result.shared:7} {programs:8} {l2_bytes(block_m, form.dim):8}  {found.loop:5.3f} {found.turns:5.3f} "
        f"{found.queue:5.3f} {found.passes:6.3f}  {found.passes / two - 1:+5.0%} {slow.passes / two - 1:+5.0%}"
    )


def report(dim: int, causal: bool, length: int, memory: Path | None) -> str:
    """The forms of one head dim beside the kernels in use, as text."""
    shares = in_use(dim, causal, memory)
    two = static_model.backward_share(shares)
    name = "causal" if causal else "full"
    both = ", ".join(f"{kernel} {share:.3f}" for kernel, share in shares.items())
    lines = [f"head dim {dim}, {name}, {length} tokens: two kernels {two:.3f} ({both})"]
    columns = "turn registers spills local  shared programs L2 bytes   loop turns queue passes  ratio  slow"
    lines.append(f"  {'one pass':14} {columns}")
    for tile in TILES[dim]:
        for turn in (0, *TURNS):
            form = Form(dim, tile, causal, turn)
            lines.append(line(form, compiled(form), length, two))
    return "\n".join(lines)


def measured(form: Form, batch: int, heads: int, length: int, on: device.Device) -> str:
    """Times of both on the device, whether repeats of the one pass are equal, and how far its dQ is from the other."""

    def random() -> torch.Tensor:
        return torch.randn(batch, heads, length, form.dim, dtype=torch.bfloat16).to(on.torch_device)

    q, k, v, dout = (random() for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, causal=form.causal, backend="triton")
    ready, scale = one_pass_kernel.prepared(q, k, v, form.causal), form.dim**-0.5

    def once() -> tuple[torch.Tensor, ...]:
        return one_pass_kernel.backward(dout, q, k, v, *ready, scale, form.causal, form.numbers(), form.turn)

    def twice() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    theirs, ours, again = twice()[0].float(), once(), once()
    equal = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    apart = ((ours[0].float() - theirs).norm() / theirs.norm()).item()
    times = on.time({"one pass": lambda _: once(), "two kernels": lambda _: twice()})
    one, two = times["one pass"].p50, times["two kernels"].p50
    name = f"head dim {form.dim} {'causal' if form.causal else 'full'} {form.tile} turn {form.turn or 'none'}"
    repeats = "equal" if equal else "differ"
    return f"{name}: {one:.3f} ms, two kernels {two:.3f} ms, {two / one:.2f}x; repeats {repeats}; dq apart {apart:.1e}"


def main() -> None:
    """Command line: compile and print the comparison, or measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", nargs="+", type=int, choices=TILES, default=list(TILES))
    parser.add_argument("--length", type=int, choices=LENGTHS, default=4096, help="tokens of a sequence")
    parser.add_argument("--memory", type=Path, help="kernels in use that this folder holds are not compiled again")
    parser.add_argument("--measure", action="store_true", help="on a GPU: times instead of predictions")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    if args.measure and not torch.cuda.is_available():
        sys.exit("expected a CUDA device to measure on")
    if not args.measure:
        print(f"Triton {triton.__version__}. A filter for gaps above 15 %. {calibration.error()}")
    for dim in args.dims:
        for causal in (False, True):
            if not args.measure:
                print(report(dim, causal, args.length, args.memory), flush=True)
                continue
            sizes = (TOKENS // args.length, COLUMNS // dim, args.length)
            for tile in TILES[dim]:
                for turn in (0, *TURNS):
                    print(measured(Form(dim, tile, causal, turn), *sizes, device.choose(False)), flush=True)


if __name__ == "__main__":
    main()

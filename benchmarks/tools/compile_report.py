"""Does every kernel compile, and does it fit the machine? Answered without a GPU, a driver or a CUDA toolkit.

The launchers of `fastattn.kernels` run on meta tensors under a stand-in for Triton's driver that only names a target,
so signatures, constants, alignment facts and launch configs are those of a real launch; compilation stops short of it.
Tools that come with Triton say what the machine code needs.

    python -m benchmarks.tools.compile_report --arch sm_90 --dims 64 128 --features causal bias
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastattn.kernels import append, backward, config, decode, forward, launch
from fastattn.spec import CacheSpec, Gradients, Operands, Options

from . import sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Feature:
    """What one call asks for, as far as the compiled code depends on it. Lengths and head groups do not show."""

    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    window: bool = False
    mask: str = ""  # "full", "padding" or none
    bias: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    part: bool = False  # of a larger call, whose dropout bits it has
    q_offset_tensor: bool = False
    packed: bool = False
    block_mask: bool = False
    page: int = 0  # of a KV cache, 0 if it is contiguous
    queries: int = 1  # for each key head of a KV cache there are twice as many rows
    odd_dim: bool = False  # five columns fewer: no power of two, and rows that start at no multiple of 16 bytes


FEATURES = {
    "plain": Feature(),
    "causal": Feature(causal=True),
    "window": Feature(causal=True, window=True),
    "mask": Feature(mask="full"),
    "padding": Feature(mask="padding"),
    "bias": Feature(bias=True),
    "alibi": Feature(causal=True, alibi=True),
    "softcap": Feature(causal=True, softcap=True),
    "sinks": Feature(causal=True, sinks=True),
    "dropout": Feature(dropout=True),
    "dropout_part": Feature(dropout=True, part=True),
    "q_offset": Feature(causal=True, q_offset_tensor=True),
    "packed": Feature(causal=True, packed=True),
    "block_mask": Feature(block_mask=True),
    "paged": Feature(page=16),  # as one query needs it, which is the last: causal forbids nothing
    "chunk": Feature(causal=True, queries=64),
    "odd_dim": Feature(odd_dim=True),
    "fp32": Feature(dtype=torch.float32),
    "everything": Feature(
        causal=True, window=True, mask="full", bias=True, alibi=True, softcap=True, sinks=True, dropout=True,
        q_offset_tensor=True, block_mask=True, page=16, queries=64,
    ),
}  # fmt: skip
DEFAULT_FEATURES = ["plain", "causal", "bias"]


@dataclasses.dataclass
class Case:
    """One compilation."""

    arch: str
    kernel: config.Kernel
    dim: int
    feature: str
    override: str = ""  # block_m,block_n,warps,stages instead of the shipped ones


@dataclasses.dataclass
class Result(Case):
    """What the compiler made of a case. Spills are bytes per thread; ``arrive`` counts WARPGROUP.ARRIVE.

    From ``instructions`` on, on sm_90: the inner main loop, see `sass.Counts`; ``per_1000`` are instructions of warps
    for 1,000 scores.
    """

    config: str = ""
    error: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    wgmma: int = 0
    arrive: int = 0
    serialised: bool = False
    seconds: float = 0.0
    instructions: int = 0
    per_1000: float = 0.0
    local: int = 0
    local_edge: int = 0
    smallest_n: int = 0
    mma_sync: int = 0
    prefetch: float = 0.0
    loop: sass.Loop | None = None

    def tile(self) -> tuple[int, int, int]:
        """block_m, block_n and warps, from ``config``; (0, 0, 0) for a kernel without tiles of scores."""
        found = re.match(r"(\d+)x(\d+) w(\d+)", self.config)
        return (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)


class TargetOnlyDriver:
    """The part of Triton's driver that compilation asks for."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch  # the key of Triton's in-memory cache

    def get_current_stream(self, device: str) -> int:
        return 0


def kernel_name(function: JITFunction, args: tuple[Any, ...]) -> str:
    """A launched kernel's name in `config`: one function makes dk, dv or both."""
    given = dict(zip(function.arg_names, args, strict=False))
    if function.__name__ == "dkdv_kernel":
        return "".join(gradient for gradient in ("dk", "dv") if given[gradient].ptr is not None)
    return function.__name__.removesuffix("_kernel")


@contextlib.contextmanager
def compiling_for(arch: str, kernel: str) -> Iterator[list[CompiledKernel]]:
    """Inside, launches of ``kernel`` are compiled for ``arch`` and collected, and other launches do nothing."""
    compiled: list[CompiledKernel] = []

    def launcher(jit_function: JITFunction, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            if kernel_name(jit_function, args) == kernel:
                jit_function.device_caches.clear()  # what an earlier case has compiled comes without ptxas's log
                compiled.append(cast(CompiledKernel, jit_function.run(*args, grid=grid, warmup=True, **kwargs)))

        return compile_only

    driver.set_active(cast(Any, TargetOnlyDriver(arch)))  # what a compiler asks of a driver
    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(launch, "architecture", lambda device: arch),
    ):
        yield compiled


def launch_cache_kernels(kernel: config.Kernel, dim: int, feature: Feature) -> None:
    """`launch_kernels` for those that work on a KV cache."""
    empty = functools.partial(torch.empty, device="meta", dtype=feature.dtype)
    batch, heads, kv_heads, length = 2, 4, 2, 1008
    dim -= 5 if feature.odd_dim else 0
    shape = (batch, length, kv_heads, dim)
    table = None
    if feature.page:
        shape = (batch * length // feature.page, feature.page, kv_heads, dim)
        table = empty(batch, length // feature.page, dtype=torch.int32)
    k_cache, v_cache = empty(shape), empty(shape)
    lens = empty(batch, dtype=torch.int32)
    if kernel == "append":
        k, v = empty(batch, kv_heads, 1, dim), empty(batch, kv_heads, 1, dim)
        append.kv_cache_append(k_cache, v_cache, k, v, lens, table)
        return
    q = empty(batch, heads, feature.queries, dim)
    spec = CacheSpec(
        q, k_cache, v_cache, None, None, empty(1, heads, dtype=torch.float32) if feature.alibi else None,
        empty(heads, dtype=torch.float32) if feature.sinks else None, lens, table, added=1, length=None,
        left=256 if feature.window else None, right=0 if feature.causal else None, scale=dim**-0.5,
        softcap=30.0 if feature.softcap else None, num_splits=4 if kernel == "combine" else 1, return_lse=True,
    )  # fmt: skip
    decode.attention_kvcache(torch.empty_like(q), empty(q.shape[:3], dtype=torch.float32), spec)


def launch_kernels(kernel: config.Kernel, dim: int, feature: Feature) -> None:
    """Call the launcher that ``kernel`` belongs to, with arguments that have shapes and strides but no memory."""
    if kernel in ("decode", "combine", "append"):
        launch_cache_kernels(kernel, dim, feature)
        return
    empty = functools.partial(torch.empty, device="meta", dtype=feature.dtype)
    batch, heads, kv_heads, length = 2, 4, 2, 1001
    dim -= 5 if feature.odd_dim else 0
    entries = 1 if feature.packed else batch
    q, out = (empty(entries, heads, length, dim) for _ in range(2))
    k, v = (empty(entries, kv_heads, length, dim) for _ in range(2))
    statistics = empty(2, entries, heads, length, dtype=torch.float32)
    given: dict[str, Any] = {}
    if feature.packed:
        given |= {name: empty(batch + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    if feature.block_mask:
        index = functools.partial(torch.empty, device="meta", dtype=torch.int32)
        lines, cells, table = index(1, 1, 8, 3), index(64, 2), index(1, 1, 8, 8)
        given["block_mask"] = [lines, cells, lines, cells, table, index(66, 128, 128).to(torch.uint8)]
    if feature.mask:
        given["mask"] = empty(batch, 1, length if feature.mask == "full" else 1, length, dtype=torch.bool)
    if feature.bias:
        given["bias"] = empty(1, heads, length, length)
    if feature.alibi:
        given["alibi_slopes"] = empty(1, heads, dtype=torch.float32)
    if feature.sinks:
        given["sinks"] = empty(heads, dtype=torch.float32)
    if feature.q_offset_tensor:
        given["q_offset_tensor"] = empty(batch, dtype=torch.int64)
    if feature.dropout:
        given["seed"] = empty(7 if feature.part else 1, dtype=torch.int64)
    operands = Operands(**given)
    options = Options(
        left=256 if feature.window else None, right=0 if feature.causal else None,
        q_offset=None if feature.packed else 0, scale=dim**-0.5, softcap=30.0 if feature.softcap else None,
        dropout_p=0.1 if feature.dropout else 0.0,
    )  # fmt: skip
    if kernel == "forward":
        forward.attention_forward(out, statistics[0], statistics, q, k, v, operands, options)
        return
    learned = (operands.bias, operands.alibi_slopes, operands.sinks)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    gradients = Gradients(dq, dk, dv, *(None if x is None else torch.empty_like(x) for x in learned))
    backward.attention_backward(gradients, out, statistics[0], q, k, v, out, statistics, operands, options)


def compile_case(case: Case) -> Result:
    """Compile one case and read the resources that it needs."""
    result = Result(**dataclasses.asdict(case))
    knobs.compilation.always_compile = True  # a cached kernel comes without ptxas's log
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    start = time.perf_counter()
    try:
        tile = config.LaunchConfig(*cast(Any, map(int, case.override.split(",")))) if case.override else None
        with (
            compiling_for(case.arch, case.kernel) as compiled,
            contextlib.redirect_stdout(log),
            config.override(tile),
        ):
            launch_kernels(case.kernel, case.dim, FEATURES[case.feature])
        result.seconds = time.perf_counter() - start
        (kernel,) = compiled
    except Exception as error:  # whatever a compiler raises is what is to be reported
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
        return result
    result.config = describe_config(kernel)
    result.shared = kernel.metadata.shared
    if TARGETS[case.arch].backend == "cuda":
        read_nvidia(result, kernel, log.getvalue())
    else:
        read_amd(result, kernel)
    if result.shared > SHARED_LIMIT[case.arch]:
        result.error = f"shared memory: {result.shared} bytes of {SHARED_LIMIT[case.arch]}"
    return result


def describe_config(kernel: CompiledKernel) -> str:
    """Tile, warps and stages with which a kernel was compiled: ``128x64 w4 s3``."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    tile = "x".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N") if name in constants)
    return f"{tile} w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}"


def read_nvidia(result: Result, kernel: CompiledKernel, log: str) -> None:
    """Registers and spills from ptxas's log, wgmma from the disassembly."""
    result.registers = int(re.findall(r"Used (\d+) registers", log)[-1])
    result.spills = int(re.findall(r"(\d+) bytes spill stores", log)[-1])
    if result.arch != "sm_90":
        return
    code = sass.disassemble(kernel.asm["cubin"])
    result.wgmma = len(re.findall(r"\bHGMMA\b", code))
    result.arrive = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code))
    # Products in flight together share one arrive. ptxas announces that it gave up on that, under these two codes.
    result.serialised = "C7510" in log or "C7512" in log or 0 < result.wgmma <= result.arrive
    block_m, block_n, warps = result.tile()
    if block_m and (loops := sass.main_loops(code)):
        result.loop, counts = loops[0], sass.count(loops[0])
        result.instructions = counts.instructions
        result.per_1000 = round(counts.instructions * warps * 1000 / (block_m * block_n), 1)
        result.local, result.local_edge = counts.local, sass.count(loops[-1]).local
        result.smallest_n, result.mma_sync, result.prefetch = counts.smallest_n, counts.mma_sync, counts.prefetch


def read_amd(result: Result, kernel: CompiledKernel) -> None:
    """Vector registers and scratch memory from the metadata at the end of the assembly."""
    result.registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", kernel.asm["amdgcn"])[-1])
    result.spills = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", kernel.asm["amdgcn"])[-1])


def all_cases(archs: list[str], kernels: list[config.Kernel], dims: list[int], features: list[str]) -> list[Case]:
    """Every combination that exists: dk and dv come in one pass or in two, there is no dbias without a bias, and
    delta knows only the dtype and the dim.

    A KV cache has no mask, bias, dropout or offset: "everything" is there what else there is.
    """
    cases = []
    for arch, kernel, dim, feature in itertools.product(archs, kernels, dims, features):
        simple = feature in ("plain", "odd_dim", "fp32")
        cache_only = feature in ("paged", "chunk")
        exists = {
            **{name: name in config.key_passes(arch, dim) and not cache_only for name in ("dkdv", "dk", "dv")},
            "dbias": FEATURES[feature].bias,
            "delta": simple,
            "decode": feature
            not in ("mask", "padding", "bias", "dropout", "dropout_part", "q_offset", "packed", "block_mask"),
            "combine": simple or feature == "sinks",
            "append": simple or feature == "paged",
        }
        if exists.get(kernel, not cache_only):
            cases.append(Case(arch, kernel, dim, feature))
    return cases


def compile_all(cases: list[Case], jobs: int) -> list[Result]:
    """Compile in a pool of fresh processes; the order of the results is that of the cases."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        results = []
        for result in pool.map(compile_case, cases):
            results.append(result)
            if sys.stderr.isatty():
                print(f"\r{len(results)} of {len(cases)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return results


def table(results: list[Result]) -> str:
    """The results as text, one line each."""
    lines = [
        f"{'target':7} {'kernel':8} {'dim':>4} {'features':11} {'config':16} {'registers':>9} {'spills':>6} "
        f"{'shared':>7} {'wgmma':>6} {'arrive':>6} {'seconds':>7} | {'per 1000':>8} {'local':>5} {'edge':>5} {'n':>3} "
        f"{'mma':>4} {'prefetch':>8}"
    ]
    for r in results:
        note = f"  {r.error}" if r.error else "  serialised" if r.serialised else ""
        lines.append(
            f"{r.arch:7} {r.kernel:8} {r.dim:4} {r.feature:11} {r.config:16} {r.registers:9} {r.spills:6} "
            f"{r.shared:7} {r.wgmma:6} {r.arrive:6} {r.seconds:7.1f} | {r.per_1000:8} {r.local:5} {r.local_edge:5} "
            f"{r.smallest_n:3} {r.mma_sync:4} {r.prefetch:8.1f}{note}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line: print the table, write the JSON if asked to, and exit with 1 if anything does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", choices=config.KERNELS, default=list(config.KERNELS))
    parser.add_argument("--dims", nargs="+", type=int, default=list(DIMS), help="head dims (default: %(default)s)")
    parser.add_argument("--features", nargs="+", choices=[*FEATURES, "all"], default=DEFAULT_FEATURES)
    parser.add_argument("--jobs", type=int, default=2, help="compile this many at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    features = list(FEATURES) if "all" in args.features else args.features
    results = compile_all(all_cases(args.arch, args.kernel, args.dims, features), args.jobs)
    if args.json:
        for r in results:
            r.loop = None
        rows = [dataclasses.asdict(r) | {"triton": triton.__version__} for r in results]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"triton {triton.__version__}; registers and spills (bytes) per thread, shared memory in bytes")
    print(table(results))
    if any(r.error for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Does every kernel compile, and does it fit the GPU? This needs no GPU, driver or CUDA toolkit.

The launchers of `fastattn.kernels` run on meta tensors under a stand-in for Triton's driver that only names a target,
so signatures, constants, alignment facts and launch configs are those of a real launch, which is left out. Tools that
come with Triton say which resources the machine code needs.

    python -m benchmarks.tools.compile_report --arch sm_90 --dims 64 128 --features causal bias
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastattn.kernels import config, launch

from . import sass
from .calls import CACHE_ONLY, FEATURES, launch_kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DIMS = (64, 128, 256)


_Made = TypeVar("_Made")

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
    """The result of compiling a case. Spills are bytes per thread; ``arrive`` counts WARPGROUP.ARRIVE,
    ``size`` all instructions.

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
    size: int = 0
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
    """The part of Triton's driver that compilation needs."""

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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled kernel: tile, warps and stages as ``128x64 w4 s3``, bytes of shared memory, what ptxas said of it, and
    where that is read its machine code as text.
    """

    config: str
    shared: int
    log: str
    code: str


def compile_with_log(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> tuple[Any, str]:
    """Compile, in this process, what Triton is about to compile; also what ptxas says."""
    knobs.compilation.always_compile = True  # a kernel from Triton's cache comes without ptxas's log
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target, options)
    return kernel, log.getvalue()


def compile_kernel(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    """What is to be known of a kernel, compiled in this process."""
    knobs.compilation.store_binary_only = target.backend == "cuda"
    kernel, log = compile_with_log(source, target, options)
    code = kernel.asm.get("amdgcn", "")
    if target == TARGETS["sm_90"]:
        code = sass.disassemble(kernel.asm["cubin"])
    return Compiled(describe_config(kernel), kernel.metadata.shared, log, code)


def fingerprint(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> str:
    """Digest of what Triton is about to compile: the kernel's intermediate code, the compiler's options and version.

    The code is that of Triton's first stage, with helpers inlined: a change elsewhere in a file, or other helpers for
    the same work, leaves it alone. It is the same on every machine.
    """
    context = ir.context()
    backend: Any = make_backend(target)
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(dict(options))
    meant = {name: value for name, value in sorted(vars(parsed).items()) if name != "extern_libs"}  # paths
    codegen = backend.get_codegen_implementation(parsed)
    module = source.make_ir(target, parsed, codegen, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    module = stages["ttir"](module, {})
    text = f"{triton.__version__} {target} {meant} {module.str_nodebug()}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def remembered(memory: Path, source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    """`compile_kernel`, unless the folder ``memory`` holds its result under the `fingerprint`."""
    path = memory / f"{fingerprint(source, target, options)}.json.gz"
    if path.exists():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    compiled = compile_kernel(source, target, options)
    memory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode()))
    part.replace(path)
    return compiled


@contextlib.contextmanager
def compiling_for(case: Case, compiler: Callable[..., _Made]) -> Iterator[list[_Made]]:
    """Inside, collect the results of ``compiler`` for launches of the case's kernel; other launches do nothing."""
    made: list[_Made] = []
    tile = config.LaunchConfig(*cast(Any, map(int, case.override.split(",")))) if case.override else None

    def launcher(jit_function: JITFunction, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            if kernel_name(jit_function, args) == case.kernel:
                jit_function.device_caches.clear()  # in memory; it also makes Triton look the compiler up again
                with mock.patch.object(triton.compiler, "compile", compiler):
                    made.append(cast(_Made, jit_function.run(*args, grid=grid, warmup=True, **kwargs)))

        return compile_only

    driver.set_active(cast(Any, TargetOnlyDriver(case.arch)))  # what a compiler needs of a driver
    with (
        mock.patch.object(JITFunction, "__getitem__", launcher),
        mock.patch.object(launch, "architecture", lambda device: case.arch),
        config.override(tile),
    ):
        yield made


def fingerprint_of(case: Case) -> str:
    """The `fingerprint` of a case's kernel, empty where Triton refuses its source."""
    with contextlib.suppress(Exception), compiling_for(case, fingerprint) as made:
        launch_kernels(case.kernel, case.dim, FEATURES[case.feature])
        return made[0]
    return ""


def compile_case(case: Case, memory: Path | None = None) -> Result:
    """Compile one case, unless ``memory`` holds its result, and read the resources that it needs."""
    result = Result(**dataclasses.asdict(case))
    start = time.perf_counter()
    try:
        with compiling_for(case, functools.partial(remembered, memory) if memory else compile_kernel) as compiled:
            launch_kernels(case.kernel, case.dim, FEATURES[case.feature])
        (kernel,) = compiled
    except Exception as error:  # any error of a compiler is reported
        result.error = f"{type(error).__name__}: {error}".splitlines()[0]
        return result
    result.seconds = time.perf_counter() - start
    result.config, result.shared = kernel.config, kernel.shared
    if TARGETS[case.arch].backend == "cuda":
        read_nvidia(result, kernel)
    else:
        read_amd(result, kernel)
    if result.shared > SHARED_LIMIT[case.arch]:
        result.error = f"shared memory: {result.shared} bytes of {SHARED_LIMIT[case.arch]}"
    return result


def describe_config(kernel: CompiledKernel) -> str:
    """Tile, warps and stages with which a kernel was compiled: ``128x64 w4 s3``, and ``pipelined`` where it is."""
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    tile = "x".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N") if name in constants)
    pipelined = " pipelined" if constants.get("PIPELINED") else ""
    return f"{tile} w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}{pipelined}"


def read_nvidia(result: Result, kernel: Compiled) -> None:
    """Registers and spills from ptxas's log, wgmma from the disassembly."""
    log, code = kernel.log, kernel.code
    result.registers = int(re.findall(r"Used (\d+) registers", log)[-1])
    result.spills = int(re.findall(r"(\d+) bytes spill stores", log)[-1])
    if result.arch != "sm_90":
        return
    result.size = len(re.findall(r"/\*[0-9a-f]{4,}\*/", code))
    result.wgmma = len(re.findall(r"\bHGMMA\b", code))
    result.arrive = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code))
    # Products in flight together share one arrive. ptxas reports under these two codes that it gave this up.
    result.serialised = "C7510" in log or "C7512" in log or 0 < result.wgmma <= result.arrive
    block_m, block_n, warps = result.tile()
    if block_m and (loops := sass.main_loops(code)):
        result.loop, counts = loops[0], sass.count(loops[0])
        result.instructions = counts.instructions
        result.per_1000 = round(counts.instructions * warps * 1000 / (block_m * block_n), 1)
        result.local, result.local_edge = counts.local, sass.count(loops[:2][-1]).local
        result.smallest_n, result.mma_sync, result.prefetch = counts.smallest_n, counts.mma_sync, counts.prefetch


def read_amd(result: Result, kernel: Compiled) -> None:
    """Vector registers and scratch memory from the metadata at the end of the assembly."""
    result.registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", kernel.code)[-1])
    result.spills = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", kernel.code)[-1])


def all_cases(archs: list[str], kernels: list[config.Kernel], dims: list[int], features: list[str]) -> list[Case]:
    """Every combination that exists: dk and dv come in one pass or in two, there is no dbias without a bias, and
    delta knows only the dtype and the dim.

    A KV cache has no dropout, offset or block mask: there "everything" means all other features.
    """
    cases = []
    for arch, kernel, dim, feature in itertools.product(archs, kernels, dims, features):
        simple = feature in ("plain", "odd_dim", "fp32")
        cache_only = feature in CACHE_ONLY
        exists = {
            **{name: name in config.key_passes(arch, dim) and not cache_only for name in ("dkdv", "dk", "dv")},
            "dbias": FEATURES[feature].bias,
            "delta": simple,
            "decode": feature not in ("dropout", "dropout_part", "q_offset", "packed", "used_keys", "block_mask")
            and not (FEATURES[feature].aligned or FEATURES[feature].rotary or FEATURES[feature].narrow_values),
            "combine": simple or feature in ("sinks", "packed_cache"),
            "append": simple or feature in ("paged", "packed_cache", "int8", "fp8", "rotary"),
        }
        if exists.get(kernel, not cache_only):
            cases.append(Case(arch, kernel, dim, feature))
    return cases


def in_processes(function: Callable[[Any], Any], items: Sequence[Any], jobs: int, label: str = "") -> list[Any]:
    """``function`` of every item, in order: in a pool of fresh processes, or here for one job. Reports progress."""
    end, each = ("", 1) if sys.stderr.isatty() else ("\n", 20)
    results = []
    with contextlib.ExitStack() as stack:
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            done = stack.enter_context(concurrent.futures.ProcessPoolExecutor(jobs, context)).map(function, items)
        else:
            done = map(function, items)
        for result in done:
            results.append(result)
            if len(results) % each == 0 or len(results) == len(items):
                print(f"\r{label}{len(results)} of {len(items)}", end=end, file=sys.stderr, flush=True)
    print(file=sys.stderr, end="" if end else "\n")
    return results


def compile_all(cases: list[Case], jobs: int, memory: Path | None = None) -> list[Result]:
    """Compile in a pool of fresh processes; the order of the results is that of the cases."""
    return in_processes(functools.partial(compile_case, memory=memory), cases, jobs)


def table(results: list[Result]) -> str:
    """The results as text, one line each."""
    lines = [
        f"{'target':7} {'kernel':8} {'dim':>4} {'features':11} {'config':22} {'registers':>9} {'spills':>6} "
        f"{'shared':>7} {'wgmma':>6} {'arrive':>6} {'seconds':>7} | {'per 1000':>8} {'local':>5} {'edge':>5} {'n':>3} "
        f"{'mma':>4} {'prefetch':>8}"
    ]
    for r in results:
        note = f"  {r.error}" if r.error else "  serialised" if r.serialised else ""
        lines.append(
            f"{r.arch:7} {r.kernel:8} {r.dim:4} {r.feature:11} {r.config:22} {r.registers:9} {r.spills:6} "
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
    parser.add_argument("--memory", type=Path, help="what was compiled once is taken from this folder, and kept there")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if launch.INTERPRETED.value:
        sys.exit("expected TRITON_INTERPRET to be unset: interpreted kernels are not compiled")
    features = list(FEATURES) if "all" in args.features else args.features
    results = compile_all(all_cases(args.arch, args.kernel, args.dims, features), args.jobs, args.memory)
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

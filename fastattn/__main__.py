"""``python -m fastattn``: what this machine can run, and which backend a call would use."""

import argparse
import ast
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import backends
from fastattn.backends import Explanation
from fastattn.backends.cpu import library as cpu_library
from fastattn.spec import QUANTISED, make_spec
from fastattn.spec.target import TARGETS, Target, assume

PACKAGE = Path(fastattn.__file__).resolve().parent
CACHE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in QUANTISED}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Parser(argparse.ArgumentParser):
    """Prints an error as one line and leaves the long usage out."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for arguments that make no valid call."""
    parser = Parser(prog="python -m fastattn", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="show versions, devices and the backends that can run here")
    doctor.set_defaults(run=run_doctor)

    explain = commands.add_parser("explain", help="show which backend serves a call, and why not the others")
    add_call_arguments(explain)
    explain.set_defaults(run=run_explain)

    bench = commands.add_parser("bench", help="show how to run the benchmarks")
    bench.set_defaults(run=run_bench)

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2


# doctor


def run_doctor(args: argparse.Namespace) -> int:
    """Print versions, devices and, for a plain call on each device, the backends."""
    print_rows(
        [
            ("fastattn", f"{fastattn.__version__} in {PACKAGE}"),
            ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            ("torch", f"{torch.__version__}, {torch_build()}"),
            ("triton", module_version("triton")),
            ("numpy", module_version("numpy")),
            ("CPU library", cpu_library_state()),
            ("CUDA library", cuda_library()),
            ("flash registry", flash_registry()),
            *(("GPU", line) for line in gpus() or ["no CUDA or ROCm device"]),
        ]
    )
    print("\nBackends for a plain call:")
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        if device == "cpu" or torch.cuda.is_available():
            q = torch.empty(1, 8, 128, 64, device=device, dtype=dtype)
            print(fastattn.explain(q, q, q))
    return 0


def print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def torch_build() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPU"


def module_version(name: str) -> str:
    """The version of an optional module. A broken installation must not stop the report."""
    try:
        return importlib.import_module(name).__version__
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"does not import: {error}"
    except Exception as error:
        return f"does not import: {error}"


def cpu_library_state() -> str:
    problem = cpu_library.problem()
    return problem or f"{PACKAGE / 'libfastattn_cpu.so'}, {cpu_library.load().fastattn_cpu_variant().decode()}"


def cuda_library() -> str:
    path = PACKAGE / "libfastattn_cuda.so"
    if path.is_file():
        return str(path)
    return "not found; built only by make ext or FASTATTN_BUILD_CUDA=1"


def flash_registry() -> str:
    """Torch's registry of flash attention implementations, which fastattn can join."""
    attention = importlib.import_module("torch.nn.attention")
    list_names = getattr(attention, "list_flash_attention_impls", None)
    if list_names is None:
        return "not in this torch"
    return f"present, registered: {', '.join(list_names()) or 'none'}"


def gpus() -> list[str]:
    lines = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        memory = f"{props.total_memory / 2**30:.0f} GiB"
        lines.append(f"cuda:{index} {props.name}, capability {props.major}.{props.minor}, {memory}")
    return lines


# explain


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--q", type=shape, required=True, metavar="B,H,L,D", help="shape of the query")
    parser.add_argument("--k", type=shape, metavar="B,H,L,D", help="shape of the key (default: as --q)")
    parser.add_argument("--v", type=shape, metavar="B,H,L,D", help="shape of the value (default: as --k)")
    parser.add_argument("--dtype", type=dtype, default="bf16", help="of q, k, v and bias (default: bfloat16)")
    parser.add_argument(
        "--device", type=device, default="cpu",
        help=f"cpu, cuda, cuda:1, ... (default: cpu); or cuda:NAME for a GPU that is not here: {', '.join(TARGETS)}",
    )  # fmt: skip
    parser.add_argument("--causal", action="store_true", help="keys up to the position of the query only")
    parser.add_argument("--q-offset", type=int, metavar="N", help="position of query 0 among the keys")
    parser.add_argument("--window", type=window, metavar="LEFT,RIGHT", help="sliding window; 128, is open to the right")
    parser.add_argument("--scale", type=float, metavar="X", help="factor of the scores (default: 1/sqrt(D))")
    parser.add_argument("--softcap", type=float, metavar="X", help="bound of the scores")
    parser.add_argument("--alibi", action="store_true", help="with ALiBi slopes")
    parser.add_argument("--sinks", action="store_true", help="with attention sinks")
    parser.add_argument("--dropout", type=float, metavar="P", help="dropout probability")
    parser.add_argument("--mask", type=shape, metavar="B,H,LQ,LK", help="shape of a boolean mask")
    parser.add_argument("--bias", type=shape, metavar="B,H,LQ,LK", help="shape of an additive bias")
    parser.add_argument("--lse", action="store_true", help="return the log-sum-exp too")
    parser.add_argument("--grad", action="store_true", help="every tensor but the mask requires gradients")
    parser.add_argument(
        "--varlen", type=int, metavar="N",
        help="N packed sequences, as attention_varlen takes them: L is then the total, and B is 1",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=shape, metavar="B,L,H,D",
        help="over a KV cache of this shape, as attention_with_kvcache: --k and --v are appended to it",
    )  # fmt: skip
    parser.add_argument("--cache-len", type=int, metavar="N", help="tokens in it (default: a tensor, one per sequence)")
    parser.add_argument("--pages", type=int, metavar="N", help="--cache holds pages, at most N for each sequence")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="quantised, with a scale for each token and head")
    parser.add_argument("--mask-start", type=int, metavar="N", help="key of the first column of --mask and --bias")
    parser.add_argument("--rotary", action="store_true", help="with rotary positions of all of the head dim")
    parser.add_argument("--backend", choices=backends.BACKENDS, help="ask for this one")


def shape(text: str) -> tuple[int, ...]:
    """Parse ``2,8,1024,64``."""
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"expected four sizes such as 2,8,1024,64, got {text!r}")
    return tuple(int(size) for size in sizes)


def dtype(text: str) -> torch.dtype:
    """Parse ``bf16``, ``bfloat16`` or ``torch.bfloat16``."""
    names = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    found = names.get(text.removeprefix("torch."))
    if found is None:
        raise argparse.ArgumentTypeError(f"expected float16, bfloat16, float32 or float64, got {text!r}")
    return found


def window(text: str) -> tuple[int | None, int | None]:
    """Parse ``128,0``; a side left empty is open."""
    left, comma, right = text.partition(",")
    if not comma or not all(size.isdecimal() or not size for size in (left, right)):
        raise argparse.ArgumentTypeError(f"expected two sizes such as 128,0 or 128, with an open side, got {text!r}")
    return int(left) if left else None, int(right) if right else None


def device(text: str) -> torch.device | Target:
    """Parse a device of this machine, or a kind of GPU that it may lack."""
    if target := TARGETS.get(text.lower().removeprefix("cuda:")):
        return target
    present = ["cpu"]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if text not in present:
        raise argparse.ArgumentTypeError(
            f"expected a device of this machine ({', '.join(present)}) or a kind of GPU such as cuda:h100, got {text!r}"
        )
    return torch.device(text)


def run_explain(args: argparse.Namespace) -> int:
    """Print the table for tensors of the given shapes, which have no memory."""
    if not isinstance(args.device, Target):
        with FakeTensorMode():
            print(explain_call(args, args.device))
        return 0
    kind = "" if args.device.rocm else " (compute capability {}.{})".format(*args.device.capability)
    with FakeTensorMode(), assume(args.device):
        explanation = explain_call(args, torch.device("cuda"))
    print(f"On an {args.device.title}{kind}, with the packages that are installed here:\n{explanation}")
    return 0


def explain_call(args: argparse.Namespace, device: torch.device) -> Explanation:
    """Ask the function that the user would call to explain these arguments."""

    def empty(sizes: tuple[int, ...], dtype: torch.dtype = args.dtype) -> torch.Tensor:
        grad = args.grad and dtype.is_floating_point and args.cache is None
        return torch.empty(sizes, dtype=dtype, device=device, requires_grad=grad)

    batch, heads = args.q[:2]
    key_shape = args.k or args.q
    # PyTorch may not be built for this device, so it could not view (Hq,) as (1, Hq).
    slopes = (args.varlen or batch, heads) if isinstance(args.device, Target) else (heads,)
    terms: dict[str, Any] = {
        "causal": args.causal,
        "window": args.window,
        "softcap": args.softcap,
        "alibi_slopes": empty(slopes) if args.alibi else None,
        "sinks": empty((heads,)) if args.sinks else None,
        "scale": args.scale,
        "return_lse": args.lse,
    }
    mask, bias = empty(args.mask, torch.bool) if args.mask else None, empty(args.bias) if args.bias else None
    if args.cache is not None:
        refuse(args, "--cache", "grad", "dropout", "varlen", "q_offset")
        if args.cache_dtype is not None:
            terms |= {name: empty(args.cache[:3], torch.float32) for name in ("k_scale", "v_scale")}
        if args.rotary:
            positions = args.cache[1] * (1 if args.pages is None else args.pages)
            terms |= {name: empty((positions, args.q[3] // 2)) for name in ("rotary_cos", "rotary_sin")}
        stored = args.dtype if args.cache_dtype is None else CACHE_DTYPES[args.cache_dtype]
        caches = [empty(args.cache, stored) for _ in "kv"]
        added = [empty(args.k), empty(args.v or args.k)] if args.k else []
        return fastattn.explain_with_kvcache(
            empty(args.q), *caches, *added, mask=mask, bias=bias, mask_start=args.mask_start,
            cache_lens=empty((batch,), torch.int32) if args.cache_len is None else args.cache_len,
            block_table=None if args.pages is None else empty((batch, args.pages), torch.int32),
            backend=args.backend, **terms,
        )  # fmt: skip
    refuse(args, "a call without --cache", "cache_len", "pages", "cache_dtype", "mask_start", "rotary")
    terms |= {"q_offset": args.q_offset, "dropout_p": 0.0 if args.dropout is None else args.dropout}
    shapes = {"q": args.q, "k": key_shape, "v": args.v or key_shape}
    tensors = [empty(sizes) for sizes in shapes.values()]
    if args.varlen is not None:
        refuse(args, "--varlen", "mask", "bias")
        for name, sizes in shapes.items():
            if sizes[0] != 1:
                raise ValueError(f"--{name}: expected B == 1 with --varlen, got {sizes[0]}")
        starts = empty((args.varlen + 1,), torch.int32)  # not explain_varlen, which views its tensors: see above
        spec = make_spec(*tensors, cu_seqlens_q=starts, cu_seqlens_k=starts, **terms)
        return backends.explain(spec, args.backend)
    return fastattn.explain(*tensors, mask=mask, bias=bias, backend=args.backend, **terms)


def refuse(args: argparse.Namespace, what: str, *names: str) -> None:
    """Raise ValueError for the first of these options that was given."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(f"{what} has no --{name.replace('_', '-')}")


# bench


def run_bench(args: argparse.Namespace) -> int:
    """List the benchmarks of the checkout that this package is imported from."""
    root = PACKAGE.parent
    scripts = sorted(root.glob("benchmarks/suites/[!_]*.py"))
    if not scripts:
        print("The benchmarks come with the source repository, not with the installed package.")
        print("In the root of a checkout `python -m fastattn bench` lists them.")
        return 0
    print(f"In {root}:")
    for script in scripts:
        summary = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]
        print(f"  python -m benchmarks {script.stem}\n      {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

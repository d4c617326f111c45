"""``python -m fastattn``: what this machine can run, and which backend a call would use."""

import argparse
import ast
import importlib
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastattn

PACKAGE = Path(fastattn.__file__).resolve().parent
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0, or 2 for arguments that make no valid call."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
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
    """The version of an optional module. One that is there but broken must not stop the report."""
    try:
        return importlib.import_module(name).__version__
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"does not import: {error}"
    except Exception as error:
        return f"does not import: {error}"


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
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of q, k, v and bias (default: bf16)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--causal", action="store_true", help="keys up to the position of the query only")
    parser.add_argument("--q-offset", type=int, metavar="N", help="absolute position of query 0")
    parser.add_argument("--window", type=window, metavar="LEFT,RIGHT", help="sliding window; 128, is open to the right")
    parser.add_argument("--softcap", type=float, metavar="X", help="bound of the scores")
    parser.add_argument("--alibi", action="store_true", help="with ALiBi slopes")
    parser.add_argument("--sinks", action="store_true", help="with attention sinks")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="dropout probability")
    parser.add_argument("--mask", type=shape, metavar="B,H,LQ,LK", help="shape of a boolean mask")
    parser.add_argument("--bias", type=shape, metavar="B,H,LQ,LK", help="shape of an additive bias")
    parser.add_argument("--grad", action="store_true", help="every tensor but the mask requires gradients")


def shape(text: str) -> tuple[int, ...]:
    """Parse ``2,8,1024,64``."""
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"expected four sizes such as 2,8,1024,64, got {text!r}")
    return tuple(int(size) for size in sizes)


def window(text: str) -> tuple[int | None, int | None]:
    """Parse ``128,0``; a side left empty is open."""
    left, comma, right = text.partition(",")
    if not comma or not all(size.isdecimal() or not size for size in (left, right)):
        raise argparse.ArgumentTypeError(f"expected two sizes such as 128,0 or 128, with an open side, got {text!r}")
    return int(left) if left else None, int(right) if right else None


def device(text: str) -> torch.device:
    """Parse a device that this machine has."""
    present = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if not torch.cuda.is_available():
        present = ["cpu"]
    if text not in present:
        raise argparse.ArgumentTypeError(f"expected a device of this machine ({', '.join(present)}), got {text!r}")
    return torch.device(text)


def run_explain(args: argparse.Namespace) -> int:
    """Print the table for uninitialised tensors of the given shapes: their memory is never touched."""
    dtype = DTYPES[args.dtype]
    key_shape = args.k or args.q

    def empty(sizes: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=args.device, requires_grad=args.grad)

    explanation = fastattn.explain(
        empty(args.q),
        empty(key_shape),
        empty(args.v or key_shape),
        causal=args.causal,
        q_offset=args.q_offset,
        window=args.window,
        softcap=args.softcap,
        alibi_slopes=empty(args.q[1:2]) if args.alibi else None,
        sinks=empty(args.q[1:2]) if args.sinks else None,
        dropout_p=args.dropout,
        mask=torch.empty(args.mask, dtype=torch.bool, device=args.device) if args.mask else None,
        bias=empty(args.bias) if args.bias else None,
    )
    print(explanation)
    return 0


# bench


def run_bench(args: argparse.Namespace) -> int:
    """List the benchmarks of the checkout that this package is imported from."""
    root = PACKAGE.parent
    scripts = sorted(root.glob("benchmarks/bench_*.py"))
    if not scripts:
        print("The benchmarks come with the source repository, not with the installed package.")
        print("In the root of a checkout `python -m fastattn bench` lists them.")
        return 0
    print(f"In {root}:")
    for script in scripts:
        summary = (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]
        print(f"  python -m benchmarks.{script.stem}\n      {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

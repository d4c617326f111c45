"""What all examples use: the frame of a program, a progress bar, checkpoints, metrics.json, the style of figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastattn

# Okabe and Ito's colours, which people with colour blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")
STYLE: dict[Any, Any] = {  # matplotlib types its keys as the literal strings
    "figure.dpi": 150,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
}


class InputError(ValueError):
    """The user's input cannot be used; the message says why and what to do."""


def run_program(run: Callable[[], None], goes_on_from: str) -> int:
    """Run an example to its end. Returns the exit code: 0; 2 if the input cannot be used; 130 if the user stops it.

    Args:
        run: the whole example after its arguments are read.
        goes_on_from: where `--resume` continues, for the message after Ctrl-C.
    """
    try:
        run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:  # only one of several processes prints it
            print(f"\nstopped; the same command with --resume goes on from the last {goes_on_from}", file=sys.stderr)
        return 130
    return 0


def add_common_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """Add the arguments of every example; `check_device` completes them."""
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the output folder")
    parser.add_argument("--output", type=Path, default=output, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Choose the device, or stop if the requested one does not exist."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")


def positive(text: str) -> int:
    """The type of an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


class Progress:
    """A progress bar on stderr: redrawn in a terminal; in a log file, one line for every tenth."""

    def __init__(self, total: int, width: int = 30) -> None:
        self.total, self.width = total, width
        self.start = time.monotonic()
        self.first: int | None = None  # where a resumed run goes on
        self.terminal = sys.stderr.isatty()
        self.tenth = 0

    def show(self, done: int, note: str) -> None:
        """Show that `done` of the total are done; `note` is a further text."""
        share = min(done / max(self.total, 1), 1.0)
        seconds = time.monotonic() - self.start
        self.first = done - 1 if self.first is None else self.first
        remaining = seconds / (done - self.first) * (self.total - done) if done > self.first else 0.0
        left = f"about {remaining:.0f} s left" if remaining > 0 else ""
        bar = "#" * round(share * self.width)
        text = f"training [{bar:<{self.width}}] {note}  {seconds:.0f} s  {left}"
        if self.terminal:
            print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)
        elif int(share * 10) > self.tenth:
            self.tenth = int(share * 10)
            print(text.rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


class CheckpointError(InputError):
    """The checkpoint does not belong to this run."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings, lists and dicts only: what `torch.load(weights_only=True)` accepts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)  # in one step: a run that is stopped while it writes leaves the old checkpoint


def read_checkpoint(
    path: Path, identity: dict[str, dict[str, Any]], device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Read a saved state.

    Args:
        identity: settings by group ("config", "recipe", "data") that the checkpoint must have been written with.
        device: the device of its tensors.

    Raises:
        CheckpointError: it was written with other settings, or it is no checkpoint.
    """
    try:
        # weights_only: a checkpoint is data. Without it, loading a stranger's file can run the stranger's code.
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on a foreign file torch.load may raise any error
        raise CheckpointError(f"{path} is not a checkpoint: {error!r}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a checkpoint: expected a dict, got {type(state).__name__}")
    for group, settings in identity.items():
        for name, expected in settings.items():
            got = state.get(group, {}).get(name)
            if got != expected:
                raise CheckpointError(
                    f"{path} belongs to another run: expected {group} {name}={expected!r}, got {got!r}; "
                    "use another --output, or leave out --resume"
                )
    return state


def load_checkpoint(path: Path, model: nn.Module, identity: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Load the latest weights into `model`; return everything that was saved. Raises as `read_checkpoint`."""
    state = read_checkpoint(path, identity, next(model.parameters()).device)
    model.load_state_dict(state["model"])
    return state


def count_parameters(model: nn.Module) -> int:
    """Shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def environment(device: str) -> dict[str, Any]:
    """The versions and the machine that the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "fastattn": fastattn.__version__,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
    }


def write_metrics(path: Path, schema: int, metrics: dict[str, Any]) -> None:
    """Write metrics.json; `schema` rises when a field changes its meaning or is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # allow_nan=False: NaN is not JSON, and a NaN in a result is a bug that must show.
    path.write_text(json.dumps({"schema": schema} | metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")

"""Parity of the CUDA C++ kernels in a process of its own, which a deadlock cannot outlive: before they are timed.

tests/kernels/test_cuda.py holds them to the rule in every case; here are those that a run of minutes times.
"""

import itertools
import json
import subprocess
import sys
from typing import NamedTuple

import fastattn
from fastattn.testing import check_attention

from .device import CudaDevice
from .problems import Problem, check_output, make_inputs, options
from .provenance import ROOT

PASSES = ("forward", "backward")
SECONDS = 60.0
"""For all cases of a pass, starting PyTorch and CUDA included."""
LENGTH = 389
"""Several tiles of every pass and a tail."""


class Case(NamedTuple):
    dtype: str
    head_dim: int
    causal: bool

    def __str__(self) -> str:
        return f"{'causal' if self.causal else 'plain'}, {self.dtype}, head dim {self.head_dim}"


CASES = [Case(*each) for each in itertools.product(("bf16", "fp16"), (128, 64, 256), (True, False))]
_known: dict[str, dict[Case, str]] = {}
"""pass -> case -> what is wrong, empty if nothing is"""


def outcomes(which: str, limit: float = SECONDS) -> dict[Case, str]:
    """What is wrong with each case of a pass, empty if nothing is; found out once, within ``limit`` seconds."""
    if which not in _known:
        _known[which] = dict.fromkeys(CASES, f"no result within {limit:.0f} s") | run(which, limit)
    return _known[which]


def command(which: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.harness.cuda_kernels", which]


def run(which: str, limit: float) -> dict[Case, str]:
    """The outcomes that a process of its own has printed when it ends or is ended."""
    with subprocess.Popen(
        command(which), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            errors = ""
    found = {Case(*case): text for case, text in map(json.loads, output.splitlines())}
    if process.returncode and errors.strip():  # it died: of the cases that it did not come to, its last words
        return dict.fromkeys(CASES, errors.strip().splitlines()[-1][:200]) | found
    return found


def check(which: str, case: Case) -> None:
    """Hold one pass to the rule.

    Raises:
        AssertionError, WrongResult: a result breaks it.
    """
    problem = Problem(2, 4, 2, LENGTH, case.head_dim, case.dtype, case.causal)
    x = make_inputs(problem, CudaDevice(), 0, False)
    if which == "forward":
        out = fastattn.attention(x.q, x.k, x.v, **options(problem, x), backend="cuda")
        check_output(out, problem, x, own=True, rows=LENGTH)
    else:
        check_attention(x.q, x.k, x.v, **options(problem, x), backend="cuda")


def main(which: str) -> None:
    """Be the process: a line for each case as soon as its outcome is known."""
    for case in CASES:
        text = ""
        try:
            check(which, case)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps([case, text]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

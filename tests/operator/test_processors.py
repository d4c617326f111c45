"""Verdicts that depend on the processor or on the number of threads: where results of PyTorch are the measure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/operator/test_functional.py",
    "tests/kernels/test_decode.py::test_pytorch_kernel",
    "tests/nn/test_nn_transformer.py::test_training_step_has_the_losses_of_torch",
    "tests/integrations/test_convert.py::test_optimizer_built_before_conversion_still_trains_the_model",
)
RUN = f"""
import sys, torch, pytest
print("runs with", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not triton", *{TESTS!r}]))
"""


# MKL and PyTorch choose their kernels by the processor, once in a process.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "threads"),
    [({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}, 1), ({}, 2)],
    ids=["oldest instructions", "two threads"],
)
def test_the_rule_holds_on_other_processors(choice, threads):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= choice | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}  # no spinning beside others
    result = subprocess.run([sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    capability = "DEFAULT" if choice else torch.backends.cpu.get_cpu_capability()
    assert f"runs with {capability} {threads}\n" in result.stdout

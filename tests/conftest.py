"""Shared by all tests: where kernels run, and NaN in every buffer that nothing has written yet."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, on CPU tensors. Decided before they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN, so an element that a kernel forgets to write fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where kernels are tested."""
    return DEVICE

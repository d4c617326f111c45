"""Shared by all tests: where kernels run, and NaN in every buffer that nothing has written yet."""

import importlib.util
import itertools
import os

import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, on CPU tensors. Decided before they are first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Of two processes each begins with its half: files with slow tests are the first there, so that in the end they
    share short ones.
    """
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT") != "2":
        return
    of_file = {}
    for item in items:
        of_file.setdefault(item.path, []).append(item)
    slow = [tests for tests in of_file.values() if any(item.get_closest_marker("slow") for item in tests)]
    first, second = (list(itertools.chain.from_iterable(slow[n::2])) for n in (0, 1))
    others = [item for tests in of_file.values() if tests not in slow for item in tests]
    middle = max(len(items) // 2 - len(first), 0)
    items[:] = [*first, *others[:middle], *second, *others[middle:]]


@pytest.fixture(scope="session", autouse=True)
def interpreter_for_tests():
    """Interpreted kernels take half the time, and compute the same on every processor."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from tests.support import exact_products, quick_interpreter

        quick_interpreter.install()
        exact_products.install()


@pytest.fixture(scope="session", autouse=True)
def remembered():
    """The specification of a call is computed once, whatever is held to it."""
    from tests.support import remembered

    remembered.install()


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


@pytest.fixture(params=["triton", "cpu"])
def backend(request) -> str:
    """Each backend with kernels of its own."""
    return request.param


def parameter(request, name):
    """What the test at hand is run with."""
    callspec = getattr(request.node, "callspec", None)
    return None if callspec is None else callspec.params.get(name)


@pytest.fixture
def device(request) -> str:
    """Where the backend at hand is tested."""
    return "cpu" if parameter(request, "backend") == "cpu" else DEVICE


@pytest.fixture(autouse=True)
def needs_cpu_library(request):
    """A test of the CPU kernels needs them compiled: `tests/cpu` fails where they could be and are not."""
    if parameter(request, "backend") == "cpu":
        from fastattn.backends.cpu import library as cpu_library

        if problem := cpu_library.problem():
            pytest.skip(f"the CPU library is {problem}")

"""What the tests of the CPU library share: another number of threads, another instruction set."""

import pytest
import torch

from fastattn.backends.cpu import library as cpu_library


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "wide"])
def variant(request):
    library = cpu_library.load()
    before = library.fastattn_cpu_variant()
    if not library.fastattn_cpu_use_variant(request.param.encode()):
        pytest.skip(f"{request.param}: not compiled, or not what this processor has")
    yield
    assert library.fastattn_cpu_use_variant(before)

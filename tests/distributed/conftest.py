"""One group of processes for all tests of this folder."""

import pytest
import torch.distributed as dist

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    found = Ranks()
    yield found
    found.stop()

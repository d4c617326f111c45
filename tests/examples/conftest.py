"""Shared by the tests of the examples."""

import pytest
import torch

from examples import beside


@pytest.fixture(autouse=True)
def one_thread():
    """As in the program; threads cost more than they bring at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def steps_are_timed_once(monkeypatch):
    monkeypatch.setattr(beside, "SECONDS", 0.0)

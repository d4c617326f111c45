"""Shared by the tests of generation."""

import pytest
import torch

from tests.support.generation import VOCAB, language_model


@pytest.fixture
def model():
    return language_model()


@pytest.fixture
def prompt():
    return torch.randint(VOCAB, (3, 5))

"""What counts as an operation of attention."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import flops


def test_flops_are_those_of_the_two_products():
    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 4)
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-1, -2)) @ v
    assert flops.attention_flops(2, 3, 5, 7, 8, 4) == counter.get_total_flops()


def test_flop_conventions():
    full = flops.attention_flops(4, 16, 2048, 2048, 128)
    assert full == 4 * 4 * 16 * 2048 * 2048 * 128
    assert flops.attention_flops(4, 16, 2048, 2048, 128, causal=True) == full / 2 * (1 + 1 / 2048)
    assert flops.attention_flops(1, 1, 100, 100, 8, causal=True, window=9) == 4 * 8 * (100 * 10 - 45)
    assert flops.attention_flops(4, 16, 2048, 2048, 128, mode="backward") == 2.5 * full
    assert flops.attention_flops(4, 16, 2048, 2048, 128, mode="forward+backward") == 3.5 * full

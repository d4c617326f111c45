"""The model's clock, on schedules that can be followed by hand, and on those of the strategies."""

import pytest

import fastattn.distributed as fd
from fastattn.distributed.cost import STRATEGIES, Sizes, cost
from fastattn.distributed.layout import View
from fastattn.distributed.schedule import Move, Step, play, received

LINK = fd.Link(latency=1.0, bandwidth=10.0, flops=1.0)


def test_a_message_hides_behind_the_work_of_the_step_before():
    steps = [Step((), [5.0, 5.0]), Step([Move(0, 1, 30), Move(1, 0, 20)], [2.0, 2.0])]
    assert play(steps, 2, LINK) == [7.0, 7.0]  # they take 4 and 3 seconds
    assert play([steps[0]._replace(work=[1.0, 1.0]), steps[1]], 2, LINK) == [6.0, 6.0]  # each waits for both
    assert received(steps, 2) == [[20, 30]]


def test_what_leaves_is_waited_for_after_the_next_work():
    steps = [Step((), [1.0, 4.0], [Move(0, 1, 10)]), Step((), [1.0, 1.0])]
    assert play(steps, 2, LINK) == [6.0, 6.0]  # from 4, when both are there, until 6
    assert play(steps[:1], 2, LINK) == [6.0, 6.0]


def test_ways_in_and_out_are_shared():
    together = [Move(0, 2, 10), Move(1, 2, 10)]
    assert play([Step(together, [0.0] * 3)], 3, LINK) == [2.0, 3.0, 3.0]
    apart = fd.Link(latency=1.0, bandwidth=10.0, machine=2, near_latency=0.0, near_bandwidth=100.0)
    assert play([Step([Move(0, 1, 10), Move(0, 2, 10)], [0.0] * 3)], 3, apart) == [2.0, 0.1, 2.0]
    assert play([Step([Move(0, 1, 10)], [0.0] * 2)], 2, apart, lambda rank: 2 * rank) == [2.0, 2.0]


def test_copies_take_the_time_of_the_rank():
    copying = fd.Link(latency=1.0, bandwidth=10.0, copy=0.25)
    assert play([Step((), [9.0] * 2), Step([Move(0, 1, 8)], [0.0, 0.0])], 2, copying) == [11.0, 11.0]


def sizes(ranks, tokens, balance="zigzag", width=1):
    return Sizes(ranks, balance, 1, 8, 8, tokens, tokens, 64, 64, 2, View(0, None, 0), 0, width)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zigzag_gives_every_rank_the_same_work_in_every_step(strategy, ranks, backward):
    fast = fd.Link(latency=0.0, bandwidth=float("inf"), flops=1.0)  # whole seconds: sums are exact
    found = cost(sizes(ranks, 2 * 64 * ranks), fast, strategy, backward)
    assert found.exposed == 0.0 or (strategy == "ulysses" and 8 % ranks)
    late = cost(sizes(ranks, 2 * 64 * ranks, "contiguous"), fast, strategy, backward)
    assert late.compute > found.compute or strategy == "ulysses"


def test_the_link_within_a_machine_serves_the_rows_of_a_mesh():
    slow = fd.Link(bandwidth=1e6, latency=0.0)
    near = fd.Link(bandwidth=1e6, latency=0.0, machine=2, near_bandwidth=1e30)
    whole = sizes(4, 512, width=2)
    assert cost(whole, near, "ring").exposed < cost(whole, slow, "ring").exposed
    assert cost(whole, near, "ring").bytes == cost(whole, slow, "ring").bytes


def test_every_call_of_the_kernel_costs():
    # Of its own keys a rank's rows see three pairs of pieces of four, of the other's two.
    assert cost(sizes(2, 256), fd.Link(flops=float("inf"), call=1.0), "ring").compute == 5.0


def test_every_message_costs():
    # Three of the four pieces are seen by the other rank; in the backward pass their gradients go home, too.
    free = {"flops": float("inf"), "bandwidth": float("inf"), "latency": 0.0}
    for backward, count in ((False, 3), (True, 6)):
        assert cost(sizes(2, 256), fd.Link(**free, message=1.0), "ring", backward).seconds == count

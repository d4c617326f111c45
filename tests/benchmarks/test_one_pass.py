"""The trial of a backward pass with five products: right on every tile, in turns, beside the kernels in use."""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from benchmarks.harness import device as devices
from benchmarks.tools import compile_report, one_pass, one_pass_kernel, sass, static_model
from fastattn.kernels import launch
from fastattn.testing import assert_parity
from tests.support.attention_cases import BFLOAT, DOUBLE, HALF, make_qkv

if not launch.INTERPRETED.value:
    pytest.skip("a trial that has not run on a GPU: --measure runs it there", allow_module_level=True)


def gradients(leaves, dout, causal, dtype):
    """(dq, dk, dv) by eager PyTorch in ``dtype``."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in leaves)
    s = q @ k.mT * q.shape[3] ** -0.5
    if causal:
        s = s.masked_fill(torch.ones(s.shape[2:]).triu(1).bool(), float("-inf"))
    return torch.autograd.grad(torch.softmax(s, -1) @ v, (q, k, v), dout.to(dtype))


def one_pass_gradients(leaves, dout, causal, tile, turn, **options):
    ready = one_pass_kernel.prepared(*leaves, causal)
    return one_pass_kernel.backward(
        dout, *leaves, *ready, leaves[0].shape[3] ** -0.5, causal, (*tile, 4, 3), turn, **options
    )


def problem(length, dim=64, dtype=BFLOAT, batch=1):
    leaves = make_qkv("cpu", (length, length), dims=(dim, dim), batch=batch, dtype=dtype)
    return leaves, torch.randn(batch, 2, length, dim).to(dtype)


CASES = [
    (64, BFLOAT, (64, 32), 1), (64, HALF, (32, 64), 2), (128, BFLOAT, (32, 32), 3), (64, BFLOAT, (32, 128), 2),
    (64, BFLOAT, (32, 32), 0),
]  # fmt: skip
"""Head dim, dtype, tile, tiles of queries in a turn: 0 in any order."""


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "dtype", "tile", "turn"), CASES)
def test_gradients_are_right(dim, dtype, tile, turn, causal):
    leaves, dout = problem(128, dim, dtype)
    found = one_pass_gradients(leaves, dout, causal, tile, turn)
    exact, eager = (gradients(leaves, dout, causal, of) for of in (DOUBLE, dtype))
    for name, *results in zip(("dq", "dk", "dv"), found, exact, eager, strict=True):
        assert_parity(*results, name)


def test_tiles_and_turns_do_not_change_the_order_of_the_additions():
    leaves, dout = problem(128, batch=2)
    first, *others = (one_pass_gradients(leaves, dout, True, (block_m, 32), turn)[0] for block_m, turn in
                      ((32, 1), (32, 3), (64, 2)))  # fmt: skip
    assert all(torch.equal(first, other) for other in others)


def test_a_program_needs_the_turn_before_its_own():
    leaves, dout = problem(64)
    with pytest.raises(InterpreterError, match="expected its turn to have come"):
        one_pass_gradients(leaves, dout, False, (32, 32), 1, first_place=2)


def test_lengths_that_tiles_do_not_divide_are_refused():
    leaves, dout = problem(96)
    with pytest.raises(ValueError, match="expected a length that 32 and 64 divide, got 96"):
        one_pass_gradients(leaves, dout, False, (32, 64), 1)


@pytest.mark.parametrize(
    ("length", "heads", "expected"), [(4096, 64, 8), (16384, 16, 2), (1024, 6, 6), (1 << 20, 3, 1)]
)
def test_heads_side_by_side_fit_the_cache(length, heads, expected):
    assert one_pass_kernel.together(length, heads, 128) == expected


LOOP = """
.L_x_1:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   MEMBAR.ALL.GPU ;
.L_x_2:
        /*0030*/                   LDG.E.STRONG.GPU R3, desc[UR4][R4.64] ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   MUFU.EX2 R3, R4 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
"""


def test_a_poll_is_no_main_loop_and_costs_a_round_trip():
    assert sass.main_loops(LOOP) == []
    (loop,) = sass.main_loops(one_pass.without_polls(LOOP))
    assert len(loop) == 6
    longer = static_model.walk(one_pass.with_waits(loop, 8, 700), 8) - static_model.walk(loop, 8)
    assert longer == pytest.approx(2 * 700)
    assert one_pass.with_waits(loop, 8, 0) == loop


def makespan(causal, turn, latency, heads=1, slots=4, tile="64,128,8,3"):
    return one_pass.makespan(one_pass.Form(128, tile, causal, turn), 512, heads, slots, 100.0, latency)


def test_programs_wait_for_the_turn_before_theirs():
    assert makespan(False, 1, None) == 8 * 100
    assert makespan(False, 1, 10.0) == 8 * 100 + 3 * (100 + 10)  # each of four starts a tile and a round trip later
    assert makespan(False, 2, 10.0) == 8 * 100 + 3 * (200 + 10)
    assert makespan(False, 1, 10.0, slots=1) == 4 * 8 * 100  # one after another: none waits


def test_with_causal_order_a_program_is_behind_the_one_of_the_next_keys():
    square = "128,128,8,3"  # the tiles of keys are visited by 1, 2, 3 and 4 tiles of queries
    assert makespan(True, 1, None, tile=square) == 4 * 100
    assert makespan(True, 1, 10.0, tile=square) == 4 * 100 + 3 * 10


def test_the_comparison_has_a_line_for_each_form(monkeypatch):
    result = compile_report.Result("sm_90", "dkdv", 128, "plain", config="64x128 w8 s3", registers=255, shared=198144)
    result.loop = sass.main_loops(one_pass.without_polls(LOOP))[0] * 20
    monkeypatch.setattr(one_pass, "compiled", lambda form: result)
    monkeypatch.setattr(one_pass, "in_use", lambda *_: {"dkdv": 0.75, "dq": 0.75})
    lines = one_pass.report(128, True, 4096, None).splitlines()
    assert "two kernels 0.536 (dkdv 0.750, dq 0.750)" in lines[0]
    rows = [row.split() for row in lines[2:]]
    assert [row[2] for row in rows] == ["s3"] * 3 and [row[3] for row in rows] == ["none", "2", "4"]
    unordered, *ordered = ([float(x) for x in row[10:14]] for row in rows)
    assert unordered[1] == unordered[2] > unordered[3]
    for loop, turns, queue, passes in ordered:
        assert loop >= turns >= queue > passes
    assert ordered[0][1] < ordered[1][1]  # a round trip for every fourth tile instead of every second
    usual, slow = (float(ratio.strip("%")) for ratio in rows[1][-2:])
    assert usual == pytest.approx(100 * (ordered[0][3] / 0.536 - 1), abs=1) and slow < usual


def test_the_measurement_compares_repeats():
    form = one_pass.Form(64, "32,32,4,3", True, 2)
    text = one_pass.measured(form, 1, 2, 64, devices.DryRun())
    assert "repeats equal" in text and float(text.split()[-1]) < 0.01

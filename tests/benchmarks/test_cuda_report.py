"""The prediction for two warp groups that take turns, on loops whose time is known."""

import pytest

pytest.importorskip("triton")

from benchmarks.tools import cuda_report, static_model
from benchmarks.tools.sass import Instruction

PRODUCT = Instruction("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR16], R24")
LAST = Instruction(PRODUCT.opcode, PRODUCT.operands + ", gsb0")
WAIT = Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
EXPONENTIAL = Instruction("MUFU.EX2", "R2, R2")
TURN, PASS = Instruction("BAR.SYNC.DEFER_BLOCKING", "R2, 0x100"), Instruction("BAR.ARV", "R15, 0x100")


def loop(products, exponentials):
    return [TURN, *[PRODUCT] * (products - 1), LAST, PASS, WAIT, *[EXPONENTIAL] * exponentials]


def test_products_hide_the_exponentials_of_the_other():
    """One group exponentiates while the other multiplies: the products of both take all of the time."""
    cycles = 2 * 32 * static_model.wgmma_cycles(PRODUCT)
    code = loop(32, 100)
    assert cuda_report.in_turns(code, 2) == pytest.approx(cycles, rel=0.05)
    in_step = cycles + 2 * 100 * static_model.EXPONENTIAL_CYCLES  # there nothing is hidden
    assert static_model.walk(code, 8) == pytest.approx(in_step, rel=0.05)


def test_exponentials_are_the_limit():
    """Many of them: the unit that both share is never idle."""
    assert cuda_report.in_turns(loop(4, 200), 2) == pytest.approx(2 * 200 * static_model.EXPONENTIAL_CYCLES, rel=0.05)


def test_a_third_group_fills_what_two_leave():
    """Softmax that takes longer than the products of one other group: with two others the products never pause."""
    code = [*loop(32, 200), *[Instruction("FADD", "R2, R2, R3")] * 900]
    products = 32 * static_model.wgmma_cycles(PRODUCT)
    assert cuda_report.in_turns(code, 2) > 1.1 * 2 * products
    assert cuda_report.in_turns(code, 3) == pytest.approx(3 * products, rel=0.05)


def test_the_mask_is_left_out():
    branch, masked = Instruction("BRA", "P1, `(.L_x_69)"), Instruction("FSEL", "R92, R92, -INF , !P4")
    code = [*loop(4, 2), branch, Instruction("ISETP.GE.AND", "P4"), masked, masked, EXPONENTIAL]
    assert cuda_report.without_mask(code) == [*loop(4, 2), branch, EXPONENTIAL]
    assert cuda_report.without_mask(loop(4, 2)) == loop(4, 2)

"""The prediction for warp groups that take turns or run apart, on loops whose time is known; which loop is the main
one."""

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
    assert cuda_report.apart(code, 2) == pytest.approx(cycles, rel=0.05)
    in_step = cycles + 2 * 100 * static_model.EXPONENTIAL_CYCLES  # there nothing is hidden
    assert static_model.walk(code, 8) == pytest.approx(in_step, rel=0.05)


def test_exponentials_are_the_limit():
    """Many of them: the unit that both share is never idle."""
    assert cuda_report.apart(loop(4, 200), 2) == pytest.approx(2 * 200 * static_model.EXPONENTIAL_CYCLES, rel=0.05)


def test_a_third_group_fills_what_two_leave():
    """Softmax that takes longer than the products of one other group: with two others the products never pause."""
    code = [*loop(32, 200), *[Instruction("FADD", "R2, R2, R3")] * 900]
    products = 32 * static_model.wgmma_cycles(PRODUCT)
    assert cuda_report.apart(code, 2) > 1.1 * 2 * products
    assert cuda_report.apart(code, 3) == pytest.approx(3 * products, rel=0.05)


def assembly(*lines):
    """A listing as nvdisasm prints it: labels end with a colon."""
    code = "\n".join(
        x if x.endswith(":") else f"        /*{16 * n:04x}*/                   {x} ;" for n, x in enumerate(lines)
    )
    return f".text.kernel:\n{code}\n"


def opcodes(loop):
    return [i.opcode.split(".")[0] for i in loop]


PRODUCT_LINE = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24"


def test_the_main_loop_without_its_mask():
    """The mask has a loop of its own, and so has a wait; the loop over works surrounds them all."""
    listing = assembly(
        ".L_x_1:", "S2R R0, SR_CTAID.X", ".L_x_2:", PRODUCT_LINE, "@P1 BRA `(.L_x_4)", ".L_x_3:", "IADD3 R1, R1, 0x1",
        "@P2 BRA `(.L_x_3)", "FSEL R92, R92, -INF , !P4", ".L_x_4:", "MUFU.EX2 R2, R2", "@P0 BRA `(.L_x_2)",
        "STG R0, R1", "@P3 BRA `(.L_x_1)", ".L_x_5:", "@P5 BRA `(.L_x_5)",
    )  # fmt: skip
    assert opcodes(cuda_report.main_loop(listing)) == ["HGMMA", "BRA", "MUFU", "BRA"]
    unmasked = assembly(".L_x_2:", PRODUCT_LINE, "MUFU.EX2 R2, R2", "@P0 BRA `(.L_x_2)")
    assert opcodes(cuda_report.main_loop(unmasked)) == ["HGMMA", "MUFU", "BRA"]


def kernel(what, scores, sums, dim=64, registers=168):
    loop = [*[PRODUCT] * (scores + sums - 1), LAST, WAIT, EXPONENTIAL]
    return cuda_report.Kernel("BFloat", dim, False, what, registers, 0, False, loop)


def test_passes_of_a_backward_computation_count_for_five_products():
    """dK and dV in one pass do four products, dQ three: at the peak in both, five of seven are useful."""
    passes = [kernel("dkdv", 2 * 4, 2 * 4), kernel("dq", 2 * 4, 4)]
    assert [cuda_report.tile_of(each) for each in passes] == [64, 64]
    (together,) = cuda_report.backward(passes)
    assert (together["passes"], together["products"]) == ("dkdv dq", "7")
    rows = [cuda_report.row(each) for each in passes]
    for column in ("in step", "apart"):
        expected = 5 / (4 / float(rows[0][column]) + 3 / float(rows[1][column]))
        assert float(together[column]) == pytest.approx(expected, abs=1e-3)

"""What is read out of disassembled kernels, on a loop written by hand whose counts and cycles are known."""

import pytest

from benchmarks.harness import predictions, results
from benchmarks.tools import sass, static_model

LOOP = """
.L_x_1:
        /*0000*/                   DEPBAR.LE SB0, {pending} ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], R88, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R3, R4 ;
        /*0060*/                   LDL R5, [R1+0x8] ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R211], desc[UR20][R170.64], !P3 ;
        /*0090*/                   LDGDEPBAR ;
        /*00a0*/              @!P3 BRA `(.L_x_1) ;
"""
AROUND = """
.L_x_0:
        /*0000*/                   MOV R1, R2 ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
{loop}
        /*0200*/                   STL [R1], R2 ;
        /*0210*/               @P1 BRA `(.L_x_9) ;
.L_x_9:
        /*0220*/                   EXIT ;
"""


def only_loop(pending):
    (loop,) = sass.main_loops(AROUND.format(loop=LOOP.format(pending=pending)))
    return loop


def test_main_loops_are_found_and_counted():
    counts = sass.count(only_loop("0x1"))
    assert (counts.instructions, counts.local, counts.exponentials) == (11, 1, 1)
    assert (counts.wgmma, counts.smallest_n, counts.mma_sync, counts.serialised) == (3, 64, 0, False)
    assert counts.prefetch == 1.0
    assert sass.count(only_loop("0x0")).prefetch == 0.0


def test_stored_shares_are_found_for_their_rows(tmp_path):
    table = [
        {"kernel": kernel, "feature": "causal", "dim": "128", "config": "128x64 w8 s3", "share": share}
        for kernel, share in (("forward", "0.750"), ("dq", "0.700"), ("backward", "0.500"))
    ]
    results.upsert(tmp_path / "sm_90.csv", static_model.stored(table))
    assert len(results.read(tmp_path / "sm_90.csv")) == 2
    measured = {"provider": "fastattn", "case": "grid", "mode": "backward", "dtype": "bf16", "q_len": "4096"}
    measured |= {"kv_len": "4096", "head_dim": "128", "causal": "yes", "of_matmul": "0.6"}
    assert predictions.beside(measured, tmp_path) == "predicted 50% of the peak, measured 60% of matrix products"
    assert predictions.beside(measured | {"causal": "no"}, tmp_path) == ""


def test_units_count_every_warp():
    p = static_model.predict(only_loop("0x1"), "forward", 128, 64, 128, warps=8, registers=200, shared=128 * 1024)
    assert p.tensor == 2 * (32 + 32 + 64)  # two warp groups; 64 x n x 16 takes n / 2 cycles
    assert p.issue == 11 * 2 and p.exponentials == 8 * 2 and p.programs == 1
    assert p.serial >= p.tensor


def test_small_products_are_bound_by_shared_memory():
    product = sass.Instruction("HGMMA.64x16x16.F32.BF16", "R88, gdesc[UR12], R88")
    assert static_model.wgmma_cycles(product) == 20  # and not 8
    assert static_model.wgmma_cycles(sass.Instruction("FADD", "R1, R2, R3")) == 0


def test_a_copy_that_is_awaited_at_once_is_exposed():
    ahead, at_once = (static_model.walk(only_loop(pending), warps=8) for pending in ("0x1", "0x0"))
    assert at_once > static_model.COPY_LATENCY > ahead


@pytest.mark.parametrize(("tiles", "share"), [(132, 1.0), (133, 133 / 264), (66, 0.5)])
def test_waves(tiles, share):
    assert static_model.wave_share(tiles, programs=1) == share
    assert static_model.backward_share({"dkdv": 0.5, "dq": 0.5}) == pytest.approx(5 / 14)


def test_spilled_registers_move_through_shared_memory():
    assert static_model.shared_bytes(sass.Instruction("LDL", "R5, [R1+0x8]")) == 32 * 4
    assert static_model.shared_bytes(sass.Instruction("STL.64", "[R1], R2")) == 32 * 8

"""What is counted of loops compiled for GPUs that the static model lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tools import compile_report, loop_counts

ROOT = Path(__file__).resolve().parents[2]
BLACKWELL = """
.L_x_1:
        /*0000*/                   UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR16], idesc[UR17], !UPT ;
        /*0010*/                   UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR8], tmem[UR16], idesc[UR17], UP0 ;
        /*0020*/                   LDTM.x32 R4, tmem[UR8] ;
        /*0030*/                   MUFU.EX2 R3, R4 ;
        /*0040*/                   STTM.x16 tmem[UR8], R4 ;
        /*0050*/                   STL [R1], R2 ;
        /*0060*/              @!P3 BRA `(.L_x_1) ;
"""
AMPERE = """
.L_x_1:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/                   MUFU.EX2 R3, R4 ;
        /*0020*/              @!P3 BRA `(.L_x_1) ;
"""
LOG = "ptxas info    : 0 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\nUsed 120 registers"


def read(arch, code, columns=0, shared=70000):
    row = loop_counts.Row(arch, "dq", 64, "plain")
    loop_counts.read(row, compile_report.Compiled("128x64 w8 s2", shared, LOG, code), columns)
    return row


def test_loops_of_tensor_memory_are_counted():
    row = read("sm_100", BLACKWELL, columns=256)
    assert (row.registers, row.spills, row.shared, row.programs) == (120, 12, 70000, 2)
    assert (row.instructions, row.tcgen05, row.tensor_memory, row.exponentials, row.local) == (7, 2, 2, 1, 1)
    assert (row.mma_sync, row.wgmma) == (0, 0)
    assert row.per_1000 == round(7 * 8 * 1000 / (128 * 64), 1)


def test_loops_of_mma_sync_are_counted():
    row = read("sm_80", AMPERE)
    assert (row.instructions, row.mma_sync, row.tcgen05, row.tensor_memory, row.exponentials) == (3, 1, 0, 0, 1)


def test_programs_are_those_that_fit_the_multiprocessor_of_the_target():
    assert loop_counts.programs("sm_90", 100, 8, 70000, 0) == 2  # 65536 registers of 104 for each of 256 threads
    assert loop_counts.programs("sm_90", 64, 8, 70000, 0) == 3
    assert loop_counts.programs("sm_80", 64, 8, 70000, 0) == 2  # 164 KB
    assert loop_counts.programs("sm_100", 64, 8, 70000, 512) == 1  # tensor memory
    assert loop_counts.programs("sm_80", 255, 8, 160000, 0) == 1


def test_the_table_has_a_value_for_each_column_or_the_error():
    failed = loop_counts.Row("sm_80", "dq", 128, "plain", error="no room")
    names, row, error = loop_counts.table([read("sm_80", AMPERE), failed]).splitlines()
    assert names.split()[-3:] == ["exp2", "local", "tmem"] and error.endswith("no room")
    assert row.split()[-12:] == ["120", "12", "70000", "2", "3", "2.9", "1", "0", "0", "1", "0", "0"]


@pytest.mark.slow
def test_kernels_of_other_targets_are_counted(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.tools.loop_counts", "--kernel", "dq", "--dims", "64", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    note, names, *rows = done.stdout.splitlines()
    assert loop_counts.NOTE in note
    products = names.split()[-6:-3]
    assert products == ["mma.sync", "wgmma", "tcgen05"]
    for row, arch, used in zip(rows, ("sm_80", "sm_100"), ("mma.sync", "tcgen05"), strict=True):
        counts = dict(zip(products, map(int, row.split()[-6:-3]), strict=True))
        assert row.startswith(arch) and {name for name, number in counts.items() if number} == {used}

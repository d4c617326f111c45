"""Every kernel compiles for Hopper with every feature, and fits its registers at the shipped launch configs. The other
targets have everything at once and steps over a cache.

What they need stands in stored tables, which are held to the limits here. Their rows have to be of the present kernels'
intermediate code, and a sample of them, another one after each change to the kernels, is compiled again and has to be
found as it stands.
"""

import os
import subprocess
import sys

import pytest
import triton
from torch import Tensor

from benchmarks.harness import provenance, resources, results
from benchmarks.tools import calls, compile_report
from benchmarks.tools import resources as tool
from fastattn.kernels import config, decode, forward
from fastattn.spec import CacheSpec, Operands, Options

CACHE = ("decode", "combine", "append")
ATTENTION = ("forward", "dkdv", "dk", "dv", "dq")
MEMORY = provenance.ROOT / ".cache" / "compiled"
"""What was compiled is kept until the kernels change."""

# What is not as it should be, by name: a row that joins or leaves these fails a test.
SERIALISED = {
    ("forward", "mask", "128"): resources.TRITONS,
    ("forward", "mask", "256"): resources.TRITONS,
    ("forward", "bias", "256"): resources.TRITONS,
    ("forward", "mask_aligned", "256"): resources.TRITONS,
}
"""Where ptxas lets the products of a tile wait for each other, and on which Triton; a tile that does not is wanted."""
SLOWER = {
    ("forward", "fp32", "256"): ("3.9.0",),
    ("dq", "fp32", "256"): ("3.9.0",),
    ("forward", "fp32", "128"): ("3.9.0",),
    ("dkdv", "everything", "128"): ("3.9.0",),
}
"""Where registers spill in the inner loop and a smaller tile is predicted to be faster; that tile is wanted."""
OF_A_CACHE = {
    ("decode", "odd_dim", "64"): ("3.7.1", "3.9.0"),  # rows in pieces
    ("decode", "odd_dim", "128"): resources.TRITONS,
    ("decode", "bias", "64"): ("3.9.0",),  # one access of one number
}
"""Kernels of a cache that access spilled registers in their loop, and on which Triton: the model lacks them."""
OUTSIDE_LOOPS = {("decode", "plain", "64"): ("3.7.1",), ("decode", "chunk", "128"): ("3.9.0",)}
"""Kernels of a cache with spills, none of which is in a loop."""
OF_OTHER_TARGETS = {("decode", "chunk", "64"): "sm_80", ("decode", "chunk", "128"): "sm_100"}
"""Kernels of a cache with spills, which nothing tells from those in a loop there."""
NOT_AHEAD = {
    **dict.fromkeys([("dk", "block_mask", "256"), ("dq", "block_mask", "256")], "twice the stages have no room"),
    **{("dk", f"{x}_aligned", "256"): "a third stage has no room beside its tiles" for x in ("mask", "bias")},
    **{(kernel, "fp32", dim): "one stage" for kernel in ATTENTION for dim in ("64", "128", "256")},
    **{(kernel, x, "192"): "a third stage has no room" for kernel in ("dk", "dq") for x in tool.IN_PIECES[192]},
    **{(kernel, "odd_dim", dim): "rows in pieces" for kernel in ("forward", "dq") for dim in ("64", "128", "256")},
}
"""Where a tile is loaded in the iteration that needs it, and why."""


def table(version, arch=resources.ARCH):
    """Rows of one file."""
    return results.read(resources.path(arch, version))


def describe(version, row):
    return f"Triton {version}: {row}"


def test_the_tables_are_of_the_present_kernels():
    present = provenance.code_digest()
    stored = {resources.stamp(*names)["digest"] for names in resources.TABLES}
    assert stored == {present}, f"kernels/ has changed since the table was made: `{resources.RENEW}` renews it"


@pytest.mark.parametrize(("arch", "version"), resources.TABLES)
def test_every_case_compiles_and_fits(arch, version):
    rows = table(version, arch)
    expected = [tool.key_of(case) for case in tool.cases(arch)]
    assert [resources.key(row) for row in rows] == expected, f"`{resources.RENEW}` renews the table"
    for row in rows:
        assert not row["error"], describe(version, row)
        assert 0 < int(row["registers"]) <= (512 if arch == "gfx942" else 255), describe(version, row)
        assert int(row["shared"]) <= compile_report.SHARED_LIMIT[arch], describe(version, row)


@pytest.mark.parametrize(("arch", "version"), resources.TABLES[len(resources.TRITONS) :])
def test_the_other_targets_have_every_kernel_and_spill_nothing_over_a_cache(arch, version):
    rows = table(version, arch)
    everything = {row["kernel"] for row in rows if row["feature"] == "everything"}
    assert everything >= {"forward", "dkdv", "dq", "dbias", "decode"}
    steps = [row for row in rows if row["feature"] != "everything"]
    assert len(steps) == 2 * (3 + 1 + 2)
    for row in steps:
        assert (row["spills"] != "0") == (OF_OTHER_TARGETS.get(resources.key(row)) == arch), describe(version, row)


def test_the_table_covers_every_kernel_feature_and_head_dim():
    for version in resources.TRITONS:
        found = {(row["kernel"], row["feature"], row["head_dim"]) for row in table(version)}
        for dim in tool.HEAD_DIMS:
            for feature in calls.FEATURES.keys() - {*calls.CACHE_ONLY, "narrow_values"}:
                kernels = {"forward", "dq", *(("dkdv",) if dim <= 128 else ("dk", "dv"))}
                assert {(kernel, feature, str(dim)) for kernel in kernels} <= found
            assert {kernel for kernel, _, at in found if at == str(dim)} >= {"dbias", "delta", *CACHE}


@pytest.mark.parametrize("version", resources.TRITONS)
def test_the_cache_kernels_spill_nothing(version):
    for row in table(version):
        plain = row["feature"] in ("plain", "paged", "chunk") and row["head_dim"] in ("64", "128")
        if row["kernel"] not in CACHE or not plain:
            continue
        listed = version in OUTSIDE_LOOPS.get(resources.key(row), ())
        assert (row["spills"] != "0") == listed, describe(version, row)
        if listed:
            assert row["local"] == row["local_edge"] == "0", describe(version, row)


@pytest.mark.parametrize("version", resources.TRITONS)
def test_spills_in_the_inner_loop_cost_nothing(version):
    """No spilled register is accessed in the inner loop, except where each smaller tile is predicted to be slower."""
    for row in table(version):
        if row["kernel"] in CACHE:
            assert (row["local"] != "0") == (version in OF_A_CACHE.get(resources.key(row), ())), describe(version, row)
            continue
        if row["local"] == "0":
            continue
        assert row["kernel"] in ATTENTION and row["smaller"], describe(version, row)
        slower = version in SLOWER.get(resources.key(row), ())
        assert (float(row["share"]) < float(row["smaller"])) == slower, describe(version, row)


@pytest.mark.parametrize("version", resources.TRITONS)
def test_products_of_16_bits_use_the_warp_groups(version):
    for row in table(version):
        serialised = version in SERIALISED.get(resources.key(row), ())
        assert row["serialised"] == results.text(serialised), describe(version, row)
        if row["kernel"] in ATTENTION and row["dtype"] == "bf16":  # tiles of a decode step are too short for it
            assert int(row["wgmma"]) > 0 and int(row["smallest_n"]) >= 16, describe(version, row)
            assert row["mma_sync"] == "0", describe(version, row)


@pytest.mark.parametrize("version", resources.TRITONS)
def test_tiles_are_loaded_an_iteration_ahead(version):
    rows = table(version)
    for row in rows:
        if row["kernel"] in ATTENTION:
            assert (float(row["prefetch"]) < 1) == (resources.key(row) in NOT_AHEAD), describe(version, row)
    shared = {resources.key(row): int(row["shared"]) for row in rows}
    for kernel in ("forward", "dkdv", "dq"):  # as many tiles are loaded ahead where a block mask says which
        for dim in {"64", "128"} & {row["head_dim"] for row in rows}:
            assert shared[kernel, "block_mask", dim] >= shared[kernel, "plain", dim]


def output(*arguments):
    """What the tool prints, where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.tools.resources", *arguments]
    result = subprocess.run(command, cwd=provenance.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_every_row_is_of_the_present_intermediate_code():
    """Who made the tables looked at each row. The code is made again if anything that decides it has changed since."""
    if triton.__version__ not in resources.TRITONS:
        pytest.skip(f"no table of Triton {triton.__version__}")
    if {resources.stamp(*names)["inputs"] for names in resources.TABLES} != {resources.inputs()}:
        assert output("--stale", "--triton", triton.__version__) == "", f"`{resources.RENEW}` renews the table"


def drawn(arch, version):
    """The sample of one table: the three of Hopper take a third of the kernels each, which the digest draws, the three
    of other targets likewise.
    """
    rows = resources.sample(table(version, arch), provenance.code_digest())
    return rows[resources.TABLES.index((arch, version)) % 3 :: 3]


def test_the_samples_have_every_kernel_between_them():
    drawn_of = {names: [row["kernel"] for row in drawn(*names)] for names in resources.TABLES}
    hopper = [kernel for (arch, _), kernels in drawn_of.items() if arch == resources.ARCH for kernel in kernels]
    assert sorted(hopper) == sorted(config.KERNELS)
    others = {kernel for (arch, _), kernels in drawn_of.items() if arch != resources.ARCH for kernel in kernels}
    assert others >= {"forward", "dkdv", "dq", "dbias", *CACHE}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "version"), resources.TABLES)
def test_a_sample_compiles_to_the_stored_rows(arch, version, tmp_path, monkeypatch):
    if tool.python_path(version) is None:
        pytest.skip(
            f"no Triton {version} here; `make test` installs the oldest and the newest beside that of the torch"
        )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    chosen = drawn(arch, version)
    names = [",".join((arch, *resources.key(row))) for row in chosen]
    options = ("--jobs", "1", "--output", str(tmp_path), "--memory", str(MEMORY))
    assert tool.with_triton(version, *options, "--only", *names) == 0
    again = {resources.key(row): row for row in results.read(resources.path(arch, version, tmp_path))}
    assert chosen
    for row in chosen:  # line numbers are part of what ptxas reads, and move the number of instructions by one or two
        assert again[resources.key(row)] | {"size": row["size"]} == row


def test_the_features_pass_every_operand_that_a_kernel_takes(monkeypatch):
    given = []

    def record(*arguments):
        given.extend(x for x in arguments if hasattr(x, "_fields"))

    for module, name in ((forward, "attention_forward"), (decode, "attention_kvcache")):
        monkeypatch.setattr(module, name, record)
    for name, feature in calls.FEATURES.items():
        calls.launch_kernels("decode" if name in calls.CACHE_ONLY else "forward", 64, feature)
        calls.launch_kernels("decode", 64, feature)
    elsewhere = {
        Operands: (),
        Options: ("q_offset",),
        CacheSpec: ("k", "v", "length", "num_splits"),
    }  # nothing compiled
    for kind, names in elsewhere.items():
        groups = [group for group in given if isinstance(group, kind)]
        for name in {*kind._fields} - {*names}:
            values = [getattr(group, name) for group in groups]
            absent = (None, [], kind._field_defaults.get(name))
            assert any(isinstance(value, Tensor) or value not in absent for value in values), (kind, name)


def test_another_digest_draws_another_sample():
    rows = table(resources.TRITONS[0])
    samples = [[resources.key(row) for row in resources.sample(rows, seed)] for seed in ("a", "b", "a")]
    assert samples[0] == samples[2] != samples[1]


def test_the_digest_follows_the_code_alone(tmp_path):
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "a.py"

    def digest(text):
        source.write_text(text)
        return provenance.code_digest(tmp_path)

    code = 'def f(x):\n    y = "# x"\n    return x + y\n'
    first = digest(code)
    assert (
        digest('"""What it does."""\n\n# why\n' + code.replace("(x):\n", '(x):  # here\n    """Sum.\n\n    So."""\n'))
        == first
    )
    assert digest(code.replace("x + y", "y + x")) != first
    assert digest(code.replace("# x", "# y")) != first


def test_a_smaller_tile_is_compiled_where_registers_spill(monkeypatch):
    compiled = []

    def compile_case(case, memory):
        compiled.append(case.override)
        result = compile_report.Result(case.arch, case.kernel, case.dim, case.feature, case.override, "128x64 w8 s3")
        result.local = 0 if case.dim == 64 else 5
        return result

    monkeypatch.setattr(compile_report, "compile_case", compile_case)
    shares = {"": 0.5, "64,64,8,3": 0.6, "128,32,8,3": 0.4}
    monkeypatch.setattr(tool, "share", lambda result: shares[result.override])
    rows = [tool.row_of(compile_report.Case("sm_90", "forward", dim, "plain")) for dim in (64, 128)]
    assert [(row["share"], row["smaller"]) for row in rows] == [("0.5", ""), ("0.5", "0.6")]
    assert compiled == ["", "", "64,64,8,3", "128,32,8,3"]


def test_a_row_of_the_same_code_is_kept(monkeypatch):
    compiled = []

    def compile_case(case, memory):
        compiled.append(case)
        return compile_report.Result(case.arch, case.kernel, case.dim, case.feature, registers=9)

    monkeypatch.setattr(compile_report, "compile_case", compile_case)
    monkeypatch.setattr(tool, "code_of", lambda case: "now")
    case = compile_report.Case("sm_90", "append", 64, "plain")
    stored = dict.fromkeys(results.COMPILED_FIELDS, "") | {"registers": "7", "code": "now"}
    assert tool.row_of(case, stored=stored) is stored and not compiled
    for other in (stored | {"code": "before"}, None):
        row = tool.row_of(case, stored=other)
        assert (row["registers"], row["code"]) == ("9", "now")
    assert len(compiled) == 2


def test_what_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "code_of", lambda case: f"code {case.kernel}")
    append, combine, delta = (
        compile_report.Case("sm_90", name, 64, "plain") for name in ("append", "combine", "delta")
    )
    rows = [dict(zip(results.COMPILED_KEY, tool.key_of(case), strict=True)) for case in (append, combine)]
    resources.write("sm_90", "3.7.1", [rows[0] | {"code": "code append"}, rows[1] | {"code": "other"}], tmp_path)
    other = compile_report.Case("sm_80", "append", 64, "plain")
    assert tool.stale("3.7.1", [append, combine, delta, other], tmp_path) == [combine, delta, other]


def test_what_the_rows_are_made_from(tmp_path):
    """An edit of any of it, but not of a comment, makes the code of every row again."""
    places = ["kernels/a.py", "fastattn/spec/b.py", *(f"benchmarks/tools/{name}.py" for name in resources.DECIDE)]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("x = 1\n")
    seen = {resources.inputs(tmp_path)}
    (tmp_path / "kernels" / "a.py").write_text("x = 1  # one\n")
    assert seen == {resources.inputs(tmp_path)}
    for place in places:
        (tmp_path / place).write_text("x = 2\n")
        seen.add(resources.inputs(tmp_path))
    assert len(seen) == 1 + len(places)

"""Every kernel compiles for every target with every feature, and fits Hopper's registers at the shipped launch configs.

What they need stands in a stored table, which is held to the limits here. It has to be of the present kernels, and a
sample of its rows, another one after each change to them, is compiled again and has to be found as it stands.
"""

import pytest

from benchmarks.harness import provenance, resources, results
from benchmarks.tools import calls, compile_report
from benchmarks.tools import resources as tool

TABLES = [(arch, version) for version in tool.HEAD_DIMS for arch in tool.targets(version)]
HOPPER = [(arch, version) for arch, version in TABLES if arch == tool.ARCH]
CACHE = ("decode", "combine", "append")
ATTENTION = ("forward", "dkdv", "dk", "dv", "dq")


def table(arch, version):
    """Rows of one file."""
    return results.read(resources.path(arch, version))


def describe(version, row):
    return f"Triton {version}: {row}"


@pytest.mark.parametrize(("arch", "version"), TABLES)
def test_the_table_is_of_the_present_kernels(arch, version):
    stored, present = resources.stamp(arch, version)["digest"], provenance.code_digest()
    assert stored == present, f"kernels/ has changed since the table was made: `{resources.RENEW}` renews it"


@pytest.mark.parametrize(("arch", "version"), TABLES)
def test_every_case_compiles_and_fits(arch, version):
    rows = table(arch, version)
    expected = [(case.kernel, case.feature, str(case.dim)) for case in tool.cases(arch, version)]
    assert [resources.key(row) for row in rows] == expected, f"`{resources.RENEW}` renews the table"
    for row in rows:
        assert not row["error"], describe(version, row)
        assert 0 < int(row["registers"]) <= (512 if arch == "gfx942" else 255), describe(version, row)
        assert int(row["shared"]) <= compile_report.SHARED_LIMIT[arch], describe(version, row)


def test_the_table_covers_every_kernel_feature_and_head_dim():
    for arch, version in HOPPER:
        found = {(row["kernel"], row["feature"], row["head_dim"]) for row in table(arch, version)}
        for dim in tool.HEAD_DIMS[version]:
            for feature in calls.FEATURES.keys() - {"paged", "chunk"}:  # of a KV cache alone
                kernels = {"forward", "dq", *(("dkdv",) if dim <= 128 else ("dk", "dv"))}
                assert {(kernel, feature, str(dim)) for kernel in kernels} <= found
            assert {kernel for kernel, _, at in found if at == str(dim)} >= {"dbias", "delta", *CACHE}


@pytest.mark.parametrize(("arch", "version"), TABLES)
def test_the_cache_kernels_spill_nothing(arch, version):
    for row in table(arch, version):
        plain = row["feature"] in ("plain", "paged", "chunk") and row["head_dim"] in ("64", "128")
        if row["kernel"] in CACHE and plain:
            assert row["spills"] == "0", describe(version, row)


@pytest.mark.parametrize(("arch", "version"), HOPPER)
def test_spills_in_the_inner_loop_cost_nothing(arch, version):
    """No spilled register is accessed in the inner loop, except where each smaller tile is predicted to be slower."""
    for row in table(arch, version):
        if row["local"] == "0":
            continue
        if row["kernel"] == "decode" and row["feature"] == "odd_dim":
            continue  # it reads rows in pieces, for which its tile leaves too few registers; the model lacks decode
        assert row["kernel"] in ATTENTION and row["smaller"], describe(version, row)
        assert float(row["share"]) >= float(row["smaller"]), describe(version, row)


SERIALISED = {("forward", "mask", "128")}
"""Where ptxas lets the products of a tile wait for each other, on every version; a tile that does not is wanted."""


@pytest.mark.parametrize(("arch", "version"), HOPPER)
def test_products_of_16_bits_use_the_warp_groups(arch, version):
    for row in table(arch, version):
        assert row["serialised"] == results.text(resources.key(row) in SERIALISED), describe(version, row)
        if row["kernel"] in ATTENTION and row["dtype"] == "bf16":  # tiles of a decode step are too short for it
            assert int(row["wgmma"]) > 0 and int(row["smallest_n"]) >= 16, describe(version, row)
            assert row["mma_sync"] == "0", describe(version, row)


@pytest.mark.parametrize(("arch", "version"), HOPPER)
def test_tiles_are_loaded_an_iteration_ahead(arch, version):
    rows = table(arch, version)
    for row in rows:
        kernel, feature, dim = resources.key(row)
        if kernel in ATTENTION and feature in ("plain", "causal", "packed", "block_mask") and dim != "256":
            assert float(row["prefetch"]) >= 1, describe(version, row)
    shared = {resources.key(row): int(row["shared"]) for row in rows}
    for kernel in ("forward", "dkdv", "dq"):  # as many tiles are loaded ahead where a block mask says which
        for dim in {"64", "128"} & {row["head_dim"] for row in rows}:
            assert shared[kernel, "block_mask", dim] >= shared[kernel, "plain", dim]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "version"), HOPPER)
def test_a_sample_compiles_to_the_stored_rows(arch, version, tmp_path, monkeypatch):
    if tool.python_path(version) is None:
        pytest.skip(
            f"no Triton {version} here; `make test` installs the oldest and the newest beside that of the torch"
        )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    rows = table(arch, version)
    chosen = resources.sample(rows, f"{version} {provenance.code_digest()}")
    assert {row["kernel"] for row in chosen} == {row["kernel"] for row in rows}
    names = [",".join(resources.key(row)) for row in chosen]
    assert tool.with_triton(version, "--arch", arch, "--jobs", "1", "--output", str(tmp_path), "--only", *names) == 0
    again = {resources.key(row): row for row in results.read(resources.path(arch, version, tmp_path))}
    for row in chosen:  # line numbers are part of what ptxas reads, and move the number of instructions by one or two
        assert again[resources.key(row)] | {"size": row["size"]} == row


def test_another_digest_draws_another_sample():
    rows = table(*HOPPER[0])
    drawn = [[resources.key(row) for row in resources.sample(rows, seed)] for seed in ("a", "b", "a")]
    assert drawn[0] == drawn[2] != drawn[1]


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

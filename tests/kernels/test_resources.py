"""The table of what every kernel needs of a GPU: what it is made of, and when it has to be made again."""

from benchmarks.harness import provenance, resources
from benchmarks.tools import compile_report
from benchmarks.tools import resources as tool


def test_every_kernel_is_drawn_and_another_digest_draws_others():
    cases = tool.cases("sm_90")
    rows = [{"kernel": c.kernel, "feature": c.feature, "head_dim": str(c.dim), "size": str(c.dim)} for c in cases]
    drawn = [[resources.key(row) for row in resources.sample(rows, seed)] for seed in ("a", "b", "a")]
    assert drawn[0] == drawn[2] != drawn[1]
    assert {key[0] for key in drawn[0]} == set(compile_report.config.KERNELS)


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

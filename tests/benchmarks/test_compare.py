"""Two commits measured in turns."""

import pytest

from benchmarks.tools import compare
from tests.support.benchmark_runs import git, row


@pytest.fixture
def two_commits(tmp_path):
    """A repository whose package differs between two commits."""
    root = tmp_path / "repository"
    (root / "fastattn").mkdir(parents=True)
    git(root, "init", "--quiet")
    for number in (1, 2):
        (root / "fastattn" / "__init__.py").write_text(f"version = {number}\n")
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", str(number))
    (root / "fastattn" / "__init__.py").write_text("version = 3\n")
    return root


def test_compare_takes_turns_and_cleans_up(two_commits, monkeypatch, capsys):
    order = []

    def run(tree, output, arguments):
        assert (tree / "benchmarks" / "tools" / "compare.py").is_file() and not (
            tree / "benchmarks" / "results"
        ).exists()
        version = int((tree / "fastattn" / "__init__.py").read_text().split()[-1])
        order.append(version)
        return [row(p50=str(10.0 / version + len(order)), suite="forward")]

    monkeypatch.setattr(compare, "run", run)
    assert compare.main(["HEAD~1", "HEAD", "--rounds", "2"], root=two_commits) == 0
    assert order == [1, 2, 2, 1]
    out = capsys.readouterr().out
    assert "forward grid forward bf16 D=128 L=4096" in out and "geometric mean of 1" in out
    assert f"{11 / 7:.3f}x" in out
    assert compare.main(["HEAD", ".", "--rounds", "1"], root=two_commits) == 0
    assert order[4:] == [2, 3]
    assert git(two_commits, "worktree", "list").count("\n") == 0


def test_compare_runs_a_suite_in_a_checkout(tmp_path):
    arguments = ["forward", "--dry-run", "--match", "bf16 D=64 L=512 full"]
    with compare.checkout(".") as tree:
        rows = compare.run(tree, tmp_path, arguments)
    assert {r["provider"] for r in rows} == {"fastattn", "torch"} and {r["suite"] for r in rows} == {"forward"}

"""Rows as files, and the stamp of what was measured."""

import csv

import pytest
import torch

from benchmarks.harness import provenance, results
from benchmarks.harness.device import Device
from benchmarks.tools import merge
from tests.support.benchmark_runs import git, row


def test_upsert_replaces_by_key_and_keeps_order(tmp_path):
    path = tmp_path / "gpu" / "forward.csv"
    results.upsert(path, [row(p50="1"), row("sdpa-flash", p50="2")])
    results.upsert(path, [row(p50="3"), row(p50="4", q_len="512")])
    assert [(r["provider"], r["q_len"], r["p50_ms"]) for r in results.read(path)] == [
        ("fastattn", "4096", "3"), ("sdpa-flash", "4096", "2"), ("fastattn", "512", "4"),
    ]  # fmt: skip
    assert not list(path.parent.glob("*.tmp"))
    with pytest.raises(ValueError, match="no column speed"):
        results.upsert(path, [row(speed="1")])


def test_rows_of_an_older_layout_are_read(tmp_path):
    path = tmp_path / "forward.csv"
    path.write_text("case,provider,p50_ms\ngrid,fastattn,1\n")
    assert results.read(path)[0]["digest"] == ""


def test_merge_brings_results_home(tmp_path):
    results.upsert(tmp_path / "out" / "gpu" / "forward.csv", [row(p50="2")])
    results.upsert(tmp_path / "out" / "dry-run" / "forward.csv", [row(p50="3")])
    results.upsert(tmp_path / "home" / "gpu" / "forward.csv", [row(p50="1"), row("flex", p50="5")])
    merge.main([str(tmp_path / "out"), "--into", str(tmp_path / "home")])
    assert [r["p50_ms"] for r in results.read(tmp_path / "home" / "gpu" / "forward.csv")] == ["2", "5"]
    assert not (tmp_path / "home" / "dry-run").exists()


def test_provenance_has_every_field():
    stamp = provenance.provenance(Device())
    assert tuple(stamp) == provenance.FIELDS and all(stamp.values())
    assert stamp["torch"] == torch.__version__ and len(stamp["digest"]) == 12


def test_digest_follows_the_kernel_sources(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("x = 1\n")
    first = provenance.digest(tmp_path)
    (tmp_path / "other.py").write_text("x = 1\n")
    assert provenance.digest(tmp_path) == first
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("int x;\n")
    second = provenance.digest(tmp_path)
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert len({first, second, provenance.digest(tmp_path)}) == 3


def test_revision_with_and_without_git(tmp_path, monkeypatch):
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    assert provenance.revision(tmp_path) == ("unknown", "unknown")
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123-dirty")
    assert provenance.revision(tmp_path) == ("abc123", "yes")
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    assert provenance.revision(tmp_path) == ("abc123", "no")
    git(tmp_path, "init", "--quiet")
    assert provenance.revision(tmp_path) == ("abc123", "no")  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert provenance.revision(tmp_path) == (head, "no")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.csv").write_text("1")
    assert provenance.revision(tmp_path) == (head, "no")
    (tmp_path / "a.py").write_text("2")
    assert provenance.revision(tmp_path) == (head, "yes")


def test_csv_is_plain(dry):
    with open(dry / "forward.csv", newline="") as file:
        header = next(csv.reader(file))
    assert tuple(header) == results.FIELDS

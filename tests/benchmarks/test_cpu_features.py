"""A feature's share of the causal rate counts allowed pairs."""

import pytest

from benchmarks.tools import cpu_features
from fastattn.backends.cpu import library


def test_share_per_operation(monkeypatch):
    monkeypatch.setattr(cpu_features, "SECONDS", 0.0)
    taken = {"causal": iter([1.0, 2.0, 3.0, 4.0, 5.0]), "feature": iter([2.0, 4.0, 1.0, 8.0, 10.0])}
    monkeypatch.setattr(cpu_features, "seconds", lambda call: next(taken[call]))
    # Half as fast in the median of its pairs, for three quarters of the operations.
    assert cpu_features.share(("feature", 30.0), ("causal", 40.0)) == pytest.approx(0.5 * 0.75)


def test_features_are_all_or_those_named(monkeypatch, capsys):
    monkeypatch.setattr(cpu_features, "prepare", lambda changes, mode: mode)
    monkeypatch.setattr(cpu_features, "share", lambda feature, causal: 0.5)

    def lines(*names):
        cpu_features.main(names)
        return [line[:20].strip() for line in capsys.readouterr().out.splitlines()[2:]]

    assert lines() == list(cpu_features.FEATURES)
    assert lines("mask", "GQA 8/2") == ["mask", "GQA 8/2"]
    with pytest.raises(SystemExit):
        lines("masks")
    assert "FEATURE: expected one of window 256" in capsys.readouterr().err


def test_a_named_variant_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(cpu_features, "prepare", lambda changes, mode: mode)
    monkeypatch.setattr(cpu_features, "share", lambda feature, causal: 0.5)
    best = library.load().fastattn_cpu_variant()
    try:
        cpu_features.main(["--variant", "baseline", "mask"])
    finally:
        library.load().fastattn_cpu_use_variant(best)
    assert "tokens, baseline, one thread" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cpu_features.main(["--variant", "avx3"])
    assert "not what this processor has: avx3" in capsys.readouterr().err

"""A feature's share of the causal rate counts allowed pairs."""

import pytest

from benchmarks.tools import cpu_features


def test_share_per_operation(monkeypatch):
    monkeypatch.setattr(cpu_features, "SECONDS", 0.0)
    taken = {"causal": iter([1.0, 2.0, 3.0, 4.0, 5.0]), "feature": iter([2.0, 4.0, 1.0, 8.0, 10.0])}
    monkeypatch.setattr(cpu_features, "seconds", lambda call: next(taken[call]))
    # Half as fast in the median of its pairs, for three quarters of the operations.
    assert cpu_features.share(("feature", 30.0), ("causal", 40.0)) == pytest.approx(0.5 * 0.75)

"""A pytest plugin that leaves only the tests which run on a GPU: ``pytest tests -p benchmarks.harness.only_device``."""

from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests that use the ``device`` fixture or have the mark ``gpu``."""
    kept = [item for item in items if "device" in item.fixturenames or item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept

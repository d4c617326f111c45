"""Commands of their own: ``python -m benchmarks.tools.NAME``."""

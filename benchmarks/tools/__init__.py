"""Commands: ``python -m benchmarks.tools.NAME`` runs one."""

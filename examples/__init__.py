"""Worked cases to read and to run. Each is a package: `python -m examples.forecast`."""

"""Worked cases to read and to run, each a package: `python -m examples.forecast`."""

"""`python -m examples.dates`."""

from examples.dates.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

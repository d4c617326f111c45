"""`python -m examples.forecast`."""

from examples.forecast.cli import main

if __name__ == "__main__":  # worker processes import this file again and must not start the program
    raise SystemExit(main())

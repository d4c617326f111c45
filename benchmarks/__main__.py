"""``python -m benchmarks [all | SUITE ...] --minutes 8``: every suite in one process, under one budget."""

import sys

from .harness.runner import main

if __name__ == "__main__":
    sys.exit(main())

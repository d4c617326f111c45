"""Bring home what a run on another machine wrote: FOLDER/<device>/<suite>.csv into benchmarks/results.

python -m benchmarks.tools.merge FOLDER
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import results


def merge(source: Path, target: Path = results.HERE) -> Iterator[str]:
    """Upsert every file of ``source``; yields what it did."""
    for folder in results.devices(source):
        for path in sorted(folder.glob("*.csv")):
            rows = results.read(path)
            results.upsert(target / folder.name / path.name, rows)
            yield f"{folder.name}/{path.name}: {len(rows)} rows"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what a run wrote")
    parser.add_argument("--into", type=Path, default=results.HERE)
    args = parser.parse_args(argv)
    for line in merge(args.folder, args.into):
        print(line)


if __name__ == "__main__":
    main()

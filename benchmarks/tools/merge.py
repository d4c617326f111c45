"""Copy the results of a run on another machine, FOLDER/<device>/<suite>.csv, into benchmarks/results.

python -m benchmarks.tools.merge FOLDER      # or FOLDER/<device>.tar, which holds the same
"""

import argparse
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import results


def merge(source: Path, target: Path = results.HERE) -> Iterator[str]:
    """Upsert every file of ``source``, a folder or an archive of one; yields what it did."""
    if source.is_file():
        with tempfile.TemporaryDirectory() as folder, tarfile.open(source) as tar:
            tar.extractall(folder, filter="data")
            yield from merge(Path(folder), target)
        return
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

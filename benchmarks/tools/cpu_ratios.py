"""The ratios that `csrc/cpu/README.md` keeps, from the stored rows of the suite cpu on this machine.

python -m benchmarks.tools.cpu_ratios                  or FOLDER/<device>/cpu.csv
"""

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import results
from benchmarks.harness.device import Device
from benchmarks.harness.peers import OWN
from benchmarks.harness.summary import READ, UNQUANTISED
from benchmarks.suites.cpu import ANY_PEER, FEATURE_LENGTH, FEATURES, MODES, PLAIN, SDPA


def ratios(rows: Sequence[results.Row]) -> Iterator[str]:
    """Lines with the speed of fastattn relative to a peer, the share of the causal rate that a feature has, and the
    share of the rate of reading that a decode step has."""
    timed = [row for row in rows if row["p50_ms"] and row["mode"] in MODES]
    for (case, mode), group in grouped(timed, "case", "mode"):
        speedups = {f"L={own['q_len']} D={own['head_dim']}": best for own, best in against(group, (SDPA,))}
        if case.partition(",")[0] in PLAIN and speedups:
            worst = min(speedups, key=speedups.__getitem__)
            mean = math.exp(sum(map(math.log, speedups.values())) / len(speedups))
            yield f"{case:28} {mode:9} {mean:5.2f} x SDPA in the mean, least {speedups[worst]:.2f} at {worst}"
    at_length = [row for row in timed if row["q_len"] == str(FEATURE_LENGTH) and row["head_dim"] == "64"]
    for mode in MODES:
        rates = {
            row["case"]: float(row["tflops"]) for row in at_length if row["provider"] == OWN and row["mode"] == mode
        }
        peers = {row["case"]: best for row, best in against([r for r in at_length if r["mode"] == mode], ANY_PEER[1:])}
        for feature in FEATURES:
            name, causal = f"{feature}, 1 thread", rates.get("causal, 1 thread")
            if name in rates and causal:
                best = f", {peers[name]:.2f} x the best peer" if name in peers else ""
                yield f"{name:28} {mode:9} {rates[name] / causal:5.2f} of the causal rate{best}"
    steps = [row for row in rows if row["p50_ms"] and row["mode"] == "decode"]
    for peer, what in ((READ, "of the rate of reading"), (UNQUANTISED, "x as fast as over a bfloat16 cache")):
        for own, share in against(steps, (peer,)):
            name = f"{own['case'].replace(', contiguous', '')}, {own['dtype']}"
            yield f"{name:28} decode    {share:5.2f} {what}"


def against(rows: Iterable[results.Row], peers: tuple[str, ...]) -> Iterator[tuple[results.Row, float]]:
    """(row of fastattn, how many times as long the fastest of the peers takes) for each problem that both compute."""
    names = [name for name in results.KEY if name != "provider"]
    for _, group in grouped(rows, *names):
        own = [row for row in group if row["provider"] == OWN]
        others = [float(row["p50_ms"]) for row in group if row["provider"] in peers]
        if own and others:
            yield own[0], min(others) / float(own[0]["p50_ms"])


def grouped(rows: Iterable[results.Row], *names: str) -> list[tuple[tuple[str, ...], list[results.Row]]]:
    """Rows with the same values in these columns, in the order in which they first occur."""
    groups: dict[tuple[str, ...], list[results.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def main(argv: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, help="a CSV file of the suite; default: that of this machine")
    path = parser.parse_args(argv).rows or results.output_folder(None) / Device().folder / "cpu.csv"
    print(*ratios(results.read(path)), sep="\n")


if __name__ == "__main__":
    main()

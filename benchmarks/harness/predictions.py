"""Predictions for a GPU, made before anything ran on it: `results/predictions/*.csv`, with the columns of results."""

import functools
from pathlib import Path

from . import results

HERE = results.HERE / "predictions"
MATCHED = ("provider", "case", "mode", "dtype", "q_len", "kv_len", "head_dim", "causal")
"""Of the columns that are a row's key; an empty one in a prediction means any."""


@functools.cache
def every(folder: Path = HERE) -> tuple[results.Row, ...]:
    """The predictions of every provider."""
    return tuple(row for path in sorted(folder.glob("*.csv")) for row in results.read(path))


def rows(folder: Path = HERE) -> tuple[results.Row, ...]:
    """Those of fastattn as it is by default."""
    return tuple(row for row in every(folder) if row["provider"] == "fastattn")


def of(row: results.Row, folder: Path = HERE) -> results.Row | None:
    """The prediction for a row, if there is one."""
    for prediction in every(folder):
        if all(prediction.get(name, "") in ("", row.get(name, "")) for name in MATCHED):
            return prediction
    return None


def beside(row: results.Row, folder: Path = HERE) -> str:
    """The prediction for a row and the measured figure's ratio to it, as text; empty where nothing was predicted.

    Rates are compared if both have one, else times: above 1 is faster than predicted. The static model predicts a share
    of the tensor cores' peak; the text also gives the share of the rate of matrix products here.
    """
    prediction = of(row, folder)
    if prediction is None:
        return ""
    if prediction.get("of_matmul"):
        measured = f", measured {float(row['of_matmul']):.0%} of matrix products" if row.get("of_matmul") else ""
        return f"predicted {float(prediction['of_matmul']):.0%} of the peak{measured}"
    for column, unit in (("tflops", "TFLOP/s"), ("p50_ms", "ms")):
        if (expected := prediction.get(column)) and (measured := row.get(column)):
            ratio = float(measured) / float(expected)
            faster = ratio if column == "tflops" else 1.0 / ratio
            return f"predicted {float(expected):.4g} {unit}, measured is {faster:.2f} times as fast"
    return ""

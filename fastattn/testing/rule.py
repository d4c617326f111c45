"""The tolerance rule itself, for a result of whatever kind."""

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 2.0


def rounding_floor(expected: Tensor, dtype: torch.dtype, intermediate: float | Tensor = 1.0) -> tuple[float, float]:
    """(largest, RMS) error that rounding alone explains.

    One rounding of the result to ``dtype``, and one of each intermediate value in the accumulator, which is float32
    (float64 for float64): what remains where the exact result cancels to zero.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    eps, floor = torch.finfo(dtype).eps, torch.finfo(accumulator).eps
    if not isinstance(intermediate, Tensor):
        intermediate = torch.tensor(float(intermediate))
    return (
        eps * _largest(expected) + floor * max(1.0, _largest(intermediate)),
        eps * _rms(expected) + floor * max(1.0, _rms(intermediate)),
    )


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_parity(
    actual: Tensor,
    expected: Tensor,
    eager: Tensor | Sequence[Tensor],
    name: str = "result",
    intermediate: float | Tensor = 1.0,
    stored: Tensor | None = None,
) -> None:
    """Hold ``actual`` to the rule.

    Args:
        actual: the result under test.
        expected: the same computed in float64.
        eager: the same computed by plain eager PyTorch in the dtype of ``actual``, from the same inputs; where it was
            computed several times, in other orders, its largest error counts.
        name: what the result is called in the error.
        intermediate: size of what is summed on the way to the result, one value or one per element.
        stored: error that follows from what the interface stores between two steps, one per element: the larger of
            this and the error of ``eager`` counts.

    Raises:
        AssertionError: wrong shape, NaN or infinity in other places than ``expected`` has them, or an error beyond the
            rule; with the figures.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    dtype = actual.dtype
    peers = [eager] if isinstance(eager, Tensor) else eager
    actual, expected, *peers = (t.detach().to("cpu", torch.float64) for t in (actual, expected, *peers))
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]) or not actual[finite].isfinite().all():
        bad = int((actual[finite].isfinite().logical_not()).sum())
        raise AssertionError(f"{name}: {bad} elements are not finite where the specification is, or differ at infinity")
    difference, *peer_differences = ((t - expected)[finite] for t in (actual, *peers))
    if difference.numel() == 0:
        return
    stored_difference = torch.zeros(()) if stored is None else stored.detach().cpu().double()
    floors = rounding_floor(expected[finite], dtype, intermediate)
    for measure, size, floor in zip(("largest", "RMS"), (_largest, _rms), floors, strict=True):
        error = size(difference)
        peer = max(size(t) for t in (*peer_differences, stored_difference))
        bound = FACTOR * peer + floor
        if not error <= bound:
            raise AssertionError(
                f"{name}: {measure} error {error:.3e} against float64 exceeds {bound:.3e} "
                f"= {FACTOR:g} x {peer:.3e} (eager {dtype}) + {floor:.1e} (rounding)"
            )

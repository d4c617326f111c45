"""Matrix products of Triton's interpreter that give the same bits on every processor and in every order.

The interpreter multiplies by numpy, whose library adds up in an order that depends on the processor and on the shape.
So q k^T of the forward pass and k q^T of the backward pass may differ in float32, and a test would judge numpy instead
of a kernel. Here a product and its accumulator are added up in float64 and rounded once.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot


def install() -> None:
    """Change Triton's interpreter, for the whole process."""
    interpreter.InterpreterBuilder.create_dot = _dot


def _dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
    dtype = accumulator.data.dtype
    if dtype != np.float32:
        return _create_dot(self, a, b, accumulator, *options)
    wide = interpreter.TensorHandle(accumulator.data.astype(np.float64), tl.float64)
    product = _create_dot(self, a, b, wide, *options)
    return interpreter.TensorHandle(product.data.astype(dtype), accumulator.dtype.scalar)

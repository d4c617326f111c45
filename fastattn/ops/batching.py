"""`torch.func.vmap` over the attention operators."""

from typing import Any

import torch
from torch import Tensor


class Batched(torch.autograd.Function):
    """A Function whose vmap runs one call after the other: operands such as sinks have no batch dimension to merge."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        calls = [
            cls.apply(
                *(
                    x.select(dim, index) if isinstance(x, Tensor) and dim is not None else x
                    for x, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        results = tuple(torch.stack(x) for x in zip(*calls, strict=True))
        return results, (0,) * len(results)

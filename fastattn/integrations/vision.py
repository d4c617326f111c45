"""The common part of converted attention modules of timm and torchvision."""

from types import CodeType
from typing import ClassVar, NoReturn

from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.nn.tracing import refuse_torchscript
from fastattn.spec.checks import readable

__all__ = ["Converted", "allowed_in_windows", "attend", "heads"]


class Converted(nn.Module):
    """A module of another library with that library's parameters and a `forward` of ours.

    Attributes:
        replaces: the original class, whose `forward` ours reimplements.
        known: every name that the original `forward` reads in the versions that ours supports, separated by spaces.
    """

    replaces: ClassVar[type[nn.Module]]
    known: ClassVar[str]

    @classmethod
    def unknown(cls) -> list[str]:
        """The names that the installed version's `forward` reads and ours does not know: it may do something else."""
        code: CodeType = cls.replaces.forward.__code__
        return sorted({*code.co_names} - {*cls.known.split()})

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_torchscript(self)


def heads(x: Tensor, parts: int, count: int) -> tuple[Tensor, ...]:
    """x (B, N, parts * count * D) as `parts` tensors (B, count, N, D), which are views of it."""
    return x.unflatten(-1, (parts, count, x.shape[-1] // (parts * count))).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention in windows (B * windows, H, N, D), whose bias is (1, H, N, N): (B * windows, N, H * D)."""
    out = attention(q, k, v, bias=bias, mask=mask, scale=scale, dropout_p=dropout_p)
    return out.transpose(1, 2).flatten(2)


def allowed_in_windows(mask: Tensor | None, count: int) -> Tensor | None:
    """The mask of shifted windows (windows, N, N), 0 or -100 and below, as a boolean one (count, 1, N, N).

    The library adds -100 to scores between different image regions of a window; here those pairs are forbidden.

    Raises:
        ValueError: the mask has other numbers, and the host can read them.
    """
    if mask is None:
        return None
    allowed = mask == 0
    if readable(mask) and not bool((allowed | (mask <= -100)).all()):
        raise ValueError("mask: expected 0, or -100 and below, got other numbers")
    return allowed[:, None].repeat(count // mask.shape[0], 1, 1, 1)

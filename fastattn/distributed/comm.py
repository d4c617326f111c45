"""Messages between the ranks of a mesh dimension: errors name the rank that is missing, and nothing waits for ever."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_TEXT = 480  # bytes of a header's text


class Message(NamedTuple):
    """A contiguous tensor to or from a rank of the group; ``tag`` tells messages of one pair of ranks apart."""

    tensor: Tensor
    rank: int
    tag: int = 0


class Pending:
    """Messages under way."""

    def __init__(
        self, works: list[Any], messages: list[tuple[str, int]], tensors: list[Tensor], peers: "Peers"
    ) -> None:
        self._works, self._messages, self._peers = works, messages, peers
        self._tensors = tensors

    def wait(self) -> None:
        """Return when all have arrived.

        Raises:
            RuntimeError: one did not within the time, or its rank is gone; named.
        """
        single = len(self._works) == len(self._messages)
        for index, work in enumerate(self._works):
            try:
                work.wait(self._peers.timeout) if self._peers.timeout else work.wait()
            except Exception as error:
                what, rank = self._messages[index] if single else ("messages with", -1)
                name = f"rank {self._peers.number(rank)}" if single else "the other ranks"
                raise RuntimeError(
                    f"context parallel, {self._peers}: {what} {name} did not come "
                    f"through: {name} raised, ended, or did not make this call ({str(error).splitlines()[0][:200]})"
                ) from error
        self._works, self._tensors = [], []


class Peers:
    """The ranks along one dimension of a mesh, as this one sees them.

    Args:
        mesh: of one or two dimensions.
        dim: which of them.
        timeout: seconds to wait for a message; None is the group's own.
    """

    def __init__(self, mesh: DeviceMesh, dim: int, timeout: float | None) -> None:
        self.group = mesh.get_group(dim)
        self.size: int = mesh.size(dim)
        self.rank: int = mesh.get_local_rank(dim)
        self.timeout = None if timeout is None else timedelta(seconds=timeout)
        self._step = mesh.size(1) if mesh.ndim == 2 and dim == 0 else 1
        self._first = mesh.get_local_rank(1) if self._step > 1 else 0
        if mesh.ndim == 2 and dim == 1:
            self._first = mesh.get_local_rank(0) * self.size
        self._whole: int = mesh.size()

    def number(self, rank: int) -> int:
        """A rank's number in the mesh."""
        return self._first + rank * self._step

    def __str__(self) -> str:
        return f"rank {self.number(self.rank)} of {self._whole}"

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Send and receive without waiting; the tensors must stay as they are until `Pending.wait`."""
        operations, messages = [], []
        for message in receives:
            operations.append(self._operation(dist.irecv, message))
            messages.append(("the message from", message.rank))
        for message in sends:
            operations.append(self._operation(dist.isend, message))
            messages.append(("the message to", message.rank))
        tensors = [message.tensor for message in (*receives, *sends)]
        return Pending(dist.batch_isend_irecv(operations) if operations else [], messages, tensors, self)

    def _operation(self, kind: Any, message: Message) -> dist.P2POp:
        peer = dist.get_global_rank(self.group, message.rank)
        return dist.P2POp(kind, message.tensor, peer, self.group, message.tag)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """`start`, and wait."""
        self.start(sends, receives).wait()

    def gather(self, own: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
        """What every rank has, on every rank, in their order.

        ``own``: contiguous, one dimension; of the same length on every rank, unless ``sizes`` says each one's.
        """
        found = [own if r == self.rank else own.new_empty(sizes[r] if sizes else len(own)) for r in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.exchange(
            [Message(own, rank) for rank in others if own.numel()],
            [Message(found[rank], rank) for rank in others if found[rank].numel()],
        )
        return found


class Ranks:
    """All ranks of a mesh of one or two dimensions, as this one sees them, row by row.

    Args:
        mesh: one dimension; or two, along the second of which tokens and heads change places.
        timeout: seconds to wait for a message; None is the group's own.

    Raises:
        TypeError, ValueError: not such a mesh.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float | None = None) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim not in (1, 2):
            names = mesh.mesh_dim_names
            cure = f"; mesh[{names[0]!r}], say" if names else ""
            raise ValueError(f"mesh: expected one dimension or two, got shape {tuple(mesh.shape)}{cure}")
        self.outer = Peers(mesh, 0, timeout)
        self.inner = Peers(mesh, 1, timeout) if mesh.ndim == 2 else None
        self.width = 1 if self.inner is None else self.inner.size
        self.size = self.outer.size * self.width
        self.rank = self.outer.number(self.outer.rank)
        self._device = mesh.device_type

    def __str__(self) -> str:
        return str(self.outer)

    def row(self, number: int) -> slice:
        """The ranks of a row of the mesh, of one rank where it has one dimension."""
        return slice(number * self.width, (number + 1) * self.width)

    def gather(self, own: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
        """As `Peers.gather`: along the rows of the mesh, then from row to row."""
        if self.inner is None:
            return self.outer.gather(own, sizes)
        sizes = [len(own)] * self.size if sizes is None else sizes
        row = torch.cat(self.inner.gather(own, sizes[self.row(self.outer.rank)]))
        rows = self.outer.gather(row, [sum(sizes[self.row(i)]) for i in range(self.outer.size)])
        return list(torch.cat(rows).split(sizes))

    def headers(self, numbers: list[int], text: str) -> list[tuple[list[int], str]]:
        """What every rank says of its call: some numbers, and a text of at most 480 bytes of UTF-8."""
        raw = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
        own = torch.tensor([*numbers, *raw], dtype=torch.int64, device=self._device)
        values = torch.stack(self.gather(own)).tolist()
        return [
            (row[: len(numbers)], bytes(row[len(numbers) :]).rstrip(b"\0").decode(errors="ignore")) for row in values
        ]

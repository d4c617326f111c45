"""Messages between the ranks of a mesh dimension. Errors name the missing rank, and every wait has a limit."""

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_TEXT = 480  # bytes of a header's text
_KEPT = 1024  # headers
_LEAST = -(1 << 63)


class Message(NamedTuple):
    """A contiguous tensor to or from a rank of the group; ``tag`` tells messages of one pair of ranks apart."""

    tensor: Tensor
    rank: int
    tag: int = 0


class Pending:
    """Messages in flight."""

    def __init__(
        self, works: list[Any], messages: list[tuple[str, int]], tensors: list[Tensor], peers: "Peers"
    ) -> None:
        self._works, self._messages, self._peers = works, messages, peers
        self._tensors = tensors

    def wait(self) -> None:
        """Wait until all messages have arrived.

        Raises:
            RuntimeError: a message did not arrive in time, or its rank is gone; the text names the rank.
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
    """The ranks along one dimension of a mesh, seen from this rank.

    Args:
        mesh: a mesh of one or two dimensions.
        dim: one of its dimensions.
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
        """Send and receive without waiting; do not change the tensors before `Pending.wait`."""
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
        """`start`, then wait."""
        self.start(sends, receives).wait()

    def gather(self, own: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
        """Collect the ``own`` tensors of all ranks, in rank order, on every rank.

        ``own`` is contiguous with one dimension. Its length is the same on every rank unless ``sizes`` gives each one.
        """
        found = [own if r == self.rank else own.new_empty(sizes[r] if sizes else len(own)) for r in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        self.exchange(
            [Message(own, rank) for rank in others if own.numel()],
            [Message(found[rank], rank) for rank in others if found[rank].numel()],
        )
        return found

    def largest(self, own: Tensor) -> Tensor:
        """The elementwise maximum over all ranks, the same on every rank, after log2(ranks) exchanges."""
        step = 1
        while step < self.size:
            coming = torch.empty_like(own)
            self.exchange(
                [Message(own, (self.rank + step) % self.size)], [Message(coming, (self.rank - step) % self.size)]
            )
            own = torch.maximum(own, coming)
            step *= 2
        return own


class Ranks:
    """All ranks of a mesh of one or two dimensions, row by row, seen from this rank.

    Args:
        mesh: one dimension; or two, of which the second exchanges tokens for heads.
        timeout: seconds to wait for a message; None is the group's own.

    Raises:
        TypeError, ValueError: the mesh is another kind.
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
        groups = (self.outer.group, mesh.get_group(mesh.ndim - 1))
        by_host = all("cpu" in dist.get_backend_config(group) for group in groups)
        self._device = "cpu" if by_host else mesh.device_type  # reading headers must not wait for the device

    def __str__(self) -> str:
        return str(self.outer)

    def row(self, number: int) -> slice:
        """The ranks of this rank's row of the mesh; this rank alone if the mesh has one dimension."""
        return slice(number * self.width, (number + 1) * self.width)

    def gather(self, own: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
        """Like `Peers.gather`, first within rows of the mesh, then between rows."""
        if self.inner is None:
            return self.outer.gather(own, sizes)
        sizes = [len(own)] * self.size if sizes is None else sizes
        row = torch.cat(self.inner.gather(own, sizes[self.row(self.outer.rank)]))
        rows = self.outer.gather(row, [sum(sizes[self.row(i)]) for i in range(self.outer.size)])
        return list(torch.cat(rows).split(sizes))

    def headers(self, numbers: list[int], text: str) -> list["Header"]:
        """Every rank's description of its call, from `agree`."""
        return self.agree(numbers, text)[0]

    def agree(self, numbers: list[int], text: str, seed: int = 0) -> tuple[list["Header"], int]:
        """(every rank's description of its call, the first rank's ``seed``). Every rank calls it.

        Args:
            numbers: the same count on every rank.
            text: ranks exchange at most 480 bytes of UTF-8.
            seed: 64 bits that may change from call to call.

        Ranks keep the headers. If a call repeats an earlier one on every rank, a comparison of digests shows it in
        log2(ranks) short messages. Otherwise all ranks exchange headers. With hundreds of ranks, reading all headers
        for every call would take longer than attention. All ranks take the same path, because all know the largest and
        the smallest digest.
        """
        own: Header = ([*numbers], text.encode()[:_TEXT].decode(errors="ignore"))
        name = (self.size, self.rank, tuple(numbers), own[1])
        known, digest = _kept_headers.get(name, ([], 0))
        told = torch.tensor(
            [digest, -digest, seed if self.rank == 0 else _LEAST], dtype=torch.int64, device=self._device
        )
        for peers in (self.inner, self.outer):
            told = told if peers is None else peers.largest(told)
        largest, opposite, seed = told.tolist()  # the negated smallest
        if largest != -opposite or largest == 0:
            known = self._exchange_headers(own)
            if len(_kept_headers) >= _KEPT:
                _kept_headers.clear()
            _kept_headers[name] = known, _digest(known)
        return known, seed

    def _exchange_headers(self, own: "Header") -> list["Header"]:
        numbers, text = own
        raw = text.encode().ljust(_TEXT, b"\0")
        values = torch.tensor([*numbers, *raw], dtype=torch.int64, device=self._device)
        return [
            (row[: len(numbers)], bytes(row[len(numbers) :]).rstrip(b"\0").decode())
            for row in torch.stack(self.gather(values)).tolist()
        ]


Header = tuple[list[int], str]
"""A rank's description of its call."""

_kept_headers: dict[Any, tuple[list[Header], int]] = {}
"""A rank's own header -> the headers of all ranks and their digest. Equal digests mean equal headers, in any group."""


def _digest(headers: list[Header]) -> int:
    """A digest of 62 bits, never 0."""
    return int.from_bytes(hashlib.blake2b(repr(headers).encode(), digest_size=8).digest(), "big") >> 2 | 1

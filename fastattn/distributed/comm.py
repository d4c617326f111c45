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
                name = f"rank {rank}" if single else "the other ranks"
                raise RuntimeError(
                    f"context parallel, rank {self._peers.rank} of {self._peers.size}: {what} {name} did not come "
                    f"through: {name} raised, ended, or did not make this call ({str(error).splitlines()[0][:200]})"
                ) from error
        self._works, self._tensors = [], []


class Peers:
    """The ranks of a one-dimensional mesh, as this one sees them.

    Args:
        mesh: one dimension.
        timeout: seconds to wait for a message; None is the group's own.

    Raises:
        TypeError, ValueError: not a mesh of one dimension with this rank in it.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float | None = None) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names
            cure = f"; mesh[{names[0]!r}], say" if names else ""
            raise ValueError(f"mesh: expected one dimension, got shape {tuple(mesh.shape)}{cure}")
        self.group = mesh.get_group()
        self.size: int = mesh.size()
        self.rank: int = mesh.get_local_rank()
        self.timeout = None if timeout is None else timedelta(seconds=timeout)
        self._device = mesh.device_type

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

    def headers(self, numbers: list[int], text: str) -> list[tuple[list[int], str]]:
        """What every rank says of its call: some numbers, and a text of at most 480 bytes of UTF-8."""
        raw = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
        own = torch.tensor([*numbers, *raw], dtype=torch.int64, device=self._device)
        values = torch.stack(self.gather(own)).tolist()
        return [
            (row[: len(numbers)], bytes(row[len(numbers) :]).rstrip(b"\0").decode(errors="ignore")) for row in values
        ]

"""The processes of one run, which begin and end together: what one of them fails of is said by every other one."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

_BEAT = 0.25  # seconds from one sign of life to the next
_SILENCE = 12  # beats that a living process does not miss
_STORE = 8.0  # seconds in which a store answers all that a fault asks of it
_FAULT = "fastattn/fault"
_GONE = "the process that holds the store of the job is gone or stopped, which is the launcher or rank 0"


class RankFailed(RuntimeError):
    """Another rank raised, ended or was too late; the message names it and says what is known."""


class _NoAnswer(Exception):
    """The store does not answer."""


class Job:
    """What `job` gives: the mesh, and what a run asks about its processes."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        """one dimension for each of the sizes"""
        self.rank: int = dist.get_rank()
        self.first: bool = self.rank == 0
        """whether this process speaks for all: prints, draws a progress bar, writes files"""
        self._interrupted = False

    def interrupt(self, *_: Any) -> None:
        """What Ctrl-C calls in this process; `interrupted` tells all of them."""
        self._interrupted = True

    def interrupted(self) -> bool:
        """Whether a process has got SIGINT (Ctrl-C) since the job began; all ranks ask together, and agree.

        To ask after each step lets all of them stop after the same one.
        """
        flag = torch.tensor(int(self._interrupted))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


@contextlib.contextmanager
def job(sizes: Mapping[str, int], *, device: str = "cpu", timeout: float = 600.0) -> Iterator[Job]:
    """The processes that ``torchrun`` has started, as one job on a mesh; it ends when the ``with`` does.

    Where a rank raises, is killed or does not come to a message within ``timeout``, every other rank raises
    `RankFailed` with its name in place of what the lost connection looks like, and nothing waits longer than
    ``timeout``, in any process group that is made inside. Ctrl-C interrupts nothing: `Job.interrupted` says so, and the
    program stops where it can be continued. ``torchrun`` gives it 30 seconds.

    Args:
        sizes: of the mesh by name, ``{"dp": 2, "tp": 4}``; their product is the number of processes.
        device: "cpu" (gloo), or "cuda" (NCCL): the device ``LOCAL_RANK``.
        timeout: seconds that a message may take, and joining the others; what a step of the slowest rank takes, and
            more.

    Raises:
        RuntimeError: not started by ``torchrun`` or alike, which sets RANK and WORLD_SIZE.
        ValueError: another number of processes.
        RankFailed: see above.
    """
    count = math.prod(sizes.values())
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            f"job: expected a process of torchrun, which sets RANK and WORLD_SIZE; start the program with "
            f"torchrun --nproc-per-node {count}"
        )
    if count != (started := int(os.environ["WORLD_SIZE"])):
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"sizes: expected a product of {started}, the number of processes, got {given}")
    with _timeout_of_groups(timedelta(seconds=timeout)):
        store, rank, world = _find_store(timeout)
        watch = _Watch(store, rank, world)
        try:
            found = _within(timeout + _STORE, lambda: _join(store, rank, world, sizes, device))
            with _on_interrupt(found.interrupt):
                yield found
            dist.barrier()
        except Exception as error:
            fault = watch.fault(error)
            if dist.is_initialized():
                with contextlib.suppress(RuntimeError):  # a backend that cannot
                    dist.distributed_c10d._abort_process_group()  # who waits for a message of this rank hears of it
            watch.linger()
            if fault is not None:
                raise RankFailed(fault) from error
            raise
        else:
            dist.destroy_process_group()
        finally:
            watch.stop()


@contextlib.contextmanager
def _timeout_of_groups(timeout: timedelta) -> Iterator[None]:
    """That of every process group that is made inside: a mesh makes its own, and asks nobody how long they may wait."""
    c10d: Any = dist.distributed_c10d
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(c10d, name) for name in names}
    try:
        for name in names:
            setattr(c10d, name, timeout)
        yield
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)


def _find_store(timeout: float) -> tuple[Any, int, int]:
    """(store of the job, rank, number of processes)."""
    limit = timedelta(seconds=timeout)
    try:
        return _within(timeout + _STORE, lambda: next(iter(rendezvous("env://", timeout=limit))))
    except (dist.DistError, _NoAnswer) as error:
        raise RankFailed(f"not every process came to the store of the job in {timeout:g} s: {_GONE}") from error


def _join(store: Any, rank: int, world: int, sizes: Mapping[str, int], device: str) -> Job:
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    timeout: timedelta = dist.distributed_c10d.default_pg_timeout
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return Job(init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes)))


_T = TypeVar("_T")


def _within(seconds: float, call: Callable[[], _T]) -> _T:
    """What ``call`` gives or raises; `_NoAnswer` after so many seconds.

    A store waits for ever for a server that has stopped: in a thread, which is then left behind.
    """
    found: Future[_T] = Future()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if wait([found], seconds).not_done:
        raise _NoAnswer(f"the store does not answer in {seconds:g} s")
    return found.result()


@contextlib.contextmanager
def _on_interrupt(call: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.signal(signal.SIGINT, lambda number, frame: call(number, frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Watch:
    """Signs of life, counted in the store of the job, and the first fault that a rank wrote there."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._ended = threading.Event()
        self._heard: str | None = None  # here, since the store may be gone when this rank asks
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and with it who would read them
            store = self._store.clone()  # a connection of its own: the other one may wait for an answer
            while True:
                store.add(f"fastattn/alive/{self._rank}", 1)
                if self._heard is None and store.check([_FAULT]):
                    self._heard = store.get(_FAULT).decode(errors="ignore")
                    store.add(f"fastattn/heard/{self._rank}", 1)
                if self._ended.wait(_BEAT):
                    return

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(_BEAT)

    def fault(self, error: Exception) -> str | None:
        """What another rank failed of, if ``error`` comes of that; else this rank's is told to all, and None."""
        if isinstance(error, _NoAnswer):
            return self._heard or _GONE
        try:
            return _within(_STORE, lambda: self._find_fault(error))
        except (RuntimeError, _NoAnswer):
            return self._heard or _GONE

    def _find_fault(self, error: Exception) -> str | None:
        if not _is_lost_message(error):
            self._tell(f"rank {self._rank} raised {type(error).__name__}: {error}")
            return None
        return self._tell(self._reason(error))

    def linger(self) -> None:
        """Keep the store, if this process holds it, until all that live have heard of the fault; seconds at most."""
        if self._rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        before = self._counts("alive")
        for beat in range(2 * _SILENCE):
            counts = zip(before, self._counts("alive"), self._counts("heard"), strict=True)
            if all(heard or (beat >= _SILENCE and old == new) for old, new, heard in counts):
                return
            time.sleep(_BEAT)

    def _tell(self, fault: str) -> str:
        """The first that was told."""
        return self._store.compare_set(_FAULT, "", fault[:2000]).decode(errors="ignore")

    def _reason(self, error: Exception) -> str:
        """Why a message did not come through: who failed, who gives no sign of life, or who waits for none."""
        self._store.add(f"fastattn/waited/{self._rank}", 1)
        before = self._counts("alive")
        for _ in range(_SILENCE):  # who raised may not have said so yet
            if self._heard:
                return self._heard
            time.sleep(_BEAT)
        counts = zip(before, self._counts("alive"), strict=True)
        if silent := [rank for rank, (old, new) in enumerate(counts) if old == new]:
            return (
                f"{_names(silent)} ended or stopped without an error of its own: killed, out of memory, or its machine "
                "is gone"
            )
        if late := [rank for rank, waited in enumerate(self._counts("waited")) if not waited]:
            return f"{_names(late)} did not come to a message in time: alive, but slow or at something else"
        return f"rank {self._rank} lost a message that all wait for: {_first_line(error)}"

    def _counts(self, what: str) -> list[int]:
        return [self._store.add(f"fastattn/{what}/{rank}", 0) for rank in range(self._world)]


def _names(ranks: list[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def _is_lost_message(error: BaseException | None) -> bool:
    """Whether it says that a message between ranks did not come through; gloo has no type for that."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return True
        error = error.__cause__
    return False

"""The processes of one run, which begin and end together. If one fails, every other one reports the reason."""

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

_BEAT = 0.25  # seconds between signs of life
_SILENCE = 12  # a process that misses this many beats counts as gone
_STORE = 8.0  # seconds for a store to answer all requests about a fault
_FAULT = "fastattn/fault"
_GONE = "the process that holds the store of the job (the launcher or rank 0) is gone or stopped"


class RankFailed(RuntimeError):
    """Another rank raised, ended or was too late; the message names it and the known reason."""


class _NoAnswer(Exception):
    """The store does not answer."""


class Job:
    """The result of `job`: the mesh, and questions that a run asks about its processes."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        """one dimension for each of the sizes"""
        self.rank: int = dist.get_rank()
        self.first: bool = self.rank == 0
        """whether this process acts for all: it prints, draws the progress bar and writes files"""
        self._interrupted = False

    def interrupt(self, *_: Any) -> None:
        """The handler of Ctrl-C in this process; `interrupted` tells all processes."""
        self._interrupted = True

    def interrupted(self) -> bool:
        """Whether any process has received SIGINT (Ctrl-C) since the job began; all ranks ask together and agree.

        A program that asks after each step stops on all ranks after the same step.
        """
        flag = torch.tensor(int(self._interrupted))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


@contextlib.contextmanager
def job(sizes: Mapping[str, int], *, device: str = "cpu", timeout: float = 600.0) -> Iterator[Job]:
    """Run the processes that ``torchrun`` has started as one job on a mesh, until the end of the ``with`` block.

    If a rank raises, dies or does not reach a message within ``timeout``, every other rank raises `RankFailed`, which
    names that rank in place of the connection error. Nothing waits longer than ``timeout`` in any process group made
    inside the block. Ctrl-C interrupts nothing: `Job.interrupted` reports it, so that the program can stop at a point
    where it can continue later. ``torchrun`` gives it 30 seconds.

    Args:
        sizes: of the mesh by name, ``{"dp": 2, "tp": 4}``; their product is the number of processes.
        device: "cpu" (gloo), or "cuda" (NCCL): the device ``LOCAL_RANK``.
        timeout: the most seconds for a message, and for joining the others. It must exceed a step of the slowest rank.

    Raises:
        RuntimeError: no launcher such as ``torchrun`` has set RANK and WORLD_SIZE.
        ValueError: the number of processes is not the product of ``sizes``.
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
                with contextlib.suppress(RuntimeError):  # some backends cannot abort
                    dist.distributed_c10d._abort_process_group()  # ranks that wait for this one then fail
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
    """Set the timeout of every process group made inside: a mesh makes its own groups and takes no timeout for them."""
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
    """Return or raise what ``call`` does; raise `_NoAnswer` after this many seconds.

    A store waits forever for a stopped server, so the call runs in a thread, which this abandons after the timeout.
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
    """Signs of life, counted in the job's store, and the first fault that a rank wrote there."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._ended = threading.Event()
        self._heard: str | None = None  # kept here, because the store may be gone when this rank asks
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, with every reader
            store = self._store.clone()  # its own connection: the other may be waiting for an answer
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
        """The fault of another rank, if it caused ``error``. Otherwise tell all ranks this rank's fault and return
        None."""
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
        """If this process holds the store, keep it until all living ranks have read the fault, for a limited time."""
        if self._rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        before = self._counts("alive")
        for beat in range(2 * _SILENCE):
            counts = zip(before, self._counts("alive"), self._counts("heard"), strict=True)
            if all(heard or (beat >= _SILENCE and old == new) for old, new, heard in counts):
                return
            time.sleep(_BEAT)

    def _tell(self, fault: str) -> str:
        """Tell all ranks a fault; return the first one that a rank told."""
        return self._store.compare_set(_FAULT, "", fault[:2000]).decode(errors="ignore")

    def _reason(self, error: Exception) -> str:
        """Why a message failed: the rank that failed, gives no sign of life, or waits for no message."""
        self._store.add(f"fastattn/waited/{self._rank}", 1)
        before = self._counts("alive")
        for _ in range(_SILENCE):  # a rank that raised may not have reported yet
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
    """Whether the error means a lost message between ranks; gloo has no error type for that."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return True
        error = error.__cause__
    return False

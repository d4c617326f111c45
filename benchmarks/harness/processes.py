"""Processes on gloo on this machine, for suites that measure several ranks."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def _work(rank: int, count: int, rendezvous: str, function: Callable[..., Any], arguments: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    try:
        results.send((True, function(*arguments)))
    except BaseException as error:
        results.send((False, f"{type(error).__name__}: {error}"))
    os._exit(0)  # a group whose ranks failed does not close in order


def run(count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 300.0) -> Any:
    """Call a module's function in this many processes, each with one thread, and return the result of the first.

    Raises:
        RuntimeError: a process raised, ended or took longer.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            work = (rank, count, os.path.join(folder, "rendezvous"), function, arguments, theirs)
            process = context.Process(target=_work, args=work, daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            answers = []
            for rank, (_, results) in enumerate(started):
                if not results.poll(seconds):
                    raise RuntimeError(f"process {rank} of {count} did not answer in {seconds:g} s")
                good, answer = results.recv()
                if not good:
                    raise RuntimeError(f"process {rank} of {count} raised {answer}")
                answers.append(answer)
        finally:
            for process, _ in started:
                process.kill()
                process.join()
    return answers[0]

"""A job of processes of its own, of which one fails; and the character model of the examples on several processes."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fastattn.distributed as fd
from examples.charlm import train
from examples.charlm.data import Text
from examples.charlm.models import Shape
from examples.charlm.parallel import Ranks
from tests.support.ranks import PATIENCE

TIMEOUT = 4.0  # where one has to pass; else none does


def steps(environment, connection, kind):
    """What a rank does, and what it hears: (what it raised or the last step, seconds of that step)."""
    os.environ.update(environment)
    begin, step = time.monotonic(), -1
    try:
        timeout = PATIENCE if kind.endswith(("raised", "interrupted")) else TIMEOUT
        if kind == "killed on joining" and int(environment["RANK"]) == failing(kind):
            sys.modules[fd.Job.__module__].init_device_mesh = lambda *_, **__: fail("killed")
        with fd.job({"dp": int(environment["WORLD_SIZE"]), "tp": 1}, timeout=timeout) as job:
            own = dist.new_group()  # as a program makes, or a mesh
            for step in range(5):
                begin = time.monotonic()
                if step == 2 and job.rank == failing(kind):
                    fail(kind)
                dist.barrier(own)
                if job.interrupted():
                    break
        answer = f"ended after step {step}"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    connection.send((answer, time.monotonic() - begin))


def failing(kind):
    """The rank."""
    return 0 if kind.startswith("first") else 1


def fail(kind):
    if kind in ("killed", "first killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind.endswith("stopped"):
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind in ("raised", "first raised"):
        raise ValueError("on purpose")
    elif kind == "late":
        time.sleep(TIMEOUT + 4)
    elif kind == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(function, rank, world, port, arguments):
    """(process, connection): a rank of a job. It calls the function with its environment, the other end and these."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(environment, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def run(kind, world):
    """What each rank of a job says in which one fails; None of one that says nothing."""
    port = free_port()
    started = [start(steps, rank, world, port, (kind,)) for rank in range(world)]
    deadline = time.monotonic() + PATIENCE
    found = []
    for rank, (_, connection) in enumerate(started):
        if rank == failing(kind) and kind.endswith("stopped"):
            found.append(None)
            continue
        if not connection.poll(max(0.0, deadline - time.monotonic())):
            pytest.fail(f"rank {rank} hangs where one was {kind}")
        try:
            found.append(connection.recv())
        except EOFError:  # it was killed
            found.append(None)
    for process, _ in started:
        process.kill()
    return found


TEXT = 20 * "the quick brown fox jumps over the lazy dog.\n"
RECIPE = train.Recipe(steps=5, batch=5, warmup=0, evaluate_every=3)


def fit(mesh, sizes, kind, folder, dtype=torch.float32, stop=None, dropout=0.0, resume=None):
    """Losses of the example's training; in one process without a mesh. ``stop``: Ctrl-C in rank 1 after that step."""
    text = Text.read(Path(folder) / "text.txt")
    job = None if mesh is None else fd.Job(init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "cp", "tp")))
    shape = Shape(kind, block=7, layers=2, heads=4, width=16, dropout=dropout)
    model = train.build(shape, text.vocabulary, RECIPE.seed).to(dtype)

    def on_step(done, history):
        if done == stop and job.rank == 1:
            job.interrupt()

    checkpoint = Path(folder) / (resume or ("alone.pt" if job is None else "ranks.pt"))
    try:
        history = train.fit(
            model, text, shape, RECIPE, checkpoint, resume=resume is not None, on_step=on_step, ranks=Ranks(job)
        )
    except KeyboardInterrupt:
        return "interrupted"
    return history.train, history.validation


def fit_on_eight(folder):
    """What each of eight processes says of the example's training where data, sequence and heads are all divided."""
    port = free_port()
    started = [start(fit_in_a_process, rank, 8, port, ((2, 2, 2), "modern", folder)) for rank in range(8)]
    found = []
    for rank, (_, connection) in enumerate(started):
        if not connection.poll(2 * PATIENCE):
            pytest.fail(f"rank {rank} hangs")
        found.append(connection.recv())
    for process, _ in started:
        process.kill()
    return found


def fit_in_a_process(environment, connection, sizes, kind, folder):
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    connection.send(fit(True, sizes, kind, folder))
    connection.recv()  # until all have answered: a group whose ranks are gone ends the others

"""Processes of a job of which one is killed or stopped, at a moment drawn at random: how long the others wait for it.

    python -m tests.support.faults --trials 50 --timeout 60

trains a small model, its heads, sequences and parameters divided in turn, with checkpoints in between. The one that
goes does so in the midst of something: see `MOMENTS`. Every other one has to say so soon after, or within the time-out.
"""

import argparse
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.tensor.parallel import parallelize_module

import fastattn.distributed as fd
from fastattn.distributed import comm
from fastattn.nn import CausalLM, CausalLMConfig
from tests.support.ranks_job import free_port, start

MOMENTS = {
    "joining": (dist, "init_process_group"),
    "meshes": (sys.modules["fastattn.distributed.job"], "init_device_mesh"),
    "headers": (comm.Ranks, "agree"),
    "messages": (comm.Peers, "start"),
    "backward": (torch.Tensor, "backward"),
    "clipping": (fd, "clip_grad_norm_"),
    "checkpoint": (state_dict_saver, "save"),
    "question": (fd.Job, "interrupted"),
    "end": (dist, "barrier"),
    "destruction": (dist, "destroy_process_group"),
}
"""What a process is in the midst of -> the function."""
SLACK = 25.0  # seconds beyond the time-out: signs of life, the store, and what else the machine does
MESHES = ({"dp": 2, "cp": 2}, {"cp": 3}, {"dp": 1, "cp": 2, "tp": 2}, {"dp": 3, "tp": 1}, {"cp": 2, "tp": 2})


def go_at(moment: str, count: int, delay: float, number: int) -> None:
    """Let this process get a signal, so many seconds after it has come to the moment for the ``count``-th time."""
    owner, name = MOMENTS[moment]
    function, left = getattr(owner, name), [count]

    def wrapped(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        return function(*args, **options)

    setattr(owner, name, wrapped)


def train(sizes: dict[str, int], timeout: float, folder: str, steps: int = 4) -> None:
    """What each process does."""
    with fd.job(sizes, timeout=timeout) as joined:
        mesh = joined.mesh
        torch.manual_seed(0)
        config = CausalLMConfig(vocab_size=16, d_model=16, num_layers=1, num_heads=2)
        model, tokens = CausalLM(config), torch.randint(0, 16, (2, 24))
        if sizes.get("tp", 1) > 1:
            parallelize_module(model, mesh["tp"], fd.tensor_parallel_plan(model, mesh["tp"].size()))
        if "cp" in sizes:
            parallelize_module(model, mesh["cp"], fd.ContextParallel(strategy="ring"))
            tokens = fd.shard(tokens, mesh=mesh["cp"], dim=1)
        if "dp" in sizes:
            fd.fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(steps):
            model(tokens, labels=tokens).backward()
            fd.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state_dict_saver.save({"model": model.state_dict()}, checkpoint_id=os.path.join(folder, str(step)))
            if joined.interrupted():
                break


def process(environment: dict[str, str], connection: Any, going: Any, target: Any, arguments: Any) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if going is not None:
        go_at(*going)
    try:
        target(*arguments)
        answer = "ended"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    connection.send(answer)


def draw(rng: random.Random) -> tuple[dict[str, int], int, tuple[str, int, float, int]]:
    """(sizes of the mesh, the rank that goes, arguments of `go_at`)."""
    sizes = rng.choice(MESHES)
    moment = rng.choice(list(MOMENTS))
    often = {"headers": 6, "messages": 12, "backward": 3, "clipping": 3, "checkpoint": 3, "question": 3}
    delay = rng.choice([0.0, 0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.1)])
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    return (
        sizes,
        rng.randrange(math.prod(sizes.values())),
        (moment, rng.randint(1, often.get(moment, 1)), delay, number),
    )


def trial(rng: random.Random, timeout: float, patience: float, folder: str) -> list[str]:
    """One job; what is wrong with it."""
    sizes, victim, going = draw(rng)
    world = math.prod(sizes.values())
    started = [
        start(process, rank, world, port, (going if rank == victim else None, train, (sizes, timeout, folder)))
        for port in [free_port()]
        for rank in range(world)
    ]
    moment, count, delay, number = going
    name = f"{sizes}, rank {victim}: {signal.Signals(number).name} {delay * 1e3:.1f} ms after {moment} {count}"
    print(name, flush=True)
    begin = time.monotonic()
    gone, answers = begin, {}
    others = set(range(world)) - {victim}
    while others - answers.keys() and time.monotonic() < begin + patience:
        time.sleep(0.02)
        now = time.monotonic()
        gone = now if _runs(started[victim][0]) else gone
        for rank in others - answers.keys():
            if started[rank][1].poll():
                answers[rank] = started[rank][1].recv(), now
    found = []
    for rank in sorted(others):
        text, at = answers.get(rank, ("still waits", time.monotonic()))
        print(f"    rank {rank} after {max(at - gone, 0.0):.1f} s: {text[:120]}", flush=True)
        if rank not in answers or at - gone > timeout + SLACK or not text.startswith(("ended", "RankFailed")):
            found.append(f"{name}: rank {rank} after {at - gone:.1f} s: {text[:120]}")
    for own, _ in started:
        own.kill()
        own.join()
    return found


def _runs(process: Any) -> bool:
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in ("T", "Z", "X")  # stopped, or ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds, of the job")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    wrong = []
    for number in range(options.trials):
        rng = random.Random(f"{options.seed} {number}")
        with tempfile.TemporaryDirectory() as folder:
            wrong += trial(rng, options.timeout, options.timeout + 2 * SLACK, folder)
    print(f"{options.trials} trials, {len(wrong)} processes that waited too long or did not say why")
    print(*wrong, sep="\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    from tests.support import faults  # processes are given functions of the module, not of the program

    faults.main()

"""Context parallelism on more GPUs than there are: a simulation of each strategy's schedule, message by message.

The model is the one by which `fastattn.distributed` chooses a strategy (`fastattn/distributed/cost.py`), with figures
of links and kernels. Here its predictions are compared with real steps of 2 and 4 processes on gloo, with the link and
the kernels measured among the same processes. Then it predicts steps of 8 to 4096 GPUs.

A step is the forward and the backward pass of one layer's attention, causal, in zigzag shards.

Sources of `NETWORKS`: bandwidth: NVIDIA H100 datasheet (NVLink 900 GB/s, both directions together), NDR InfiniBand, 400
Gb/s, one port per GPU, and 100 Gb/s Ethernet per GPU. Latency: NCCL's own model, src/graph/tuning.cc, protocol Simple:
8.4 us for each start, and 3.4 us by NVLink or 9.6 us by network; that of Ethernet is assumed.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import fastattn.distributed as fd
from benchmarks.harness import predictions, processes, summary
from benchmarks.harness.device import DryRun, summarize
from benchmarks.harness.runner import Bench, Cell
from fastattn.distributed import ulysses
from fastattn.distributed.comm import Message, Peers, Ranks
from fastattn.distributed.cost import Cost, Sizes, Strategy, cost
from fastattn.distributed.layout import Balance, Piece, View
from fastattn.flops import BACKWARD_FACTOR, forward_flops
from fastattn.spec import make_spec

DEVICES = ("cpu",)

PEAK = 989e12
"""The peak of H100 SXM, bfloat16, dense, from its datasheet."""
MACHINE = 8
NEAR = {"machine": MACHINE, "near_latency": 11.8e-6, "near_bandwidth": 450e9}
NETWORKS = {
    "InfiniBand": fd.Link(latency=18e-6, bandwidth=50e9, **NEAR),
    "Ethernet": fd.Link(latency=50e-6, bandwidth=12.5e9, **NEAR),
}
GPUS = (8, 64, 512, 4096)
TOKENS = (32 << 10, 128 << 10, 512 << 10, 2 << 20, 10 << 20)
HEADS, KV_HEADS, DIM = 32, 8, 128


def whole(tokens: int, ranks: int, width: int = 1, balance: Balance = "zigzag", **sizes: Any) -> Sizes:
    """A causal layer: of a Llama with 32 query and 8 key heads in bfloat16, unless ``sizes`` says otherwise."""
    shape = {"q_heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "v_dim": DIM, "element": 2} | sizes
    view = View(0, None, 0)
    return Sizes(ranks=ranks, balance=balance, batch=1, q_len=tokens, kv_len=tokens, view=view, width=width, **shape)


# Played


def kernel_rate() -> tuple[float, str]:
    """(floating-point operations per second of our kernel on an H100, the source of this figure)."""
    asked = {"case": "grid", "mode": "forward", "provider": "fastattn", "dtype": "bf16", "head_dim": str(DIM)}
    found = predictions.of(asked | {"causal": "yes"})
    share = float(found["of_matmul"]) if found else 0.6
    return share * PEAK, f"kernel at {share:.0%} of the peak, as the static model predicts; nothing measured on GPUs"


def ways(gpus: int) -> dict[str, tuple[int, Strategy]]:
    """Provider -> (ranks that divide heads, strategy), for all sensible combinations."""
    found: dict[str, tuple[int, Strategy]] = {}
    if gpus <= 64:
        found |= {"ring": (1, "ring"), "all_gather": (1, "all_gather")}
    if gpus <= HEADS:
        found["ulysses"] = (1, "ulysses")
    if gpus > MACHINE:
        found |= {"ring, heads by 8": (MACHINE, "ring"), "all_gather, heads by 8": (MACHINE, "all_gather")}
    return found


class Played(NamedTuple):
    """A step of one rank."""

    work: float
    exposed: float
    """seconds"""
    memory: int
    """bytes: q, k, v, out and gradients of its tokens, and received messages"""
    received: int
    """bytes"""

    @property
    def seconds(self) -> float:
        return self.work + self.exposed


def play(sizes: Sizes, strategy: Strategy, link: fd.Link, back: fd.Link | None = None) -> Played:
    """A step by the model; ``back`` is the link with the rate of the backward kernel."""
    passes: list[Cost] = [cost(sizes, link, strategy), cost(sizes, back or link, strategy, True)]
    own = -(-sizes.q_len // sizes.ranks) * sizes.batch
    row = 4 * sizes.q_heads * sizes.head_dim + 4 * sizes.kv_heads * sizes.head_dim  # and their gradients
    return Played(
        sum(x.compute for x in passes), sum(x.exposed for x in passes),
        own * row * sizes.element + max(x.memory for x in passes), sum(x.bytes for x in passes),
    )  # fmt: skip


def measure_played(bench: Bench, gpus: int, network: str) -> None:
    """All lengths and strategies of this many GPUs."""
    rate, where = kernel_rate()
    link = dataclasses.replace(NETWORKS[network], flops=rate)
    lengths = TOKENS[:1] if isinstance(bench.device, DryRun) else TOKENS
    for tokens in lengths:
        if tokens < gpus * 128:  # shards shorter than a tile of the kernel
            continue
        for name, (width, strategy) in ways(gpus).items():
            step = play(whole(tokens, gpus, width), strategy, link)
            key = {
                "case": f"{gpus} GPUs, {network}", "mode": "step, played", "provider": name, "dtype": "bf16",
                "batch": 1, "q_heads": HEADS, "kv_heads": KV_HEADS, "q_len": tokens, "kv_len": tokens,
                "head_dim": DIM, "causal": True, "p50_ms": step.seconds * 1e3, "mbytes": step.received / 1e6,
            }  # fmt: skip
            note = f"exposed {step.exposed * 1e3:.4g} ms; {where}"
            bench.record("scaling", key, peak_mib=step.memory / 2**20, note=note)


# Checked against processes


class Check(NamedTuple):
    """One real step."""

    ranks: int
    strategy: Strategy
    balance: Balance
    width: int = 1

    @property
    def case(self) -> str:
        mesh = f"{self.ranks // self.width}x{self.width}" if self.width > 1 else str(self.ranks)
        return f"{mesh} processes on gloo, {self.balance}"

    def piece(self, length: int) -> tuple[int, int]:
        """(tokens, heads) of the calls of the kernel that a rank makes."""
        if self.strategy == "ulysses":
            return length, SHAPE["q_heads"] // self.ranks
        runs = self.ranks // self.width * (2 if self.balance == "zigzag" else 1)
        return length // runs, SHAPE["q_heads"] // self.width


CHECKS = [
    *(Check(2, strategy, balance) for balance in ("zigzag", "contiguous") for strategy in ("ring", "all_gather")),
    Check(2, "ulysses", "zigzag"),
    *(Check(4, strategy, "zigzag") for strategy in ("ring", "all_gather", "ulysses")),
    Check(4, "ring", "zigzag", 2),
]  # fmt: skip
SHAPE = {"q_heads": 4, "kv_heads": 4, "head_dim": 64, "v_dim": 64, "element": 4}
LENGTH = 2048
ROUNDS = 10
"""each with a prediction of its own"""


class Measured(NamedTuple):
    """Seconds of a check, forward and backward pass together: measured and predicted, round by round."""

    check: Check
    seconds: list[float]
    predicted: list[float]

    @property
    def ratios(self) -> list[float]:
        """Predicted / measured."""
        return [x / y for x, y in zip(self.predicted, self.seconds, strict=True)]


class Spent(NamedTuple):
    """Seconds of a run; of each kind the most that a rank has."""

    seconds: float
    """of both passes"""
    own_forward: float
    """processor time of all threads of the process: waiting for messages or for a processor does not count"""
    own_backward: float

    def own(self, backward: bool) -> float:
        return self.own_backward if backward else self.own_forward


Run = Callable[[], list[tuple[float, float]]]
"""What is measured, which gives the times before, between and after the passes: (clock, processor time)."""


def run_checks(length: int, rounds: int) -> list[Measured]:
    """In each process: the links and kernels of 2 and of 4 processes, what they predict, and the steps themselves."""
    rank = dist.get_rank()
    meshes = {(n, 1): DeviceMesh("cpu", list(range(n)), mesh_dim_names=("cp",)) for n in (2, 4)}
    meshes[4, 2] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("ring", "heads"))
    alone = [DeviceMesh("cpu", [n], mesh_dim_names=("cp",)) for n in range(dist.get_world_size())][rank]
    found = []
    for ranks in (2, 4):
        if rank < ranks:
            found += _checks_of(ranks, meshes, alone, length, rounds)
        dist.barrier()
    return found


def _checks_of(ranks: int, meshes: Any, alone: DeviceMesh, length: int, rounds: int) -> list[Measured]:
    mesh = meshes[ranks, 1]
    peers = Peers(mesh, 0, None)
    checks = [check for check in CHECKS if check.ranks == ranks]
    runs: dict[Any, Run] = {c: _step(meshes[ranks, c.width], length, c.strategy, c.balance) for c in checks}
    runs |= {"a call": _step(alone, 2), "three calls": _step(alone, 4, balance="zigzag"), "headers": _agree(mesh)}
    for check in checks:
        for causal in (False, True):
            tokens, heads = check.piece(length)
            runs[(tokens, heads), causal] = _step(alone, tokens, causal=causal, heads=heads)
    piece = torch.empty(length // ranks * SHAPE["kv_heads"] * (SHAPE["head_dim"] + SHAPE["v_dim"]))
    runs |= {"first byte": _pass_on(peers, piece[:64]), "messages": _pass_on(peers, piece[:64], MESSAGES)}
    runs |= {"message": _pass_on(peers, piece), "swap": _swap(alone, length // ranks)}
    found = [Measured(check, [], []) for check in checks]
    for _ in range(rounds):  # all take turns, so that other work of the machine affects all alike
        spent = {name: _slowest(peers, run) for name, run in runs.items()}
        for check, seconds, predicted in found:
            seconds.append(spent[check].seconds)
            predicted.append(_predict(check, length, spent, piece.nbytes))
    return found


MESSAGES = 9


def _predict(check: Check, length: int, spent: dict[Any, Spent], size: int) -> float:
    """Seconds of a step, from what links and kernels take among as many processes. ``size``: bytes of the message.

    If there are more processes than processors, they share them, also with other programs. All work of a rank then
    takes longer by the same factor as its kernels, which wait for nothing else.
    """
    kernels = [x for name, x in spent.items() if isinstance(name, tuple) and isinstance(name[0], tuple)]
    crowd = sum(x.seconds for x in kernels) / sum(x.own_forward + x.own_backward for x in kernels)
    # A rank sends and receives: two messages for each one of the ring.
    first, several, large = (spent[name] for name in ("first byte", "messages", "message"))
    message = max(several.own_forward - first.own_forward, 0.0) / (2 * (MESSAGES - 1))
    copy = max(large.own_forward - first.own_forward, 0.0) / (2 * size)
    latency = max(first.seconds - crowd * 2 * message, 0.0)
    wire = max(large.seconds - first.seconds - crowd * 2 * size * copy, 1e-9)
    link = fd.Link(latency=latency, bandwidth=size / wire, copy=crowd * copy, message=crowd * message)
    links, start = [], spent["headers"].seconds
    by_heads = check.strategy == "ulysses" or check.width > 1
    for backward in (False, True):
        once, thrice = (spent[name].own(backward) for name in ("a call", "three calls"))
        beside = max(once - max(thrice - once, 0.0) / 2, 0.0)  # the time of a step outside its calls
        start += crowd * (beside + (spent["swap"].own(backward) if by_heads else 0.0))
        links.append(_with_kernel(link, spent, check.piece(length), backward, beside, crowd))
    return start + play(whole(length, check.ranks, check.width, check.balance, **SHAPE), check.strategy, *links).seconds


def _with_kernel(
    link: fd.Link, spent: dict[Any, Spent], piece: tuple[int, int], backward: bool, beside: float, crowd: float
) -> fd.Link:
    """The rates with which the times of a square of pairs and of the triangle below its diagonal are those measured."""
    length, heads = piece
    square, triangle = (
        max(crowd * (spent[piece, causal].own(backward) - beside), 1e-9) for causal in (False, True)
    )  # fmt: skip
    pairs = length * length, length * (length + 1) // 2
    operations = [forward_flops(1, heads, n, SHAPE["head_dim"], SHAPE["v_dim"]) for n in pairs]
    factor = BACKWARD_FACTOR if backward else 1.0
    flops = factor * (operations[0] - operations[1]) / max(square - triangle, 1e-9)
    return dataclasses.replace(link, flops=flops, call=max(square - factor * operations[0] / flops, 0.0))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _step(
    mesh: DeviceMesh, length: int, strategy: Strategy = "ring", balance: Balance = "contiguous", causal: bool = True,
    heads: int = SHAPE["q_heads"],
) -> Run:  # fmt: skip
    shape = (1, heads, length, SHAPE["head_dim"])
    own = [fd.shard(torch.randn(shape), mesh=mesh, dim=2, balance=balance).requires_grad_() for _ in range(3)]
    dout = torch.randn_like(own[0])

    def run() -> list[tuple[float, float]]:
        begin = _now()
        out = fd.context_parallel_attention(*own, mesh=mesh, strategy=strategy, balance=balance, causal=causal)
        assert isinstance(out, torch.Tensor)
        middle = _now()
        torch.autograd.grad(out, own, dout)
        return [begin, middle, _now()]

    return run


def _agree(mesh: DeviceMesh) -> Run:
    """The first messages of a call, by which the ranks agree."""
    ranks = Ranks(mesh)

    def run() -> list[tuple[float, float]]:
        begin = _now()
        ranks.headers([1] * 10, "")
        return [begin, _now(), _now()]

    return run


def _pass_on(peers: Peers, buffer: torch.Tensor, count: int = 1) -> Run:
    """Each rank sends to the next, this many messages at a time, into new memory."""
    right, left = (peers.rank + 1) % peers.size, (peers.rank - 1) % peers.size

    def run() -> list[tuple[float, float]]:
        begin = _now()
        sends = [Message(buffer, right, tag) for tag in range(count)]
        peers.exchange(sends, [Message(torch.empty_like(buffer), left, tag) for tag in range(count)])
        return [begin, _now(), _now()]

    return run


def _swap(mesh: DeviceMesh, length: int) -> Run:
    """The work of a rank before tokens change places with heads, and after it, without messages."""
    q, k, v = (torch.randn(1, SHAPE["q_heads"], length, SHAPE["head_dim"], requires_grad=True) for _ in range(3))
    peers, places = Peers(mesh, 0, None), [[Piece(0, length)]]
    dout = torch.randn_like(q)

    def run() -> list[tuple[float, float]]:
        begin = _now()
        out, _ = ulysses.run(peers, places, places, make_spec(q, k, v), lambda spec, head: (spec.q, None))
        middle = _now()
        torch.autograd.grad(out, (q, k, v), dout)
        return [begin, middle, _now()]

    return run


def _slowest(peers: Peers, run: Run) -> Spent:
    """From a common start on."""
    dist.barrier(peers.group)
    (begin, own_begin), (_, own_middle), (end, own_end) = run()
    times = torch.tensor([end - begin, own_middle - own_begin, own_end - own_middle], dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX, peers.group)
    return Spent(*times.tolist())


def measure_checks(bench: Bench) -> None:
    """Predictions and measurements as pairs of rows."""
    if isinstance(bench.device, DryRun):
        found = [Measured(check, [1e-3], [1e-3]) for check in CHECKS]
    else:
        found = processes.run(4, run_checks, LENGTH, ROUNDS, seconds=900.0)
    for measured in found:
        check = measured.check
        key = {
            "case": check.case, "mode": "step", "provider": check.strategy, "dtype": "fp32", "batch": 1,
            "q_heads": SHAPE["q_heads"], "kv_heads": SHAPE["kv_heads"], "q_len": LENGTH, "kv_len": LENGTH,
            "head_dim": SHAPE["head_dim"], "causal": True,
        }  # fmt: skip
        timing, predicted = (summarize([1e3 * x for x in of]) for of in (measured.seconds, measured.predicted))
        least, *_, most = sorted(measured.ratios * 2)
        note = f"{summary.RATIO} {statistics.median(measured.ratios):.2f}, {least:.2f} to {most:.2f}"
        bench.record("scaling", key, timing)
        bench.record("scaling", key | {"mode": "step, predicted"}, predicted, note=note)
        print(f"{check.case}, {check.strategy}: {timing.p50:.1f} ms, predicted {predicted.p50:.1f}; {note}")


def cells() -> list[Cell]:
    found = [Cell("scaling", "checks", measure_checks, 3)]
    for network in NETWORKS:
        for gpus in GPUS:
            run = functools.partial(measure_played, gpus=gpus, network=network)
            found.append(Cell("scaling", f"{gpus} GPUs, {network}", run, 4))
    return found

"""Repeated launches against Triton's own way, on the stand-in for a GPU: run by test_replay.py in a fresh process.

python -m tests.support.replay_checks
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

import fastattn
from benchmarks.harness import standin
from benchmarks.suites import launch as suite
from fastattn.kernels import append, backward, config, decode, forward, replay

HEADS, KV_HEADS, LENGTH, DIM = 4, 2, 48, 64
LAUNCHERS = {
    "forward": forward.attention_forward, "backward": backward.attention_backward, "append": append.kv_cache_append,
    "cache": decode._attend,
}  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def qkv(batch: int = 2, length: int = LENGTH, dim: int = DIM, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [random(batch, heads, length, dim, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def attend(tensors: list[Tensor], **options: Any) -> None:
    """Forward and backward."""
    leaves = [x.requires_grad_() for x in tensors]
    others = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    out = fastattn.attention(*leaves, **options)
    torch.autograd.grad(out, [*leaves, *others], torch.ones(out.shape).to(out.dtype))


def varlen(tensors: list[Tensor]) -> None:
    bounds = torch.tensor([0, 20, LENGTH], dtype=torch.int32)
    leaves = [x[0].transpose(0, 1).requires_grad_() for x in tensors]
    out = fastattn.attention_varlen(*leaves, bounds, causal=True)
    torch.autograd.grad(out, leaves, random(*out.shape))


def cached(tensors: list[Tensor], page: int = 0, added: bool = True, **options: Any) -> None:
    q = tensors[0][:, :, :1].contiguous()
    new = [x[:, :, :1].contiguous() for x in tensors[1:]] if added else []
    caches, table = [random(2, 512, KV_HEADS, DIM) for _ in "kv"], None
    if page:
        caches = [x.view(-1, page, KV_HEADS, DIM) for x in caches]
        table = torch.arange(1024 // page, dtype=torch.int32).view(2, -1)
    lens = torch.tensor([3, 100], dtype=torch.int32)
    fastattn.attention_with_kvcache(q, *caches, *new, cache_lens=lens, block_table=table, **options)


def heads_last(tensors: list[Tensor], **options: Any) -> None:
    attend([x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors], **options)


def blocks(q_index: Tensor, k_index: Tensor) -> Tensor:
    return q_index >= k_index


def case(run: Callable[..., None], *make: str, **options: Any) -> Callable[[], Callable[[], None]]:
    """A function that draws new operands and returns the call with them; ``make``: operands drawn too, by name."""
    makers: dict[str, Callable[[], Any]] = {
        "mask": lambda: torch.rand(LENGTH, LENGTH) < 0.5,
        "row": lambda: torch.rand(2, 1, 1, LENGTH) < 0.5,
        "bias": lambda: random(1, HEADS, LENGTH, LENGTH),
        "learned_bias": lambda: random(1, HEADS, LENGTH, LENGTH).requires_grad_(),
        "slopes": lambda: torch.rand(2, HEADS),
        "shared_slopes": lambda: torch.rand(HEADS),
        "sinks": lambda: torch.randn(HEADS),
        "half_sinks": lambda: random(HEADS),
        "learned_sinks": lambda: torch.randn(HEADS).requires_grad_(),
    }  # fmt: skip
    names = {"slopes": "alibi_slopes", "shared_slopes": "alibi_slopes", "row": "mask", "learned_bias": "bias",
             "half_sinks": "sinks", "learned_sinks": "sinks"}  # fmt: skip

    def draw() -> Callable[[], None]:
        return functools.partial(run, qkv(), **{names.get(name, name): makers[name]() for name in make}, **options)

    return draw


REPEATED = {
    "plain": case(attend),
    "causal window": case(attend, causal=True, window=(16, 0)),
    "softcap": case(attend, softcap=30),
    "dropout": case(attend, dropout_p=0.1),
    "boolean mask": case(attend, "mask"),
    "mask of one row": case(attend, "row", causal=True),
    "bias": case(attend, "bias"),
    "slopes and sinks": case(attend, "slopes", "sinks"),
    "lse": case(attend, "bias", causal=True, q_offset=3),
    "heads last": case(heads_last, causal=True),
    "packed sequences": case(varlen),
    "gradient of the bias": case(attend, "learned_bias"),
    "cache": case(cached),
    "cache, splits": case(cached, num_splits=4),
    "cache, pages": case(cached, page=16),
    "cache, nothing new": case(cached, added=False, window=(64, 0)),
}
"""Everything that the launcher does is repeated."""
TRITONS_OWN = {
    "slopes for all entries": case(attend, "shared_slopes"),
    "sinks in bfloat16": case(attend, "half_sinks"),
    "negative scale": case(attend, scale=-0.5),
    "gradient of the sinks": case(attend, "learned_sinks"),
}
"""PyTorch computes something beside some launch."""


def seen(device: standin.StandIn, call: Callable[[], None]) -> list[tuple[Any, ...]]:
    """What the driver is given, with names for addresses: which operand it is, or that the call has made it."""
    launches: list[standin.Launched] = []
    device.see = launches.append
    try:
        call()
    finally:
        device.see = None
    known: dict[int, Any] = {}
    for number, x in enumerate(tensors_in(call)):
        known.setdefault(x.data_ptr(), number)

    def name(x: Any) -> Any:
        return ("operand", known[x]) if x in known else "new" if isinstance(x, int) and x > 1 << 32 else x

    return [
        (launched.kernel, launched.specialisation, launched.grid, tuple(map(name, launched.arguments)))
        for launched in launches
    ]


def tensors_in(x: Any) -> list[Tensor]:
    if isinstance(x, functools.partial):
        return tensors_in([*x.args, *x.keywords.values()])
    if isinstance(x, (list, tuple)):
        return [t for item in x for t in tensors_in(item)]
    return [x] if isinstance(x, Tensor) else []


def forget() -> None:
    for launcher in LAUNCHERS.values():
        launcher.layouts.clear()


def plans() -> list[bool]:
    """Of each layout, whether it is repeated."""
    return [type(x) is replay.Plan for launcher in LAUNCHERS.values() for x in launcher.layouts.values()]


def own(device: standin.StandIn, call: Callable[[], None]) -> list[tuple[Any, ...]]:
    with replay.off():
        return seen(device, call)


def check_same_launches(device: standin.StandIn) -> None:
    """The third call of a layout, with other addresses, launches what Triton's own way launches."""
    for cases, repeated in ((REPEATED, True), (TRITONS_OWN, False)):
        for name, draw in cases.items():
            forget()
            draw()()
            draw()()
            compiled = device.compiled
            call = draw()
            expected = own(device, call)
            assert expected, name
            actual = seen(device, call)
            assert [x[0] for x in actual] == [x[0] for x in expected], name
            for a, b in zip(actual, expected, strict=True):
                assert a == b, f"{name}: {a}\n{b}"
            assert device.compiled == compiled, name
            assert all(plans()) == repeated and plans(), (name, plans())


def check_layouts(device: standin.StandIn) -> None:
    """Calls of the same shapes that differ in strides or dtype do not share launches."""
    forget()
    calls = [
        lambda: functools.partial(fastattn.attention, *qkv()),
        lambda: functools.partial(fastattn.attention, *qkv(dtype=torch.float16)),
        lambda: functools.partial(
            fastattn.attention, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
        ),
        lambda: functools.partial(fastattn.attention, *(torch.cat([x, x], 3)[..., :DIM] for x in qkv())),
        lambda: functools.partial(fastattn.attention, *qkv(), causal=True),
    ]  # fmt: skip
    for _ in range(4):
        for draw in calls:
            call = draw()
            assert seen(device, call) == own(device, call)
    assert len(plans()) == len(calls) and all(plans())


def check_a_tensor_given_twice(device: standin.StandIn) -> None:
    """And not the next time."""
    forget()
    same = random(2, HEADS, LENGTH, DIM)
    for _ in range(3):
        fastattn.attention(same, same, same)
    call = functools.partial(fastattn.attention, *(random(2, HEADS, LENGTH, DIM) for _ in range(3)))
    assert all(plans())
    assert seen(device, call) == own(device, call)


def check_new_lengths(device: standin.StandIn) -> None:
    """They compile nothing, with launches repeated or not."""
    for length in (16, 17):
        for _ in range(3):
            attend(qkv(length=length), causal=True)
    compiled = device.compiled
    for length in (1, 2, 3, 18, 100, 128, 1000):
        for _ in range(3):
            attend(qkv(length=length), causal=True)
    assert device.compiled == compiled


def check_alignment(device: standin.StandIn) -> None:
    """An address that is no multiple of 16 gets a kernel that was compiled for such."""
    forget()

    def call(shift: int) -> Any:
        memory = torch.zeros(2 * HEADS * LENGTH * DIM + 8, dtype=torch.bfloat16)
        q = memory[shift:].as_strided((2, HEADS, LENGTH, DIM), (HEADS * LENGTH * DIM, LENGTH * DIM, DIM, 1), shift)
        assert (q.data_ptr() % 16 == 0) == (shift % 8 == 0)
        return functools.partial(fastattn.attention, q, *qkv()[1:])

    ((_, aligned, *_),) = own(device, call(0))
    ((_, shifted, *_),) = own(device, call(1))
    assert aligned != shifted
    for _ in range(3):
        for shift, expected in ((0, aligned), (8, aligned), (1, shifted), (3, shifted)):
            ((_, actual, *_),) = seen(device, call(shift))
            assert actual == expected, shift
    assert plans() == [True, True]


def check_surroundings(device: standin.StandIn) -> None:
    """What compiled code depends on beside the arguments."""
    forget()
    call = functools.partial(fastattn.attention, *qkv(dtype=torch.float32))
    for _ in range(3):
        call()
    precise = seen(device, call)
    assert precise == own(device, call)
    torch.set_float32_matmul_precision("high")
    for _ in range(3):
        assert seen(device, call) == own(device, call) != precise
    torch.set_float32_matmul_precision("highest")
    with config.override(config.LaunchConfig(16, 16, 4, 1)):
        for _ in range(3):
            assert seen(device, call) == own(device, call) != precise
    knobs.runtime.debug = True
    for _ in range(3):
        assert seen(device, call) == own(device, call) != precise
    knobs.runtime.debug = False
    assert seen(device, call) == precise


def check_profilers(device: standin.StandIn) -> None:
    """Hooks on launches get what Triton gives them."""
    forget()
    call = functools.partial(fastattn.attention, *qkv())
    for _ in range(3):
        call()
    repeat, repeated = replay._repeat, []
    replay._repeat = lambda *arguments: repeated.append(repeat(*arguments))
    call()
    assert len(repeated) == 1

    def hook(metadata: Any) -> None: ...

    knobs.runtime.launch_enter_hook.add(hook)
    call()
    knobs.runtime.launch_enter_hook.remove(hook)
    assert len(repeated) == 1
    call()
    assert len(repeated) == 2
    replay._repeat = repeat


def check_unknown_triton(device: standin.StandIn) -> None:
    """A launcher that nobody has looked at is left alone, and said so once."""
    assert replay.known_triton() and replay.known_triton("3.6.0") and replay.known_triton("3.9.1")
    for version in ("3.5.1", "3.10.0", "4.0.0+git"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not replay.known_triton(version) and not replay.known_triton(version)
        assert len(caught) == 1 and f"the launcher of Triton {version} is not known" in str(caught[0].message)


def check_bounds(device: standin.StandIn) -> None:
    """Lengths that change with every call do not fill the memory."""
    forget()
    most, replay.MOST_LAYOUTS = replay.MOST_LAYOUTS, 4
    for length in range(1, 12):
        fastattn.attention(*qkv(length=length))
    assert len(forward.attention_forward.layouts) <= 4
    replay.MOST_LAYOUTS = most


def check_threads(device: standin.StandIn) -> None:
    """One thread watches while another launches."""
    forget()
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(20):
                REPEATED[name]()()
        except BaseException as error:
            failures.append(error)

    names = ("plain", "causal window", "boolean mask", "cache")
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert all(plans())
    for name in names:
        call = REPEATED[name]()
        assert seen(device, call) == own(device, call), name


def check_cost(device: standin.StandIn) -> None:
    """Less than Triton's own binder costs, whatever the machine; figures: python -m benchmarks launch."""
    for name, timings in suite.times(0.05).items():
        assert timings["fastattn"][3] < 0.8 * timings["triton-binder"][3], (name, timings)


if __name__ == "__main__":
    torch.manual_seed(0)
    with standin.installed() as device:
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                check(device)
                print(name, flush=True)
    print("Triton", triton.__version__)

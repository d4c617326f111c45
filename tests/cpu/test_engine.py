"""What holds on the CPU library beside the parity that `tests/kernels` and `tests/operator` hold every backend to:
threads, processes, instruction sets, memory around its results, numbers at the edge of the format.
"""

import ctypes
import itertools
import multiprocessing
import os
import threading

import pytest
import torch

from fastattn import BlockMask, attention, attention_varlen, attention_with_kvcache
from fastattn.backends import cpu
from fastattn.backends.cpu import library as cpu_library
from fastattn.backends.cpu.program import Program
from fastattn.backends.reference.dropout import dropout_keep
from fastattn.functional.rotary import turn
from fastattn.spec import Operands, Options
from fastattn.testing import assert_parity, check_attention
from tests.support.attention_cases import BFLOAT, DOUBLE, DTYPE_NAMES, HALF, INF, SINGLE, make_qkv

pytestmark = pytest.mark.skipif(cpu_library.problem() is not None, reason=f"{cpu_library.problem()}")

CANARY = -77.0
ALL_DTYPES = (HALF, BFLOAT, SINGLE, DOUBLE)


def leaves(lengths=(200, 333), dtype=SINGLE, heads=(4, 2), dims=(32, 32), batch=2):
    return [x.requires_grad_() for x in make_qkv("cpu", lengths, dims=dims, heads=heads, batch=batch, dtype=dtype)]


TERMS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (70, 20)},
    "mask": {"mask": torch.arange(333) % 3 != 0},
    "bias": {"bias": torch.linspace(-3, 3, 200 * 333).view(200, 333).requires_grad_()},
    "bias of one head": {"bias": torch.linspace(-3, 3, 333).view(1, 1, 1, 333).requires_grad_()},
    "slopes and sinks": {
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0]).requires_grad_(),
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]).requires_grad_(),
    },
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "block mask": {"block_mask": BlockMask.from_mask(torch.arange(333) // 130 == torch.arange(200)[:, None] // 90)},
}


def everything(lengths=(200, 333), **options):
    """out, lse and every gradient."""
    torch.manual_seed(3)
    qkv = leaves(lengths)
    learned = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    out, lse = attention(*qkv, return_lse=True, backend="cpu", **options)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    total = (out * weights).sum() + lse.masked_fill(lse == -INF, 0.0).sum()
    return [out, lse, *torch.autograd.grad(total, [*qkv, *learned])]


def cached(lens=(700, 33), dtype=SINGLE, q_len=2):
    own = torch.Generator().manual_seed(3)  # the default one is shared by all threads
    q = torch.randn(len(lens), 4, q_len, 32, generator=own).to(dtype)
    caches = [torch.randn(len(lens), 800, 2, 32, generator=own).to(dtype) for _ in "kv"]
    call = {"cache_lens": torch.tensor(lens), "return_lse": True, "backend": "cpu"}
    return attention_with_kvcache(q, *caches, **call)


# --- Threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["PyTorch's threads", "own threads"])
def team(request, monkeypatch):
    if request.param == "own threads":
        monkeypatch.setattr(cpu_library, "parallel_address", lambda: 0)
    elif not cpu_library.parallel_address():
        pytest.skip("this PyTorch has no GOMP_parallel")


@pytest.mark.parametrize("name", TERMS)
def test_results_do_not_depend_on_the_number_of_threads(name, threads, team):
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(everything(**TERMS[name]))
    for again in results[1:]:
        assert all(map(torch.equal, results[0], again))


@pytest.mark.parametrize("name", ["plain", "causal", "window", "slopes and sinks"])
def test_gradients_over_keys_in_pieces_do_not_depend_on_the_number_of_threads(name, threads, team):
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(everything((150, 2100), **TERMS[name]))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_packed_results_do_not_depend_on_the_number_of_threads(threads, team):
    bounds = torch.tensor([0, 130, 130, 190, 200], dtype=torch.int32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        torch.manual_seed(3)
        q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in leaves((200, 200)))
        out = attention_varlen(q, k, v, bounds, causal=True, dropout_p=0.2, backend="cpu")
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


LONG = {"dims": (256, 256), "batch": 1}
"""A head whose keys and values are so many bytes that more queries share a visit to them, where threads are few."""


@pytest.mark.parametrize("name", ["causal", "mask", "slopes and sinks", "dropout"])
def test_results_of_long_heads_do_not_depend_on_the_number_of_threads(name, threads, team):
    options = {
        "causal": {"causal": True, "softcap": 2.0},
        "mask": {"mask": torch.arange(1100) % 3 != 0, "window": (None, 300)},
        "slopes and sinks": {"alibi_slopes": torch.tensor([0.1, 0.0]), "sinks": torch.tensor([0.5, -1.0])},
        "dropout": {"dropout_p": 0.3},
    }[name]
    results = []
    for count in (1, 2, 5):
        threads(count)
        torch.manual_seed(3)
        q, k, v = make_qkv("cpu", (400, 1100), heads=(2, 1), **LONG)
        results.append(attention(q, k, v, return_lse=True, backend="cpu", **options))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


@pytest.mark.parametrize("q_len", [1, 20])
def test_cached_results_do_not_depend_on_the_number_of_threads(q_len, threads, team):
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(cached(q_len=q_len))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))


def test_python_threads_at_once(threads, team):
    """They share nothing but the library, and its calls release the GIL."""
    threads(2)
    q, k, v = make_qkv("cpu", (200, 200), heads=(2, 2), dims=(32, 32), dtype=SINGLE)
    expected = [attention(q, k, v, causal=True, backend="cpu"), *cached()]
    failures = []

    def work():
        torch.set_num_threads(2)
        for _ in range(10):
            if not all(map(torch.equal, (attention(q, k, v, causal=True, backend="cpu"), *cached()), expected)):
                failures.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# --- Processes -------------------------------------------------------------------------------------------------------


def in_child(connection, qkv, threads):
    """Little beside our own calls: PyTorch's own parallel loops hang in such a process."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        results = attention(*qkv, causal=True, softcap=3.0, backend="cpu"), *cached()
    connection.send([x.numpy().tobytes() for x in results])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process(threads):
    """PyTorch's threads stayed with the parent: entering them would never return."""
    threads(2)
    qkv = make_qkv("cpu", (200, 333), heads=(4, 2), dims=(32, 32), dtype=SINGLE)
    expected = [attention(*qkv, causal=True, softcap=3.0, backend="cpu"), *cached()]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=in_child, args=(sender, qkv, 2))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == [x.numpy().tobytes() for x in expected]
        child.join(10)
        assert child.exitcode == 0
    finally:
        child.kill()


class Attended(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        q = torch.full((1, 2, 8, 16), float(index))
        return attention(q, q, q, causal=True, backend="cpu")


def test_workers_of_a_data_loader():
    items = list(torch.utils.data.DataLoader(Attended(), batch_size=None, num_workers=2, timeout=60))
    assert all(torch.equal(item, Attended()[index]) for index, item in enumerate(items))


# --- Instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("dims", [(64, 64), (40, 24), (33, 7)], ids=str)
def test_every_variant_keeps_to_the_rule(dims, dtype, variant):
    q, k, v = make_qkv("cpu", (65, 100), dims=dims, heads=(4, 2), dtype=dtype)
    bias = torch.randn(4, 65, 100).requires_grad_()
    check_attention(q, k, v, backend="cpu", causal=True, bias=bias, softcap=10.0, dropout_p=0.1)
    check_attention(q, k, v, backend="cpu", window=(40, 3), mask=torch.rand(100) < 0.8, lse_gradient=True)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=DTYPE_NAMES.get)
def test_every_variant_keeps_to_the_rule_for_long_heads(dtype, threads, variant):
    threads(1)
    q, k, v = make_qkv("cpu", (200, 1100), heads=(1, 1), dtype=dtype, **LONG)
    check_attention(q, k, v, backend="cpu", causal=True, dropout_p=0.1)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=DTYPE_NAMES.get)
def test_every_variant_decodes(dtype, variant):
    from fastattn.testing import check_kvcache

    q = torch.randn(2, 4, 2, 40).to(dtype)
    caches = [torch.randn(2, 90, 2, width).to(dtype) for width in (40, 24)]
    masked = {
        "mask": torch.rand(2, 1, 2, 50) < 0.6,
        "bias": torch.randn(4, 1, 60),
        "mask_start": torch.tensor([40, -9]),
    }
    sinks = {"alibi_slopes": torch.rand(4), "sinks": torch.randn(4)}
    for terms in ({}, {"window": (30, 0), "softcap": 5.0}, sinks, masked):
        check_kvcache(q, *caches, cache_lens=torch.tensor([90, 41]), backend="cpu", **terms)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_every_variant_reads_and_writes_every_byte(cache, variant):
    """A single key: what comes out is its value. Written from halves of the same numbers, under a scale of a half."""
    numbers = torch.arange(256, dtype=torch.uint8).view(cache)
    used = numbers.float().isfinite() if cache.is_floating_point else numbers != -128
    numbers = numbers.view(torch.uint8)[used][:254].view(cache).view(1, 1, 2, 127)
    new, width = numbers.float() / 2, numbers.shape[3]
    caches, half = [torch.zeros(1, 1, 2, width, dtype=torch.uint8).view(cache) for _ in "kv"], torch.full((2,), 0.5)
    out = attention_with_kvcache(
        torch.zeros(1, 2, 1, width), *caches, *(new.transpose(1, 2) for _ in "kv"), cache_lens=0, k_scale=half,
        v_scale=half, backend="cpu",
    )  # fmt: skip
    assert torch.equal(out, new.transpose(1, 2))
    assert torch.equal(caches[0].float(), numbers.float()) and torch.equal(caches[1].float(), numbers.float())


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1, 37), (3, 64), (7, 100), (8, 256), (16, 5)])
def test_every_variant_multiplies_few_rows(rows, width, dtype, variant):
    """Weights side by side, a bias, a gate, a sum; each also where nothing beside it may be read or written."""
    x, weights = torch.randn(rows, width), [torch.randn(columns, width) / width**0.5 for columns in (70, 3, 64)]
    bias, old = torch.randn(70), torch.randn(rows, 70)
    x, bias, old, *weights = (t.to(dtype) for t in (x, bias, old, *weights))
    storage = torch.full((rows, 140), CANARY, dtype=dtype)
    together, gated, summed = storage[:, 1:138], torch.empty(rows, 3, dtype=dtype), old.clone()
    calls = Program()
    calls.linear(together, x, weights, [bias, None, None])
    calls.linear(gated, x, [weights[1], weights[1].flip(0).contiguous()], [None, None], gated=True)
    calls.linear(summed, x, weights[:1], [bias], add=True)
    calls.run()

    def eager(x, old, bias, *weights):
        first = x @ weights[0].T + bias
        return (
            torch.cat([first, x @ weights[1].T, x @ weights[2].T], 1),
            torch.nn.functional.silu(x @ weights[1].T) * (x @ weights[1].flip(0).T),
            old + first,
        )

    inputs = (x, old, bias, *weights)
    exact = eager(*(t.double() for t in inputs))
    for name, *results in zip(
        ("side by side", "gated", "sum"), (together, gated, summed), exact, eager(*inputs), strict=True
    ):
        assert_parity(*results, name, intermediate=float(exact[0].abs().max()))
    assert (storage[:, :1] == CANARY).all() and (storage[:, 138:] == CANARY).all()


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)
def test_a_row_is_multiplied_as_if_it_were_alone(dtype, variant):
    x, weight = torch.randn(13, 300).to(dtype), torch.randn(71, 300).to(dtype)

    def multiplied(x):
        y = torch.empty(x.shape[0], 71, dtype=dtype)
        calls = Program()
        calls.linear(y, x, [weight], [None])
        calls.run()
        return y

    together = multiplied(x)
    for rows in (1, 2, 3, 5):
        assert torch.equal(multiplied(x[:rows]), together[:rows])
    assert torch.equal(multiplied(x[12:]), together[12:])


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("width", [64, 38])
def test_every_variant_normalises_and_rotates(width, dtype, variant):
    x, weight = torch.randn(3, 5, width).to(dtype), torch.randn(width).to(dtype)
    tables = [torch.randn(4, width // 2) for _ in range(2)]
    position = torch.tensor([2, -1, 9])  # cut to the table
    normalised, turned = torch.empty_like(x), x.clone()
    calls = Program()
    calls.rms_norm(normalised, x, weight, 0.1)
    calls.rotate(turned[:, :4], *tables, position)
    calls.run()

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * weight

    assert_parity(normalised, norm(x.double(), weight.double()), norm(x, weight), "norm")

    def rotated(x):
        cos, sin = (t[torch.tensor([2, 0, 3])][:, None].to(torch.promote_types(x.dtype, SINGLE)) for t in tables)
        first, second = x[:, :4].chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

    assert_parity(turned[:, :4], rotated(x.double()), rotated(x), "rotate", intermediate=float(x.abs().max()))
    assert torch.equal(turned[:, 4:], x[:, 4:])


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("turning", [64, 38, 2])
def test_every_variant_turns_a_part_of_each_head(turning, interleaved, dtype, variant):
    x, (cos, sin) = torch.randn(2, 3, 5, 64).to(dtype), [torch.randn(4, turning // 2) for _ in range(2)]
    position = torch.tensor([[2, -1, 9, 0, 1], [3, 3, 0, 1, 2]])
    ours = cpu.turn(x, cos, sin, position, interleaved)
    eager, exact = (turn(each, cos, sin, position, interleaved) for each in (x, x.double()))
    assert_parity(ours, exact, eager, "turned", intermediate=float(x.abs().max()))
    assert torch.equal(ours[..., turning:], x[..., turning:])


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize(("rows", "width"), [(300, 64), (7, 100), (1, 20001)])
def test_every_variant_drops_what_the_reference_drops(rows, width, dtype, variant):
    x, p, seed = torch.randn(rows, width).to(dtype), 0.3, -5
    keep = dropout_keep(torch.tensor([seed]), p, 1, 1, (0, rows), (0, width))[0, 0]
    storage = torch.full((rows + 2, width), CANARY, dtype=dtype)
    cpu.dropout(storage[1:-1], x, p, seed)
    exact = torch.where(keep, x.double() / (1 - p), 0.0)
    assert_parity(storage[1:-1], exact, torch.where(keep, x / (1 - p), 0.0), "dropout")
    assert (storage[0] == CANARY).all() and (storage[-1] == CANARY).all()


# --- Memory ----------------------------------------------------------------------------------------------------------


def surrounded(shape):
    """A view whose elements all have something of somebody else's beside them."""
    storage = torch.full((*shape[:2], shape[2] + 2, shape[3] + 3), CANARY)
    return storage, storage[:, :, 1:-1, 1:-2]


@pytest.mark.parametrize(("lengths", "dims"), [((65, 100), (40, 24)), ((1, 1), (1, 1)), ((130, 7), (33, 64))], ids=str)
def test_nothing_beside_the_output_is_written(lengths, dims):
    q, k, v = make_qkv("cpu", lengths, dims=dims, heads=(2, 2), dtype=SINGLE)
    storage, out = surrounded((1, 2, lengths[0], dims[1]))
    statistics = torch.full((4, 1, 2, lengths[0]), CANARY)
    lse = torch.full((3, 1, 2, lengths[0]), CANARY)
    cpu.forward(out, lse[1], statistics[1:3], q, k, v, Operands(), Options(scale=0.2))
    assert torch.equal(out, attention(q, k, v, scale=0.2, backend="cpu"))
    out.fill_(CANARY)
    assert (storage == CANARY).all() and (lse[::2] == CANARY).all() and (statistics[::3] == CANARY).all()


def test_elements_further_apart_than_32_bits_count():
    """Addresses of strides beyond 2^31 elements; most of the memory is never touched."""
    torch.use_deterministic_algorithms(False)  # which would fill it
    far = (1 << 31) + 64
    try:
        storage = torch.empty(3 * far, dtype=HALF)
    except RuntimeError:
        pytest.skip("no 13 GB of address space")
    near = torch.randn(3, 2, 40, 16).to(HALF)
    view = storage.as_strided((3, 2, 40, 16), (far, 40 * 16, 16, 1))
    view.copy_(near)
    assert torch.equal(attention(view, view, view, backend="cpu"), attention(near, near, near, backend="cpu"))


@pytest.mark.parametrize("length", [1 << 10, 1 << 12])
def test_memory_grows_with_the_length_and_not_with_its_square(length):
    import resource

    q = torch.randn(1, 1, length, 16)
    attention(q, q, q, causal=True, backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attention(q, q, q, causal=True, softcap=3.0, backend="cpu")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown <= 64 * length * 16 * 4 + (8 << 20)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF], ids=str)
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("lengths", [(1, 40), (40, 40)], ids=str)
def test_what_is_not_finite_goes_where_the_reference_lets_it(lengths, where, bad):
    q, k, v = make_qkv("cpu", lengths, dims=(16, 16), heads=(1, 1), dtype=SINGLE)
    {"q": q, "k": k, "v": v}[where][..., -1, 3] = bad
    for options in ({}, {"causal": True}):
        ours, theirs = (attention(q, k, v, backend=name, **options) for name in ("cpu", "reference"))
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("dtype", [HALF, BFLOAT, SINGLE], ids=DTYPE_NAMES.get)
def test_denormals_are_numbers(dtype):
    tiny = torch.finfo(dtype).tiny
    q, k, v = (x * tiny / 2 for x in make_qkv("cpu", (33, 40), dims=(16, 16), dtype=DOUBLE))
    check_attention(*(x.to(dtype) for x in (q, k, v)), backend="cpu")


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0}, {"window": (3, 1)}], ids=str)
def test_gradients_in_double_precision(backend, options):
    qkv = [x.requires_grad_() for x in make_qkv("cpu", (5, 7), dims=(3, 4), heads=(2, 1), dtype=DOUBLE)]
    learned = [torch.randn(5, 7).double().requires_grad_(), torch.rand(2).double().requires_grad_()]

    def call(q, k, v, bias, slopes):
        return attention(q, k, v, bias=bias, alibi_slopes=slopes, return_lse=True, backend=backend, **options)

    assert torch.autograd.gradcheck(call, (*qkv, *learned))


def test_every_pair_of_widths():
    """Whole vectors, parts of one, and both, on either side."""
    for dim, v_dim in itertools.product((1, 7, 8, 17, 64, 129), (1, 9, 16, 130)):
        q, k, v = make_qkv("cpu", (20, 40), dims=(dim, v_dim), heads=(1, 1), dtype=SINGLE)
        check_attention(q, k, v, backend="cpu", causal=True)


@pytest.mark.parametrize("dim", [320, 576])
def test_heads_wider_than_other_kernels_have(dim):
    q, k, v = make_qkv("cpu", (33, 70), dims=(dim, 512), heads=(2, 1), dtype=SINGLE)
    check_attention(q, k, v, backend="cpu", causal=True)


def test_memory_that_is_missing_is_an_error_and_no_crash():
    library = cpu_library.load()
    assert library.fastattn_cpu_forward.restype is ctypes.c_int
    with pytest.raises(MemoryError, match="fastattn"):
        cpu_library.check(2)

"""What is decided on the host: configurations, strides, grids, 64-bit offsets, precision of float32 products."""

import dataclasses
import functools
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastattn import attention
from fastattn.kernels import config, forward, launch
from fastattn.spec import Operands
from fastattn.testing import check_attention
from tests.support.attention_cases import BFLOAT, HALF, LAYOUTS, SINGLE, make_bias, make_mask, make_qkv, relayout

GPU_ARCHITECTURES = [name for name in config.ARCHITECTURES if name != "interpreter"]


def subprocess_output(source, interpret=True):
    environment = {"PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "1" if interpret else "0", "PATH": ""}
    first = "from tests.support import quick_interpreter; quick_interpreter.install()\n" if interpret else ""
    command = [sys.executable, "-c", first + textwrap.dedent(source)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


class Launches:
    """Catches launches instead of making them: (kernel name, grid, positional arguments)."""

    def __init__(self, monkeypatch):
        self.caught = []

        def getitem(kernel, grid):
            return lambda *args, **options: self.caught.append((kernel.fn.__name__, grid, args))

        for kind in (JITFunction, InterpretedFunction):
            monkeypatch.setattr(kind, "__getitem__", getitem)

    def grids(self):
        return {name: grid for name, grid, _ in self.caught}


# --- Configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("kernel", config.KERNELS)
@pytest.mark.parametrize("architecture", config.ARCHITECTURES)
def test_a_configuration_for_every_head_dim(architecture, kernel, element_size):
    for dim in range(1, 257):
        if kernel in ("dkdv", "dk", "dv") and kernel not in config.key_passes(architecture, dim):
            continue
        chosen = config.lookup(kernel, architecture, dim, element_size)
        assert chosen == config.lookup(kernel, architecture, dim, element_size)
        for block in (chosen.block_m, chosen.block_n):
            assert block & (block - 1) == 0  # tl.arange wants powers of two
        products = kernel not in ("delta", "combine", "append")
        assert not products or min(chosen.block_m, chosen.block_n) >= 16  # tl.dot wants at least 16
        assert chosen.num_warps in (1, 2, 4, 8) and chosen.num_stages >= 1


def test_head_dims_share_the_configuration_of_the_next_table_entry():
    for architecture in GPU_ARCHITECTURES:
        for kernel in ("forward", "dkdv", "dq", "dbias", "decode"):
            by_dim = [config.lookup(kernel, architecture, dim, 2) for dim in (1, 40, 64)]
            assert len(set(by_dim)) == 1


@pytest.mark.parametrize("architecture", GPU_ARCHITECTURES)
def test_tiles_found_through_memory_take_more_stages(architecture):
    for kernel in ("forward", "dkdv", "dq", "decode"):
        usual, indirect = (config.lookup(kernel, architecture, 128, 2, indirect=flag) for flag in (False, True))
        assert indirect == dataclasses.replace(usual, num_stages=2 * usual.num_stages - 1, pipelined=False)


def test_the_next_product_starts_early_where_registers_allow():
    lookup = functools.partial(config.lookup, "forward", "sm_90")
    assert all(lookup(dim, 2).pipelined for dim in (64, 97, 128))
    assert not lookup(256, 2).pipelined and not lookup(128, 4).pipelined
    assert not lookup(128, 2, crowded=True).pipelined and not lookup(128, 2, indirect=True).pipelined
    assert not any(config.lookup(kernel, "sm_90", 128, 2).pipelined for kernel in ("dkdv", "dq", "decode"))


def test_a_mask_of_one_row_has_a_tile_of_its_own():
    for kernel in ("forward", "dq"):
        usual, own = (config.lookup(kernel, "sm_90", 64, 2, one_row=flag) for flag in (False, True))
        assert (own.block_m, own.num_warps) == (usual.block_m // 2, usual.num_warps // 2)
        assert own.pipelined == usual.pipelined
        for others in ({"crowded": True}, {"element_size": 4}, {"head_dim": 128}):
            arguments = {"head_dim": 64, "element_size": 2, "architecture": "sm_90", **others}
            assert config.lookup(kernel, one_row=True, **arguments) == config.lookup(kernel, **arguments)


def test_a_mask_or_bias_that_is_loaded_ahead_keeps_the_tiles_of_plain_attention_where_they_fit():
    others = {("dk", 256): ("mask", "bias"), ("dq", 256): ("mask", "bias"), ("dq", 128): ("mask",)}
    for kernel, dim in (("forward", 256), ("dkdv", 128), ("dk", 256), ("dq", 256), ("dq", 128)):
        usual, crowded = (config.lookup(kernel, "sm_90", dim, 2, crowded=flag) for flag in (False, True))
        for ahead in ("mask", "bias"):
            own = config.lookup(kernel, "sm_90", dim, 2, ahead=ahead)
            assert (own != usual) == (ahead in others.get((kernel, dim), ()))
            assert config.lookup(kernel, "sm_90", dim, 2, crowded=True, ahead=ahead) == crowded


WIDE = torch.zeros(2, 3, 32, 48, dtype=torch.bool)


@pytest.mark.parametrize(
    ("operands", "expected"),
    [
        (Operands(mask=WIDE), 16),
        (Operands(bias=WIDE.bfloat16()), 16),
        (Operands(mask=WIDE[:, :, ::2, 16:]), 16),
        (Operands(mask=WIDE[:, :, :1], bias=WIDE.half()), 16),  # the one row is read as it was
        (Operands(mask=WIDE[..., 1:]), None),  # another address
        (Operands(mask=WIDE.view(2, 3, 48, 32)[..., :31].contiguous()), None),
        (Operands(mask=WIDE.mT), None),
        (Operands(mask=WIDE[:, :, :1]), None),
        (Operands(mask=WIDE, bias=WIDE.half()), None),
        (Operands(mask=WIDE, block_mask=[WIDE]), None),
        (Operands(bias=WIDE.double()), None),
        (Operands(), None),
    ],
)
def test_which_masks_and_biases_are_loaded_ahead(operands, expected):
    assert launch.ahead(torch.zeros(2, 3, 32, 16), operands) == expected


def test_configurations_cannot_be_changed():
    with pytest.raises(AttributeError):
        config.lookup("forward", "sm_90", 64, 2).block_m = 7


def test_an_override_ends_with_its_block():
    ours, other = config.LaunchConfig(16, 16, 4, 1), config.LaunchConfig(32, 32, 4, 1)
    default = config.lookup("dq", "sm_90", 64, 2)
    with config.override(ours):
        assert config.lookup("dq", "sm_90", 64, 2) == ours
        with config.override(other):
            assert config.lookup("forward", "sm_80", 128, 4) == other
        assert config.lookup("dq", "sm_90", 64, 2) == ours
    assert config.lookup("dq", "sm_90", 64, 2) == default
    with pytest.raises(KeyError), config.override(ours):
        raise KeyError
    assert config.lookup("dq", "sm_90", 64, 2) == default


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_the_search_space_holds_what_hopper_uses_and_tiles_beside_it(dim):
    decode = config.search_space("decode", dim)
    assert decode and len(set(decode)) == len(decode)
    for kernel in ("forward", *config.key_passes("sm_90", dim), "dq", "dbias"):
        space = config.search_space(kernel, dim)
        assert len(set(space)) == len(space)
        for crowded in (False, True):
            used = config.lookup(kernel, "sm_90", dim, 2, crowded)
            assert used in space, (kernel, used)
            for name in ("block_m", "block_n", "num_stages"):
                same_but = [dataclasses.replace(c, **{name: getattr(used, name)}) == used for c in space]
                assert sum(same_but) > 1, (kernel, name)


@pytest.mark.parametrize("architecture", config.ARCHITECTURES)
def test_dk_and_dv_have_one_pass_or_one_each(architecture):
    passes = [config.key_passes(architecture, dim) for dim in range(1, 257)]
    assert set(passes) <= {("dkdv",), ("dk", "dv")}
    assert passes == sorted(passes, key=len)


# --- Strides and operands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_a_last_stride_that_is_not_one_is_copied(layout):
    x = relayout(torch.randn(2, 3, 5, 8), layout)
    y = launch.unit_last(x)
    assert torch.equal(x, y) and y.stride(-1) == 1
    assert (y.data_ptr() == x.data_ptr()) == (layout not in ("columns_first", "stepped"))
    assert (y is x) == (x.stride(-1) == 1)


def test_a_single_column_is_never_copied():
    x = torch.randn(2, 3, 5, 8)[..., 3:4]
    assert launch.unit_last(x) is x


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3, 5, 64), 8), ((2, 3, 5, 8), 8), ((2, 3, 5, 59), 1), ((2, 3, 5, 60), 1), ((1, 1, 5, 4), 1)],
    ids=str,
)
def test_the_stride_unit_follows_from_the_layout(shape, expected):
    x = torch.zeros(shape)
    assert launch.stride_unit(x) == expected
    assert launch.stride_unit(torch.zeros(2, 3, 5, 64), x) == expected
    assert launch.stride_unit(x.transpose(1, 2).contiguous().transpose(1, 2)) == expected
    assert launch.stride_unit(torch.zeros(2, 1, 1, 64).expand(2, 3, 5, 64)) == 8


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1000])
def test_the_stride_unit_does_not_follow_from_the_length(length):
    for dim, expected in ((64, 8), (8, 8), (59, 1), (36, 1)):
        assert launch.stride_unit(torch.zeros(2, 3, length, dim)) == expected


@pytest.mark.parametrize("make", [make_mask, make_bias], ids=["mask", "bias"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 3, 1, 7), (2, 1, 5, 1)], ids=str)
def test_masks_and_biases_are_never_copied(make, shape):
    x = make("cpu", shape)
    operand = launch.scores(x, (2, 3, 5, 7))
    assert operand.ptr.data_ptr() == x.data_ptr() and operand.ptr.shape == shape
    assert (operand.strides[2] is None) == (shape[2] == 1), "one row for all queries"
    assert (operand.strides[3] is None) == (shape[3] != 1), "adjacent columns"


def test_without_a_mask_there_is_no_operand():
    assert launch.scores(None, (2, 3, 5, 7)).ptr is None


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
def test_kept_weights_keep_their_expectation(dropout_p):
    assert launch.keep_scale(dropout_p) * (1.0 - dropout_p) == pytest.approx(1.0, rel=2.0**-52)
    assert launch.keep_scale(1.0) == 0.0


# --- Grids ---------------------------------------------------------------------------------------------------------


def test_grids_have_one_dimension_so_that_batch_times_heads_may_exceed_65535(monkeypatch):
    """CUDA's limit on the second and third dimension of a grid; the first goes to 2^31 - 1."""
    launches = Launches(monkeypatch)
    batch, heads, kv_heads, q_len, kv_len = 1100, 64, 16, 100, 200
    q = torch.zeros(1).expand(batch, heads, q_len, 16)
    k, v = (torch.zeros(1).expand(batch, kv_heads, kv_len, 16) for _ in range(2))
    bias = torch.zeros(batch, heads, 1, 1, requires_grad=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # nothing is read
    out = attention(q.requires_grad_(), k, v, bias=bias, backend="triton")
    torch.autograd.grad(out, (q, bias), torch.zeros(1).expand_as(out))

    def programs(kernel, length, block, heads):
        cfg = config.lookup(kernel, launch.architecture(q.device), 16, 4)
        return (-(-length // getattr(cfg, block)) * batch * heads,)

    grids = launches.grids()
    assert grids["forward_kernel"] == programs("forward", q_len, "block_m", heads)
    assert grids["delta_kernel"] == programs("delta", q_len, "block_m", heads)
    assert grids["dq_kernel"] == programs("dq", q_len, "block_m", heads)
    assert grids["dkdv_kernel"] == programs("dkdv", kv_len, "block_n", kv_heads)
    assert grids["dbias_kernel"] == (batch * heads,)
    assert all(65535 < grid[0] < 2**31 for name, grid in grids.items() if name != "dkdv_kernel")


@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (2, 4, 0)], ids=["B=0", "Lq=0", "Lk=0"])
def test_nothing_is_launched_on_an_empty_grid(monkeypatch, sizes):
    launches = Launches(monkeypatch)
    batch, q_len, kv_len = sizes
    q, k, v = (x.requires_grad_() for x in make_qkv("cpu", (q_len, kv_len), batch=batch))
    out = attention(q, k, v, backend="triton")
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    assert all(grid[0] > 0 for _, grid, _ in launches.caught)


def test_one_launch_forward_and_three_backward(monkeypatch):
    launches = Launches(monkeypatch)
    q, k, v = (x.requires_grad_() for x in make_qkv("cpu"))
    out = attention(q, k, v, causal=True, dropout_p=0.1, backend="triton")
    assert [name for name, *_ in launches.caught] == ["forward_kernel"]
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    assert [name for name, *_ in launches.caught[1:]] == ["delta_kernel", "dkdv_kernel", "dq_kernel"]


def tensors_in(arguments):
    """The tensors of all groups."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from tensors_in(x)


def test_inputs_reach_the_kernel_without_a_copy(monkeypatch):
    """Transposed, sliced and expanded tensors with a last stride of 1."""
    launches = Launches(monkeypatch)
    layouts = ("heads_last", "packed", "sliced")
    q, k, v = (relayout(x, layout) for x, layout in zip(make_qkv("cpu"), layouts, strict=True))
    mask, bias = make_mask("cpu", (1, 1, 1, 70)), make_bias("cpu", (2, 33, 1)).expand(2, 33, 70)
    attention(q, k, v, mask=mask, bias=bias, backend="triton")
    ((_, _, args),) = launches.caught
    pointers = {x.data_ptr() for x in tensors_in(args)}
    assert {x.data_ptr() for x in (q, k, v, mask, bias)} <= pointers


# --- float32 products ----------------------------------------------------------------------------------------------


@pytest.fixture
def matmul_precision():
    """PyTorch's own setting, put back after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_tf32_only_where_pytorch_allows_it(monkeypatch, matmul_precision):
    """Half precision has no such choice; float32 is exact unless torch's own switch says otherwise."""
    monkeypatch.setattr(launch, "INTERPRETED", type(launch.INTERPRETED)(False))
    for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("highest", "ieee")):
        matmul_precision(setting)
        assert launch.dot_precision(SINGLE) == expected
        assert {launch.dot_precision(dtype) for dtype in (HALF, BFLOAT)} == {"ieee"}


def test_float32_is_exact_by_default():
    assert launch.dot_precision(SINGLE) == "ieee"


# --- 64-bit offsets ------------------------------------------------------------------------------------------------

# Reserved, not used: a page of memory exists once it is written. So a stride of more than 2^31 elements is real, and a
# kernel that computed it in 32 bits would read NaN or leave the process.
FAR_APART = """
    import mmap
    import torch
    from fastattn.testing import calls, check_attention
    from tests.support import quick_interpreter

    def with_ones_in_place(v):
        v.detach()[..., -1] = 1.0
        return v.detach()

    calls.with_ones = with_ones_in_place  # a copy would have all of the memory that is reserved
    quick_interpreter.install()
    FAR = (1 << 31) + 8
    memory = []

    def far(shape, dim, dtype=torch.float16):
        small = torch.randn(shape) > 0 if dtype == torch.bool else torch.randn(shape).to(dtype)
        strides = list(small.stride())
        strides[dim] = FAR
        extent = sum((n - 1) * s for n, s in zip(shape, strides)) + 1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory.append(mmap.mmap(-1, extent * small.element_size(), flags=flags))
        view = torch.frombuffer(memory[-1], dtype=dtype).as_strided(shape, strides)
        return view.copy_(small)

    for case in {cases!r}:
        for dim in range(4 if case in ("mask", "bias") else 3):
            tensors, options = [torch.randn(2, 2, 2, 16).half() for _ in range(3)], {{}}
            if case in ("mask", "bias"):
                options[case] = far((2, 2, 2, 2), dim, torch.bool if case == "mask" else torch.float32)
            else:
                tensors["qkv".index(case)] = far((2, 2, 2, 16), dim)
            print(case, dim, flush=True)
            check_attention(*tensors, backend="triton", **options)
    print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves memory without using it, as Linux allows")
@pytest.mark.skipif(not launch.INTERPRETED.value, reason="in GPU memory: test_more_elements_than_32_bits_count")
@pytest.mark.parametrize("cases", [("q", "k", "v"), ("mask", "bias")], ids="-".join)
def test_strides_beyond_32_bits(cases):
    """Of the batch, the heads and the rows (and columns of masks); in a process of its own, as a failure may crash."""
    printed = subprocess_output(FAR_APART.format(cases=cases)).splitlines()
    assert printed[-1] == "done" and len(printed) == 1 + sum(4 if case in ("mask", "bias") else 3 for case in cases)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 20 GB of GPU memory")
def test_more_elements_than_32_bits_count(device):
    """Also in the outputs and gradients, which the interpreter cannot show."""
    if torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    torch.use_deterministic_algorithms(False)
    length, dim = (1 << 20) + 64, 64
    q = torch.randn(1, 33, length, dim, dtype=HALF, device=device)  # 2^31 elements and some
    assert q.numel() > 1 << 31
    k = torch.randn(1, 1, 64, dim, dtype=HALF, device=device)
    q.requires_grad_()
    out = attention(q, k, k, backend="triton")
    (dq,) = torch.autograd.grad(out, q, out.detach())
    last = q.detach()[:, -1:, -64:]
    check_attention(last, k, k, backend="triton")
    leaf = last.clone().requires_grad_()
    alone = attention(leaf, k, k, backend="triton")
    assert torch.equal(out[:, -1:, -64:], alone)
    assert torch.equal(dq[:, -1:, -64:], torch.autograd.grad(alone, leaf, alone.detach())[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what the compiler made: nothing without a GPU")
def test_a_new_length_compiles_nothing(device):
    """test_ops.py asks the compiler's cache key; this looks into the cache."""

    def compiled():
        return sum(len(cache[0]) for cache in forward.forward_kernel.device_caches.values())

    for length in (2, 100):
        attention(*make_qkv(device, (length, length)), backend="triton")
    before = compiled()
    for length in (3, 16, 17, 64, 255, 1024, 4097):
        attention(*make_qkv(device, (length, length)), backend="triton")
    assert compiled() == before

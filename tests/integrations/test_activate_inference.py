"""What PyTorch hands through in inference under `activate`: keys in use, pages, slopes, splits.

The operators of CUDA, on CPU tensors.
"""

import inspect

import pytest
import torch
from torch.library import Library
from torch.nn.attention import varlen
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from fastattn import attention_varlen
from fastattn.integrations.activate import _Flash
from tests.support.layer_checks import assert_parity

PAGED = inspect.signature(varlen_attn).parameters.keys() >= {"block_table", "seqused_k", "num_splits"}
needs_paged = pytest.mark.skipif(not PAGED, reason=f"varlen_attn of torch {torch.__version__} takes no block_table")
TAKEN = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}


def needs_pages(case):
    reason = f"the operator of torch {torch.__version__} takes no block_table"
    return pytest.param(case, marks=pytest.mark.skipif("block_table" not in TAKEN, reason=reason))


STARTS_Q, USED = torch.tensor([0, 1, 7, 7]).int(), torch.tensor([13, 21, 4]).int()
TABLE = torch.tensor([[5, 1, -1], [0, 3, 4], [2, -1, -1]]).int()
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])


def make_pages():
    """Queries (total, H, D), pages of keys and values, and the keys of each sequence one behind the other."""
    q, (k, v) = torch.randn(7, 4, 16), torch.randn(2, 6, 8, 2, 16)
    packed = [
        torch.cat([x[row[: -(-n // 8)].long()].flatten(0, 1)[:n] for row, n in zip(TABLE, USED, strict=True)])
        for x in (k, v)
    ]
    starts_k = torch.nn.functional.pad(USED.cumsum(0), (1, 0)).int()
    return (q, k, v), (q, *packed, STARTS_Q, starts_k)


def assert_right(out, lse, packed, **options):
    """Against the specification, packed."""
    q, k, v, *starts = packed
    exact = attention_varlen(
        *(x.double() for x in (q, k, v)), *starts, backend="reference", return_lse=True, **options
    )  # fmt: skip
    eager = attention_varlen(q, k, v, *starts, backend="reference", return_lse=True, **options)
    for name, ours, right, peer in zip(("out", "lse"), (out, lse), exact, eager, strict=True):
        rows = right.isfinite()
        assert torch.equal(ours.isfinite(), rows)
        assert_parity(ours[rows], right[rows], peer[rows], name, intermediate=right[rows].abs().max())


def kernels_for_cpu(backend):
    """PyTorch's CUDA operators have no kernels for CPU: ours take the place."""
    library = Library("aten", "IMPL", "CPU")
    for name, kernel in _Flash(backend).tables()["CUDA"].items():
        library.impl(name, kernel, "CPU")
    yield torch.ops.aten
    library._destroy()


@pytest.fixture(params=["reference", "triton"])
def operators(request):
    yield from kernels_for_cpu(request.param)


@needs_paged
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0)], ids=["full", "causal", "window"])
def test_paged_varlen_attn(operators, window, splits):
    inputs, packed = make_pages()
    arguments = (*inputs, STARTS_Q, None, 6, 24)
    options = {
        "window_size": window, "enable_gqa": True, "seqused_k": USED, "block_table": TABLE, "num_splits": splits,
        "return_aux": AuxRequest(lse=True),
    }  # fmt: skip
    out, lse = varlen_attn(*arguments, **options)
    left, right = (None if side == -1 else side for side in window)
    assert_right(out, lse, packed, window=(left, right))
    given = torch.full_like(out, torch.nan)
    result, again = varlen.varlen_attn_out(given, *arguments, **options)
    assert result is given and torch.equal(given, out) and torch.equal(again, lse)


@needs_paged
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_varlen_attn_over_the_keys_in_use(operators, causal):
    """Keys with room behind them, which may hold anything."""
    (q, *_), (_, k, v, *_) = make_pages()
    room = USED.long() + torch.tensor([0, 3, 5])
    starts = torch.nn.functional.pad(room.cumsum(0), (1, 0)).int()
    inside = torch.cat([torch.arange(n) for n in room]) < USED.repeat_interleave(room)
    wide = [torch.full((int(starts[-1]), 2, 16), torch.nan).masked_scatter(inside[:, None, None], x) for x in (k, v)]
    options = {"window_size": (-1, 0 if causal else -1), "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
    out, lse = varlen_attn(q, *wide, STARTS_Q, starts, 6, 26, seqused_k=USED, num_splits=1, **options)
    packed_starts = torch.nn.functional.pad(USED.cumsum(0), (1, 0)).int()
    assert_right(out, lse, (q, k, v, STARTS_Q, packed_starts), causal=causal)


@pytest.mark.parametrize("layout", [needs_pages("pages"), "packed", "lengths", "plain"])
def test_the_cuda_operator_with_slopes(operators, layout):
    """Also entries of one shape, of which the first keys are in use."""
    (q, k, v), packed = make_pages()
    options = {"alibi_slopes": SLOPES}
    if layout in ("lengths", "plain"):
        q, (k, v) = torch.randn(2, 3, 4, 16), torch.randn(2, 2, 9, 2, 16)
        used = torch.tensor([9, 9] if layout == "plain" else [4, 9]).int()
        keys = [torch.cat([x[b, :n] for b, n in enumerate(used)]) for x in (k, v)]
        starts = (torch.arange(3).int() * 3, torch.nn.functional.pad(used.cumsum(0), (1, 0)).int())
        packed = (q.flatten(0, 1), *keys, *starts)
        arguments = (q, k, v, None, None, 3, 9)
        options |= {} if layout == "plain" else {"seqused_k": used}
    elif layout == "pages":
        arguments = (q, k, v, STARTS_Q, packed[-1], 6, 24)
        options |= {"seqused_k": USED, "block_table": TABLE}
    else:
        arguments = (*packed, 6, 21)
    out, lse, *_ = operators._flash_attention_forward(*arguments, 0.0, True, False, **options)
    if out.ndim == 4:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
    assert_right(out, lse, packed, causal=True, alibi_slopes=SLOPES)


@pytest.mark.parametrize("name", ["seqused_k", "alibi_slopes", needs_pages("block_table")])
def test_no_gradient_beside_what_its_operator_is_not_told(name, operators):
    (q, k, v), packed = make_pages()
    options = {"alibi_slopes": SLOPES} if name == "alibi_slopes" else {"seqused_k": USED}
    if name == "block_table":
        options |= {"block_table": TABLE}
        arguments = (q.requires_grad_(), k, v, STARTS_Q, packed[-1], 6, 24)
    else:
        arguments = (packed[0].requires_grad_(), *packed[1:], 6, 21)
    with pytest.raises(ValueError, match="expected none where a gradient is asked for"):
        operators._flash_attention_forward(*arguments, 0.0, True, False, **options)
    with torch.no_grad():
        operators._flash_attention_forward(*arguments, 0.0, True, False, **options)


UNSERVED = {
    "return_debug_mask": ({"return_debug_mask": True}, "return_debug_mask: expected none while fastattn serves"),
    "pages without lengths": ({"block_table": torch.zeros(1, 1).int()}, "seqused_k: expected how many keys"),
    "dropout over pages": (
        {"block_table": torch.zeros(1, 1).int(), "seqused_k": torch.tensor([3]).int(), "dropout_p": 0.1},
        "dropout_p: expected none while fastattn serves",
    ),
    "no starts of the keys": (
        {"query": torch.randn(4, 2, 8), "cum_seq_q": torch.tensor([0, 4]).int()},
        "cum_seq_k: expected a Tensor, since the keys are packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_is_an_error(name):
    q, (options, message) = torch.randn(1, 4, 2, 8), UNSERVED[name]
    arguments = {
        "query": q, "key": q, "value": q, "cum_seq_q": None, "cum_seq_k": None, "max_q": 4, "max_k": 4,
        "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _Flash("reference").forward(**arguments | options)

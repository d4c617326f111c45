"""Check a call on several ranks: each rank checks its own arguments, then all compare theirs."""

import itertools
import zlib
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.block_mask import BlockMask, check_block_mask
from fastattn.distributed.blocks import seen_tiles
from fastattn.distributed.comm import Header, Ranks
from fastattn.distributed.cost import STRATEGIES
from fastattn.distributed.layout import Balance, Documents, check_balance, length_of, pieces
from fastattn.spec import AttentionSpec, make_spec
from fastattn.spec.checks import FLOAT_DTYPES, MAX_POSITION, autocast, check_kv_start

BY_HEADS = "the second dimension of the mesh divides heads"


def check_how(strategy: str | None, balance: str) -> None:
    """Raise ValueError unless the strategy and the balance exist."""
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))} or None, got {strategy!r}")
    check_balance(balance)


def check_own(
    q: Tensor, k: Tensor, v: Tensor, peers: Ranks, strategy: str | None, balance: str, backend: str | None,
    given: dict[str, Any],
) -> tuple[AttentionSpec, Documents | None]:  # fmt: skip
    """(this rank's call, where documents lie), or the error that its arguments deserve; without a message."""
    check_how(strategy, balance)
    options = dict(given)
    q, k, v = autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
    offset = {"q_offset": 0 if options["q_offset"] is None else options["q_offset"]}
    documents, kv_start = None, options.pop("kv_start")
    if options["cu_seqlens_q"] is not None:
        spec, documents = _check_documents(q, k, v, options)
    else:
        for name in ("cu_seqlens_k", "seqused_k"):
            if options[name] is not None:
                raise ValueError(f"{name}: expected None without cu_seqlens_q, got a {type(options[name]).__name__}")
        if balance == "documents":
            raise ValueError(
                "balance: expected 'contiguous', 'zigzag' or 'striped' without cu_seqlens_q, got 'documents'"
            )
        block_mask = options.pop("block_mask")
        make_spec(q, k, v, **{**options, "mask": None, "bias": None, **offset})
        # Operands cover all keys, but this rank does not know their number: take it from the operands. Ranks compare it
        # later.
        width = _width(options)
        wide = (_of_length(x, 1 if width < 0 else width) for x in (k, v))
        spec = make_spec(q, *wide, **{**options, **offset})._replace(k=k, v=v, block_mask=block_mask)
        if block_mask is not None:  # it has the whole's lengths, which this rank does not know yet
            q_len, kv_len = block_mask.shape[2:] if isinstance(block_mask, BlockMask) else (0, 0)
            check_block_mask(block_mask, (q.shape[0], q.shape[1], q_len, kv_len), q.device)
    if kv_start is not None:  # it counts the whole's keys, whose number is not known yet
        entries = q.shape[0] if documents is None else len(documents.queries) - 1
        spec = spec._replace(kv_start=check_kv_start(kv_start, entries, q, MAX_POSITION))
    if strategy == "ulysses" and peers.inner is not None:
        raise ValueError(f"strategy: expected 'ring', 'all_gather' or None, got 'ulysses'; {BY_HEADS}")
    if strategy != "ulysses":
        backends.choose(spec._replace(return_lse=True), backend)
    return spec, documents


def _of_length(x: Tensor, length: int) -> Tensor:
    """A tensor with this many tokens, for checks."""
    return x.new_empty(1).expand(*x.shape[:2], length, x.shape[3])


def _check_documents(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[AttentionSpec, Documents]:  # fmt: skip
    if options["cu_seqlens_k"] is None:
        options = {**options, "cu_seqlens_k": options["cu_seqlens_q"]}
    make_spec(q, k, v, scale=options["scale"])
    if q.shape[0] != 1:
        raise ValueError(f"q.shape[0]: expected 1 with cu_seqlens_q, all documents in one row, got {q.shape[0]}")
    for name in ("mask", "block_mask", "bias"):
        if options[name] is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens_q, got a {type(options[name]).__name__}")
    given = [options[name] for name in ("cu_seqlens_q", "cu_seqlens_k")]
    ends = [int(x[-1]) if isinstance(x, Tensor) and x.ndim == 1 and x.numel() else 0 for x in given]
    spec = make_spec(*(_of_length(x, end) for x, end in zip((q, k, v), (*ends, ends[1]), strict=True)), **options)
    documents = Documents(*(tuple(x.tolist()) for x in given))
    if spec.seqused_k is not None:  # on a GPU it has not been checked, and is cut as the kernels do
        room = (end - start for start, end in itertools.pairwise(documents.keys))
        used = zip(spec.seqused_k.tolist(), room, strict=True)
        documents = documents._replace(used=tuple(min(max(count, 0), most) for count, most in used))
    return spec._replace(q=q, k=k, v=v), documents


def _width(options: dict[str, Any]) -> int:
    """The number of keys of mask and bias; -1 if they do not tell."""
    for name in ("mask", "bias"):
        x = options[name]
        if isinstance(x, Tensor) and x.ndim and x.shape[-1] != 1:
            return x.shape[-1]
    return -1


def numbers_of(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> list[int]:
    """Sizes and dtype, for `check_together`."""
    dtype = FLOAT_DTYPES.index(spec.q.dtype)
    return [*q.shape, k.shape[1], k.shape[2], v.shape[3], dtype, _width(options)]


def describe(
    spec: AttentionSpec, documents: Documents | None, strategy: str | None, balance: str, options: dict[str, Any]
) -> str:
    """The settings, beside shapes, that must be the same on every rank."""
    names = ("causal", "window", "softcap", "scale", "dropout_p", "return_lse")
    parts = [f"strategy={strategy!r}", f"balance={balance!r}", *(f"{name}={options[name]!r}" for name in names)]
    tensors = {"mask": spec.mask, "bias": spec.bias, "alibi_slopes": spec.alibi_slopes, "sinks": spec.sinks}
    parts += [name for name, x in tensors.items() if x is not None]
    if spec.block_mask is not None:
        parts.append(str(seen_tiles(spec.block_mask)))
    values = {"q_offset": spec.q_offset_tensor, "kv_start": spec.kv_start}
    of_all: dict[str, Any] = {name: x.tolist() for name, x in values.items() if x is not None}
    if documents is not None:
        of_all["documents"] = tuple(documents)
    if spec.q_offset_tensor is None:
        parts.append(f"q_offset={options['q_offset']!r}")
    parts += [f"{name} {zlib.crc32(repr(x).encode()):08x}" for name, x in of_all.items()]
    if torch.is_grad_enabled():
        tensors |= {"q": spec.q, "k": spec.k, "v": spec.v}
        parts += [f"{name}.requires_grad" for name, x in tensors.items() if x is not None and x.requires_grad]
    return ", ".join(parts)


def check_together(headers: list[Header], balance: Balance, documents: Documents | None) -> tuple[int, int]:
    """(number of all queries, number of all keys); every rank raises the same error."""
    first, words = headers[0]
    shape = [0, 1, 2, 4, 5, 7, 8]  # all sizes but lengths
    for rank, (their, said) in enumerate(headers):
        if [their[i] for i in shape] != [first[i] for i in shape]:
            raise ValueError(
                f"q, k, v: expected the same sizes, except lengths, on every rank, got {_shapes(first)} on rank 0 and "
                f"{_shapes(their)} on rank {rank}"
            )
        if said != words:
            raise ValueError(
                f"expected the same options on every rank, got {words} on rank 0 and {said} on rank {rank}"
            )
    totals = []
    of_both = (None, None) if documents is None else (documents.queries, documents.keys)
    for name, column, starts in zip("qk", (3, 6), of_both, strict=True):
        lengths = [their[column] for their, _ in headers]
        if starts is not None and starts[-1] > sum(lengths):
            raise ValueError(
                f"cu_seqlens_{name}: expected at most {sum(lengths)}, the tokens of all ranks, at the end, "
                f"got {starts[-1]}"
            )
        expected = [length_of(own) for own in pieces(balance, sum(lengths), len(headers), starts)]
        if lengths != expected:
            raise ValueError(
                f"{name}.shape[2]: expected {expected} tokens on ranks 0 to {len(lengths) - 1} with "
                f"balance={balance!r}, got {lengths}; fastattn.distributed.shard cuts them so"
            )
        totals.append(sum(lengths))
    for rank, (their, _) in enumerate(headers):
        if their[9] not in (-1, totals[1]):
            raise ValueError(
                f"mask, bias: expected all {totals[1]} keys in the last dimension, got {their[9]} on rank {rank}"
            )
    return totals[0], totals[1]


def _shapes(numbers: list[int]) -> str:
    _, batch, q_heads, q_len, dim, kv_heads, kv_len, v_dim, dtype, _ = numbers
    name = str(FLOAT_DTYPES[dtype]).removeprefix("torch.")
    q, k, v = (batch, q_heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, v_dim)
    return f"q {q} k {k} v {v} {name}"

"""Attention over a sequence that is divided among ranks: the public function, and what every rank agrees on first."""

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastattn import backends, ops
from fastattn.block_mask import BlockMask, check_block_mask
from fastattn.distributed import ring, ulysses
from fastattn.distributed.blocks import seen_tiles
from fastattn.distributed.comm import Ranks
from fastattn.distributed.cost import STRATEGIES, Choice, Link, Sizes, Strategy, costs, routes_of, rows_of
from fastattn.distributed.layout import Balance, Piece, Starts, View, check_balance, joined, length_of, pieces, relation
from fastattn.functional import Backend, keywords
from fastattn.spec import AttentionSpec, make_spec
from fastattn.spec.checks import FLOAT_DTYPES, autocast, check_window


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    strategy: Strategy | None = None,
    balance: Balance = "contiguous",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    q_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
    link: Link | None = None,
    timeout: float | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastattn.attention` over a sequence whose tokens are divided among the ranks of a mesh dimension.

    Every rank calls it with its part, as `shard` cuts it, and gets the output of its own queries. Positions, window and
    ``q_offset`` are those of the whole. Differentiable once: every rank must run the backward pass. Gradients of q, k
    and v are complete; those of ``bias``, ``alibi_slopes`` and ``sinks`` are this rank's rows' part, so that data
    parallelism adds them up as those of any parameter. Sums have one order: the same call gives the same bits.

    Args:
        q: (B, Hq, Lq, D), this rank's queries.
        k: (B, Hk, Lk, D), this rank's keys; Lk may differ from Lq.
        v: (B, Hk, Lk, Dv).
        mesh: one dimension, `mesh["cp"]` of a larger mesh; or two, `mesh["ring", "heads"]`: along the second, best
            within a machine, tokens and heads change places, along the first goes the strategy, for some of the heads.
        strategy: ``"ring"`` passes keys and values on while it computes; ``"all_gather"`` sends them to every rank that
            needs them at once; ``"ulysses"`` exchanges tokens for heads. None chooses, as `explain` shows.
        balance: how tokens are divided: ``"contiguous"``; ``"zigzag"`` or ``"striped"``, which give all ranks the same
            work under causal order; ``"documents"``, which does so within packed documents.
        cu_seqlens_q: int32 or int64 (documents + 1,), where each packed document begins, and the end of the last, of
            the whole and the same on every rank; B is 1. Then all counts within documents, as in `attention_varlen`;
            ``alibi_slopes`` may be (documents, Hq), and there is no ``mask``, ``block_mask`` or ``bias``. Shards may
            cut documents.
        cu_seqlens_k: likewise for the keys; None means ``cu_seqlens_q``.
        causal, window, softcap, scale, return_lse: as in `fastattn.attention`.
        q_offset: position of query 0 of the whole; None is the whole's Lk - Lq.
        mask: bool, broadcastable to (B, Hq, Lq, whole Lk): this rank's rows, all keys in the order of the whole.
        block_mask: `fastattn.BlockMask` of the whole, (B or 1, Hq or 1, whole Lq, whole Lk), the same on every rank, in
            the order of the whole whatever the shards. Make it once: what a rank needs of it is kept with it. Keys go
            only to ranks whose rows have a tile with them that is not empty.
        bias: float, as ``mask``.
        alibi_slopes: float (Hq,) or (B, Hq); with ``"striped"`` shards only by ``"ulysses"``.
        sinks: float (Hq,).
        dropout_p: as there. The seed is the one that the first rank draws, and a weight's bits are those of its place
            in the whole: the same on any number of ranks. Every rank draws, so generators that were alike stay so.
        backend: as there, for the pairs of pieces; ``"ring"`` and ``"all_gather"`` need one that returns lse.
        link: what the choice assumes of the machines.
        timeout: seconds to wait for a message; None is the process group's own.

    Returns:
        out (B, Hq, Lq, Dv) in the dtype of q; with ``return_lse`` also lse (B, Hq, Lq).

    Raises:
        TypeError, ValueError: as `fastattn.attention`; on every rank where ranks differ in shapes or options, before
            keys are sent.
        RuntimeError: another rank raised, ended or made another call; it is named.
    """
    if unknown:
        keywords.refuse(context_parallel_attention, unknown)
    return attention_of_heads(
        0, q, k, v, mesh=mesh, strategy=strategy, balance=balance, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, causal=causal, q_offset=q_offset, window=window, mask=mask,
        block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
        dropout_p=dropout_p, return_lse=return_lse, backend=backend, link=link, timeout=timeout,
    )  # fmt: skip


def attention_of_heads(
    first: int, q: Tensor, k: Tensor, v: Tensor, *, mesh: DeviceMesh, strategy: Strategy | None, balance: Balance,
    link: Link | None, timeout: float | None, backend: Backend | None = None, **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`context_parallel_attention` of the query heads from ``first`` on, the other ones being other meshes'.

    They drop what they drop in one call with all of them, if the generators of all processes are alike.
    """
    how = ("mesh", "strategy", "balance", "link", "timeout", "backend")
    defaults = {name: x for name, x in (context_parallel_attention.__kwdefaults__ or {}).items() if name not in how}
    call = _agree(q, k, v, mesh, strategy, balance, link, timeout, backend, **{**defaults, **options})
    out, lse = _run(call, backend, first)
    return (out, lse) if options.get("return_lse") and lse is not None else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    strategy: Strategy | None = None,
    balance: Balance = "contiguous",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    q_offset: int | None = None,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    block_mask: BlockMask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: Backend | None = None,
    link: Link | None = None,
    timeout: float | None = None,
    **unknown: Any,
) -> Choice:
    """Which strategy `context_parallel_attention` takes for the same arguments, and what each would cost.

    Every rank calls it: they exchange their shapes, and nothing else. ``str()`` of the result is a table.
    """
    if unknown:
        keywords.refuse(explain, unknown)
    return _agree(
        q, k, v, mesh, strategy, balance, link, timeout, backend, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, causal=causal, q_offset=q_offset, window=window, mask=mask,
        block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, scale=scale,
        dropout_p=dropout_p, return_lse=return_lse,
    ).choice  # fmt: skip


def _run(call: "_Call", backend: str | None, first_head: int) -> tuple[Tensor, Tensor | None]:
    peers = call.peers

    def over_all_keys(spec: AttentionSpec, head: int) -> tuple[Tensor, Tensor | None]:
        seed = None if call.seed is None else ops.seed_of_part(call.seed, head=first_head + head)
        return ops.attention(spec, backends.choose(spec, backend), seed)

    def over_rows_of_the_mesh(spec: AttentionSpec, head: int) -> tuple[Tensor, Tensor]:
        spec = spec._replace(return_lse=True)
        plan = ring.Plan(
            peers.outer, call.choice.strategy, rows_of(call.sizes), routes_of(call.sizes), call.sizes.view,
            spec.options, backends.choose(spec, backend), call.seed, spec.q.device,
            first_head + head, spec.block_mask,
        )  # fmt: skip
        return ring.run(plan, spec)

    if call.choice.strategy == "ulysses":
        return ulysses.run(peers.outer, call.rows, call.keys, call.spec, over_all_keys)
    if peers.inner is None:
        return over_rows_of_the_mesh(call.spec, 0)
    row = peers.row(peers.outer.rank)
    rows, keys = (joined(x[row])[1] for x in (call.rows, call.keys))
    return ulysses.run(peers.inner, rows, keys, call.spec, over_rows_of_the_mesh)


class _Call(NamedTuple):
    peers: Ranks
    spec: AttentionSpec
    """this rank's tensors; window and q_offset of the whole"""
    rows: list[list[Piece]]
    keys: list[list[Piece]]
    sizes: Sizes
    choice: Choice
    seed: Tensor | None
    """of dropout"""


def _agree(
    q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, strategy: Strategy | None, balance: Balance, link: Link | None,
    timeout: float | None, backend: str | None, **options: Any,
) -> _Call:  # fmt: skip
    """Check this rank's arguments, then those of all ranks against each other: all go on, or all raise."""
    peers = Ranks(mesh, timeout)
    problem: Exception | None = None
    spec, documents, numbers, text, seed = None, None, [0] * 10, "", 0
    try:
        spec, documents = _check(q, k, v, peers, strategy, balance, backend, options)
        numbers = [1, *_numbers(spec, q, k, v, options)]
        text = _describe(spec, documents, strategy, balance, options)
        seed = int(ops.draw_seed(q.device)) if spec.dropout_p else 0
    except Exception as error:
        problem, text = error, f"{type(error).__name__}: {error}"
    headers, seed = peers.agree(numbers, text, seed)
    if problem is not None:
        raise problem
    for rank, (their, words) in enumerate(headers):
        if their[0] == 0:
            raise RuntimeError(f"context parallel, {peers}: rank {rank} raised {words}")
    assert spec is not None
    q_total, kv_total = _check_together(headers, balance, documents)
    tiles = None if spec.block_mask is None else seen_tiles(spec.block_mask)
    view = View(options["q_offset"], *check_window(options["window"], options["causal"]), documents, tiles)
    if documents is None:
        if spec.block_mask is not None:
            check_block_mask(spec.block_mask, (q.shape[0], q.shape[1], q_total, kv_total), q.device)
        offset = kv_total - q_total if view.q_offset is None else view.q_offset
        view = view._replace(q_offset=offset)
        pair = relation(Piece(0, q_total), Piece(0, kv_total), offset, view.left, view.right)
        if pair is not None:  # a side that forbids nothing is open
            view = view._replace(left=pair.left, right=pair.right)
    spec = spec._replace(left=view.left, right=view.right, q_offset=view.q_offset)
    of_all = torch.tensor([seed], device=q.device) if spec.dropout_p else None
    scores = sum(x.element_size() for x in (spec.bias, spec.mask) if x is not None)
    batch, q_heads, _, head_dim = q.shape
    sizes = Sizes(
        peers.size, balance, batch, q_heads, k.shape[1], q_total, kv_total, head_dim, v.shape[3],
        spec.q.element_size(), view, scores * batch * q_heads * q_total * kv_total, peers.width,
    )  # fmt: skip
    of_both = documents or (None, None)
    rows, keys = (
        pieces(balance, total, peers.size, own) for total, own in zip((q_total, kv_total), of_both, strict=True)
    )  # fmt: skip
    return _Call(peers, spec, rows, keys, sizes, _choose(sizes, link or Link(), strategy, spec), of_all)


def check_how(strategy: str | None, balance: str) -> None:
    """Raise ValueError unless there are such."""
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))} or None, got {strategy!r}")
    check_balance(balance)


def _check(
    q: Tensor, k: Tensor, v: Tensor, peers: Ranks, strategy: str | None, balance: str, backend: str | None,
    given: dict[str, Any],
) -> tuple[AttentionSpec, tuple[Starts, Starts] | None]:  # fmt: skip
    check_how(strategy, balance)
    options = dict(given)
    if isinstance(options["q_offset"], Tensor):
        raise TypeError("q_offset: expected an int or None where the sequence is divided, got a Tensor")
    q, k, v = autocast(q, k, v)  # pyright: ignore[reportAssignmentType]
    offset = {"q_offset": options["q_offset"] or 0}
    documents = None
    if options["cu_seqlens_q"] is not None:
        spec, documents = _check_documents(q, k, v, options)
    else:
        if options["cu_seqlens_k"] is not None:
            raise ValueError("cu_seqlens_k: expected None without cu_seqlens_q, got a Tensor")
        if balance == "documents":
            raise ValueError(
                "balance: expected 'contiguous', 'zigzag' or 'striped' without cu_seqlens_q, got 'documents'"
            )
        block_mask = options.pop("block_mask")
        make_spec(q, k, v, **{**options, "mask": None, "bias": None, **offset})
        # The operands are checked against all keys: as many as they have, which the ranks then compare.
        width = max(_width(options), 1)
        wide = (_of_length(x, width) for x in (k, v))
        spec = make_spec(q, *wide, **{**options, **offset})._replace(k=k, v=v, block_mask=block_mask)
        if block_mask is not None:  # its lengths are those of the whole, which are not known yet
            q_len, kv_len = block_mask.shape[2:] if isinstance(block_mask, BlockMask) else (0, 0)
            check_block_mask(block_mask, (q.shape[0], q.shape[1], q_len, kv_len), q.device)
    if strategy == "ulysses" and peers.inner is not None:
        raise ValueError(f"strategy: expected 'ring', 'all_gather' or None, got 'ulysses'; {_BY_HEADS}")
    routed = strategy in ("ring", "all_gather") or peers.inner is not None
    if balance == "striped" and spec.alibi_slopes is not None and peers.size > 1 and routed:
        raise ValueError(f"alibi_slopes: expected None with striped shards and strategy {strategy!r}; {_STRIPED_ALIBI}")
    if strategy != "ulysses":
        backends.choose(spec._replace(return_lse=True), backend)
    return spec, documents


def _of_length(x: Tensor, length: int) -> Tensor:
    """A tensor for checks, with as many tokens."""
    return x.new_empty(1).expand(*x.shape[:2], length, x.shape[3])


def _check_documents(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> tuple[AttentionSpec, tuple[Starts, Starts]]:
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
    starts = (tuple(x.tolist()) for x in given)
    return spec._replace(q=q, k=k, v=v), (next(starts), next(starts))


_BY_HEADS = "the second dimension of the mesh divides heads"
_STRIPED_ALIBI = "distances in stripes are no multiples of one slope: take 'ulysses', or zigzag shards"


def _width(options: dict[str, Any]) -> int:
    """How many keys mask and bias have; -1 if they do not say."""
    for name in ("mask", "bias"):
        x = options[name]
        if isinstance(x, Tensor) and x.ndim and x.shape[-1] != 1:
            return x.shape[-1]
    return -1


def _numbers(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> list[int]:
    dtype = FLOAT_DTYPES.index(spec.q.dtype)
    return [*q.shape, k.shape[1], k.shape[2], v.shape[3], dtype, _width(options)]


def _describe(spec: AttentionSpec, documents: Any, strategy: str | None, balance: str, options: dict[str, Any]) -> str:
    """What must be the same on every rank, beside shapes."""
    names = ("causal", "window", "q_offset", "softcap", "scale", "dropout_p", "return_lse")
    parts = [f"strategy={strategy!r}", f"balance={balance!r}", *(f"{name}={options[name]!r}" for name in names)]
    tensors = {"mask": spec.mask, "bias": spec.bias, "alibi_slopes": spec.alibi_slopes, "sinks": spec.sinks}
    parts += [name for name, x in tensors.items() if x is not None]
    if spec.block_mask is not None:
        parts.append(str(seen_tiles(spec.block_mask)))
    if documents is not None:
        parts.append(f"documents {zlib.crc32(repr(documents).encode()):08x}")
    if torch.is_grad_enabled():
        tensors |= {"q": spec.q, "k": spec.k, "v": spec.v}
        parts += [f"{name}.requires_grad" for name, x in tensors.items() if x is not None and x.requires_grad]
    return ", ".join(parts)


def _check_together(
    headers: list[tuple[list[int], str]], balance: Balance, documents: tuple[Starts, Starts] | None
) -> tuple[int, int]:
    """(all queries, all keys); raises the same on every rank."""
    first, words = headers[0]
    shape = [0, 1, 2, 4, 5, 7, 8]  # all but lengths
    for rank, (their, said) in enumerate(headers):
        if [their[i] for i in shape] != [first[i] for i in shape]:
            raise ValueError(
                f"q, k, v: expected the same sizes but for lengths on every rank, got {_shapes(first)} on rank 0 and "
                f"{_shapes(their)} on rank {rank}"
            )
        if said != words:
            raise ValueError(
                f"expected the same options on every rank, got {words} on rank 0 and {said} on rank {rank}"
            )
    totals = []
    for name, column, starts in zip("qk", (3, 6), documents or (None, None), strict=True):
        lengths = [their[column] for their, _ in headers]
        if starts is not None and starts[-1] > sum(lengths):
            raise ValueError(
                f"cu_seqlens_{name}: expected to end at the {sum(lengths)} tokens of all ranks or before, "
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


def _choose(sizes: Sizes, link: Link, strategy: str | None, spec: AttentionSpec) -> Choice:
    refused: dict[str, str] = {}
    if sizes.balance == "striped" and spec.alibi_slopes is not None and sizes.ranks > 1:
        refused.update((name, _STRIPED_ALIBI) for name in ("ring", "all_gather"))
    if sizes.width > 1:
        refused["ulysses"] = _BY_HEADS
    found = costs(sizes, link)
    possible = [name for name in STRATEGIES if name not in refused]
    chosen = strategy or min(possible, key=lambda name: (found[name].seconds, found[name].memory))
    parts = [
        f"{sizes.ranks} ranks, {sizes.balance}; whole q {(sizes.batch, sizes.q_heads, sizes.q_len, sizes.head_dim)} "
        f"k {(sizes.batch, sizes.kv_heads, sizes.kv_len, sizes.head_dim)} {str(spec.q.dtype).removeprefix('torch.')}"
    ]
    view = sizes.view
    if view.left is not None or view.right is not None:
        parts.append("causal" if spec.causal else f"window ({view.left}, {view.right})")
        parts.append(f"q_offset={view.q_offset}")
    if view.documents is not None:
        parts.append(f"{len(view.documents[0]) - 1} documents")
    if spec.block_mask is not None:
        parts.append(f"block mask, {spec.block_mask.sparsity:.1%} of its tiles empty")
    return Choice(chosen, found, refused, ", ".join(parts), link, strategy is not None)

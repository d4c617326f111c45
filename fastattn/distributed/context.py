"""Attention over a sequence that is divided among ranks: the public functions, which choose a strategy and run it."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastattn import backends, ops
from fastattn.block_mask import BlockMask, check_block_mask
from fastattn.distributed import ring, ulysses
from fastattn.distributed.agreement import BY_HEADS, check_own, check_together, describe, numbers_of
from fastattn.distributed.blocks import seen_tiles
from fastattn.distributed.comm import Ranks
from fastattn.distributed.cost import STRATEGIES, Choice, Link, Sizes, Strategy, costs, routes_of, rows_of
from fastattn.distributed.layout import Balance, Piece, View, joined, pieces, relation
from fastattn.functional import Backend, keywords
from fastattn.spec import AttentionSpec
from fastattn.spec.checks import check_kv_start, check_window


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
    seqused_k: Tensor | None = None,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_start: Tensor | None = None,
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
    ``q_offset`` refer to the whole sequence. The result is differentiable once, and every rank must run the backward
    pass. Gradients of q, k and v are complete. Those of ``bias``, ``alibi_slopes`` and ``sinks`` come from this rank's
    rows only, so that data parallelism sums them like those of any parameter. Sums have a fixed order: the same call
    gives the same bits.

    Args:
        q: (B, Hq, Lq, D), this rank's queries.
        k: (B, Hk, Lk, D), this rank's keys; Lk may differ from Lq.
        v: (B, Hk, Lk, Dv).
        mesh: one dimension, for example `mesh["cp"]` of a larger mesh. Or two, `mesh["ring", "heads"]`: the second,
            best within a machine, exchanges tokens for heads; the first runs the strategy on each rank's heads.
        strategy: ``"ring"`` passes keys and values on while it computes; ``"all_gather"`` sends them to every rank that
            needs them at once; ``"ulysses"`` exchanges tokens for heads. None chooses, as `explain` shows.
        balance: how ranks divide tokens: ``"contiguous"``; ``"zigzag"`` or ``"striped"``, which give all ranks the same
            work under causal order; ``"documents"``, which does the same for packed documents.
        cu_seqlens_q: int32 or int64 (documents + 1,), where each packed document of the whole begins, and the end of
            the last; the same on every rank. B is 1. Positions then count within documents, as in `attention_varlen`,
            and ``alibi_slopes`` may be (documents, Hq). ``mask``, ``block_mask`` and ``bias`` must be None. Shards may
            cut documents.
        cu_seqlens_k: the same for the keys; None means ``cu_seqlens_q``.
        seqused_k: int32 or int64 (documents,): how many of its keys each document uses, the first ones, as in
            `attention_varlen`; the same on every rank. None is all.
        causal, window, softcap, scale, return_lse: as in `fastattn.attention`.
        q_offset: position of query 0 of the whole, None is the whole's Lk - Lq; or an integer tensor (B,), or
            (documents,), the same on every rank.
        kv_start: int32 or int64 (B,), or (documents,): the first key that takes part, among those of the whole or of
            the document; the same on every rank. Keys before it are not visited, and a piece that has no others is
            not sent.
        mask: bool, broadcastable to (B, Hq, Lq, whole Lk): this rank's rows, all keys in the order of the whole.
        block_mask: `fastattn.BlockMask` of the whole, (B or 1, Hq or 1, whole Lq, whole Lk), the same on every rank, in
            the order of the whole with any shards. Make it once: each rank keeps its part with the mask. Keys go only
            to ranks whose rows have a non-empty tile with them.
        bias: float, as ``mask``.
        alibi_slopes: float (Hq,) or (B, Hq). With ``"striped"`` shards, ``"ring"`` and ``"all_gather"`` call the
            kernel twice where a piece of keys lies on both sides of its rows.
        sinks: float (Hq,).
        dropout_p: as in `fastattn.attention`. The first rank's seed applies, and each weight's bits depend on its place
            in the whole: they are the same on any number of ranks. Every rank draws, so generators in equal states stay
            equal.
        backend: as in `fastattn.attention`, for each pair of pieces; ``"ring"`` and ``"all_gather"`` need one that
            returns lse.
        link: the machine data for the choice of a strategy.
        timeout: seconds to wait for a message; None is the process group's own.

    Returns:
        out (B, Hq, Lq, Dv) in the dtype of q; with ``return_lse`` also lse (B, Hq, Lq).

    Raises:
        TypeError, ValueError: as `fastattn.attention`. If ranks differ in shapes or options, every rank raises before
            any sends keys.
        RuntimeError: another rank raised, ended or made another call; it is named.
    """
    if unknown:
        keywords.refuse(context_parallel_attention, unknown)
    return attention_of_heads(
        0, q, k, v, mesh=mesh, strategy=strategy, balance=balance, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, causal=causal, q_offset=q_offset, window=window,
        kv_start=kv_start, mask=mask, block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap,
        sinks=sinks, scale=scale, dropout_p=dropout_p, return_lse=return_lse, backend=backend, link=link,
        timeout=timeout,
    )  # fmt: skip


def attention_of_heads(
    first: int, q: Tensor, k: Tensor, v: Tensor, *, mesh: DeviceMesh, strategy: Strategy | None, balance: Balance,
    link: Link | None, timeout: float | None, backend: Backend | None = None, **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`context_parallel_attention` of the query heads from ``first`` on; other meshes have the other heads.

    Dropout is the same as in one call with all heads, if the generators of all processes are in the same state.
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
    seqused_k: Tensor | None = None,
    causal: bool = False,
    q_offset: int | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_start: Tensor | None = None,
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
    """The strategy that `context_parallel_attention` takes for the same arguments, and the cost of each strategy.

    Every rank calls it. Ranks exchange their shapes and nothing else. ``str()`` of the result is a table.
    """
    if unknown:
        keywords.refuse(explain, unknown)
    return _agree(
        q, k, v, mesh, strategy, balance, link, timeout, backend, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, causal=causal, q_offset=q_offset, window=window,
        kv_start=kv_start, mask=mask, block_mask=block_mask, bias=bias, alibi_slopes=alibi_slopes, softcap=softcap,
        sinks=sinks, scale=scale, dropout_p=dropout_p, return_lse=return_lse,
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
    """Check this rank's arguments, then compare those of all ranks: all ranks continue, or all raise."""
    peers = Ranks(mesh, timeout)
    problem: Exception | None = None
    spec, documents, numbers, text, seed = None, None, [0] * 10, "", 0
    try:
        spec, documents = check_own(q, k, v, peers, strategy, balance, backend, options)
        numbers = [1, *numbers_of(spec, q, k, v, options)]
        text = describe(spec, documents, strategy, balance, options)
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
    q_total, kv_total = check_together(headers, balance, documents)
    if spec.kv_start is not None:
        longest = kv_total if documents is None else max(b - a for a, b in itertools.pairwise(documents.keys))
        check_kv_start(spec.kv_start, len(spec.kv_start), q, longest)
    tiles = None if spec.block_mask is None else seen_tiles(spec.block_mask)
    offsets, starts = (None if x is None else tuple(x.tolist()) for x in (spec.q_offset_tensor, spec.kv_start))
    window, slopes = check_window(options["window"], options["causal"]), spec.alibi_slopes is not None
    offset = options["q_offset"] if offsets is None else offsets or (0,)
    view = View(offset, *window, documents, tiles, starts or None, slopes)
    if documents is None:
        if spec.block_mask is not None:
            check_block_mask(spec.block_mask, (q.shape[0], q.shape[1], q_total, kv_total), q.device)
        offset = kv_total - q_total if view.q_offset is None else view.q_offset
        view = view._replace(q_offset=offset)
        pair = None
        if isinstance(offset, int):
            pair = relation(Piece(0, q_total), Piece(0, kv_total), offset, view.left, view.right)
        if pair is not None:  # open a side that forbids nothing
            view = view._replace(left=pair.left, right=pair.right)
    offset = 0 if isinstance(view.q_offset, tuple) else view.q_offset
    spec = spec._replace(left=view.left, right=view.right, q_offset=offset)
    of_all = torch.tensor([seed], device=q.device) if spec.dropout_p else None
    scores = sum(x.element_size() for x in (spec.bias, spec.mask) if x is not None)
    batch, q_heads, _, head_dim = q.shape
    sizes = Sizes(
        peers.size, balance, batch, q_heads, k.shape[1], q_total, kv_total, head_dim, v.shape[3],
        spec.q.element_size(), view, scores * batch * q_heads * q_total * kv_total, peers.width,
    )  # fmt: skip
    of_both = (None, None) if documents is None else (documents.queries, documents.keys)
    rows, keys = (
        pieces(balance, total, peers.size, own) for total, own in zip((q_total, kv_total), of_both, strict=True)
    )  # fmt: skip
    return _Call(peers, spec, rows, keys, sizes, _choose(sizes, link or Link(), strategy, spec), of_all)


def _choose(sizes: Sizes, link: Link, strategy: str | None, spec: AttentionSpec) -> Choice:
    refused: dict[str, str] = {}
    if sizes.width > 1:
        refused["ulysses"] = BY_HEADS
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
        parts.append(f"q_offset={'of each entry' if isinstance(view.q_offset, tuple) else view.q_offset}")
    if view.documents is not None:
        parts.append(f"{len(view.documents.queries) - 1} documents")
    if spec.block_mask is not None:
        parts.append(f"block mask, {spec.block_mask.sparsity:.1%} of its tiles empty")
    return Choice(chosen, found, refused, ", ".join(parts), link, strategy is not None)

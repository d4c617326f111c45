"""Trace and probe a ``score_mod`` of FlexAttention to find equivalent arguments of `fastattn.attention`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.block_mask import BLOCK, BlockMask

_CURE = (
    "the score itself or softcap * tanh(score / softcap), plus nothing or a term of (b, h, q_idx, kv_idx) that does "
    "not depend on the score; a factor goes to scale, a mask to block_mask"
)

_PROBES = 1 << 17
"""Scores that a score_mod is tried with, at least one for each place."""


class ScoreTerms(NamedTuple):
    """The arguments of `fastattn.attention` that do what a ``score_mod`` does."""

    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    """(B, Hq)"""
    bias: Tensor | None = None
    """(B or 1, Hq or 1, Lq or 1, Lk or 1)"""


class _Trace(NamedTuple):
    reached: frozenset[str]
    """which of b, h, q_idx and kv_idx the result depends on"""
    relative: bool
    """whether it depends on q_idx and kv_idx through their difference alone"""


def score_terms(
    score_mod: Callable[..., Tensor], query: Tensor, kv_len: int, block_mask: BlockMask | None
) -> ScoreTerms:
    """The terms of ``score_mod`` over scores (B, Hq, Lq, Lk), differentiable in what it captures.

    Raises:
        NotImplementedError: there are none, with what was found.
    """
    batch, heads, q_len, _ = query.shape
    if 0 in (batch, heads, q_len, kv_len):
        return ScoreTerms()
    device = query.device
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    trace = _traced(score_mod, device)
    b, h, i, j = (
        torch.arange(size if name in trace.reached else 1, device=device)
        for name, size in (("b", batch), ("h", heads), ("q_idx", q_len), ("kv_idx", kv_len))
    )
    line = trace.relative and {"q_idx", "kv_idx"} <= trace.reached
    distance = torch.arange(1 - q_len, kv_len, device=device)
    if line:  # one pair of indices for each difference
        i, j = (-distance).clamp(min=0), distance.clamp(min=0)
    ask = _mapped(score_mod, line)
    shape = (len(b), len(h), len(i)) if line else (len(b), len(h), len(i), len(j))
    term = ask(torch.zeros(shape, dtype=dtype, device=device), b, h, i, j)
    softcap = _softcap(score_mod, term.detach(), b, h, i, j, line)
    _check_everywhere(ask, term.detach(), softcap, (b, h, i, j))
    if not trace.reached and not term.requires_grad and not term.any():
        return ScoreTerms(softcap)
    if not line:
        return ScoreTerms(softcap, None, term)
    slopes = _alibi_slopes(term, distance, q_len, block_mask)
    if slopes is not None:
        return ScoreTerms(softcap, slopes.expand(batch, heads))
    across = torch.arange(kv_len, device=device) - torch.arange(q_len, device=device)[:, None] + q_len - 1
    return ScoreTerms(softcap, None, term[:, :, across])


def _mapped(score_mod: Callable[..., Tensor], line: bool) -> Callable[..., Tensor]:
    """``score_mod`` over scores (b, h, i, j), or along a line (b, h, n) with n values of i and of j."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    mapped = score_mod
    inner = [(0, None, None, 0, 0)] if line else [(0, None, None, None, 0), (0, None, None, 0, None)]
    for dims in (*inner, (0, None, 0, None, None), (0, 0, None, None, None)):
        mapped = torch.vmap(mapped, in_dims=dims)

    def ask(*arguments: Tensor) -> Tensor:
        with TransformGetItemToIndex():  # as FlexAttention calls it: a tensor may be indexed by an index
            result = mapped(*arguments)
        return result.to(arguments[0].dtype)

    return ask


def _traced(score_mod: Callable[..., Tensor], device: torch.device) -> _Trace:
    """What the result depends on, from the operations that ``score_mod`` consists of."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.fx.experimental.proxy_tensor import make_fx

    names = ("score", "b", "h", "q_idx", "kv_idx")
    example = [torch.zeros((), device=device), *(torch.zeros((), dtype=torch.int64, device=device) for _ in range(4))]
    try:
        with TransformGetItemToIndex(), torch.no_grad():
            graph = make_fx(lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx, kv_idx))(*example).graph
    except (RuntimeError, TypeError, IndexError) as error:
        raise NotImplementedError(
            f"score_mod: expected a function of (score, b, h, q_idx, kv_idx) without `if` or .item(), got {error}"
        ) from error
    reached: dict[Any, frozenset[str]] = {}
    # How much a value grows if q_idx and kv_idx both grow by one; None if unknown.
    weight: dict[Any, int | None] = {}
    placeholders = iter(names)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = next(placeholders)
            reached[node], weight[node] = frozenset([name]), int(name in ("q_idx", "kv_idx"))
        elif node.op == "output":
            result = node.args[0]
            return _Trace(reached[result] - {"score"}, weight[result] == 0)
        else:
            _refuse_impure(node)
            inputs = node.all_input_nodes
            reached[node] = frozenset().union(*(reached[x] for x in inputs))
            weight[node] = _weight(node, weight)
    raise AssertionError("a graph has an output")


def _refuse_impure(node: Any) -> None:
    schema, tags = getattr(node.target, "_schema", None), getattr(node.target, "tags", ())
    if (schema is not None and schema.is_mutable) or torch.Tag.nondeterministic_seeded in tags:
        raise NotImplementedError(
            f"score_mod: expected neither operations in place nor random numbers, got {node.target}; expected {_CURE}"
        )


def _weight(node: Any, weight: dict[Any, int | None]) -> int | None:
    values = [weight[x] for x in node.all_input_nodes]
    if all(value == 0 for value in values):
        return 0
    exact = getattr(node.meta.get("val"), "dtype", None) in (torch.int32, torch.int64)
    packet = getattr(node.target, "overloadpacket", None)
    if None in values or not exact or node.kwargs:
        return None
    left, right = (weight[x] if isinstance(x, torch.fx.Node) else 0 for x in (*node.args, 0)[:2])
    assert left is not None and right is not None
    if packet in (torch.ops.aten.add, torch.ops.aten.sub) and len(node.args) == 2:
        return left + right if packet is torch.ops.aten.add else left - right
    return -left if packet is torch.ops.aten.neg else None


def _softcap(
    score_mod: Callable[..., Tensor], term: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, line: bool
) -> float | None:
    """The softcap, from many scores at the place with the smallest term; None if there is none."""
    place = int(term.abs().flatten().argmin())
    index = torch.unravel_index(torch.tensor(place), term.shape)
    own = [x[n : n + 1] for x, n in zip((b, h, i, j), (*index, index[-1]) if line else index, strict=True)]
    sizes = 2.0 ** torch.linspace(-8, 60, 205, dtype=torch.float64, device=term.device)
    scores = torch.cat([sizes, -sizes])
    b, h, *pair = own
    i, j = (x.expand(len(scores)) for x in pair)
    ask = _mapped(score_mod, line=True)
    nothing, found = (ask(x[None, None], b, h, i, j)[0, 0].detach() for x in (torch.zeros_like(scores), scores))
    change = found - nothing
    if not found.isfinite().any():  # -inf everywhere
        return None
    cap = float(change[len(sizes) - 1])
    softcap = None if cap == float(scores[len(sizes) - 1]) else cap
    if not (cap > 0 and _close(change, _capped(scores, softcap), scores.clamp(-cap, cap)).all()):
        raise NotImplementedError(
            f"score_mod: expected {_CURE}; got, at b, h, q_idx, kv_idx == {[int(x[0]) for x in own]}, "
            f"{float(ask(torch.ones_like(scores)[None, None], b, h, i, j)[0, 0, 0])} for a score of 1 and "
            f"{float(nothing[0])} for 0"
        )
    return softcap


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _close(found: Tensor, expected: Tensor, size: Tensor) -> Tensor:
    """Whether two values differ by at most a few float32 roundings of numbers of this size."""
    bound = 16 * torch.finfo(torch.float32).eps * size.abs()
    return ((found - expected).abs() <= bound) | (found == expected)


def _check_everywhere(
    ask: Callable[..., Tensor], term: Tensor, softcap: float | None, places: tuple[Tensor, ...]
) -> None:
    """Compare the function with the form found for it at every index, with scores of many sizes and signs.

    Each place has its own score; with few places, each has many scores.
    """
    generator = torch.Generator().manual_seed(0)
    rounds = min(max(_PROBES // term.numel(), 1), 64)
    uniform = torch.rand(2, rounds, *term.shape, generator=generator, dtype=term.dtype).to(term.device)
    scores = 2.0 ** (18 * uniform[0] - 6) * (uniform[1] - 0.5).sign()
    found = torch.vmap(ask, (0, None, None, None, None))(scores, *places).detach()
    capped = _capped(scores, softcap)
    right = _close(found, capped + term, capped.abs() + term.abs())
    if not right.all():
        score, result = (float(x[~right][0]) for x in (scores, found))
        raise NotImplementedError(
            f"score_mod: expected {_CURE}; got a function that treats scores differently from place to place: {result} "
            f"for a score of {score} somewhere"
        )


def _alibi_slopes(term: Tensor, distance: Tensor, q_len: int, block_mask: BlockMask | None) -> Tensor | None:
    """The slopes (B or 1, Hq or 1) if the term (B or 1, Hq or 1, distances) is ALiBi's on all visible pairs."""
    if q_len == 1:
        return None
    slopes = -term[:, :, q_len - 2]  # at a distance of -1
    same = term.detach() == -slopes.detach()[..., None] * distance.abs()
    seen = same if same.all() or block_mask is None or not _causal(block_mask) else same[:, :, :q_len]
    return slopes if bool(seen.all()) else None


def _causal(block_mask: BlockMask) -> bool:
    """Whether no query sees a key after its own index."""
    table, pool = block_mask.tensors.table, block_mask.tensors.pool
    on, above = torch.diagonal(table, 0, 2, 3).long(), table.triu(1)
    ahead = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=pool.device).triu(1)
    return not bool(above.any()) and not bool((pool[on.unique()].bool() & ahead).any())

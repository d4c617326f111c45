"""The strategies "ring" and "all_gather", which send keys and values around the ranks and their gradients back.

Both send pieces of keys and values only to the ranks that need them. A ring passes each piece from rank to rank and
overlaps this with computing on the previous piece; all_gather sends each piece directly to all ranks at once. Every
rank merges its rows' results for each piece by the log-sum-exp. The backward pass sends the pieces along the same
routes. With a ring, the gradients of a piece add up along its route and then return to its rank. With all_gather, every
rank returns its gradients directly, and the piece's rank adds them in the order of the ranks.

Source: Liu et al., Ring Attention, 2023 (arXiv:2310.01889); lse merge: Dao et al., 2023 (Flash-Decoding).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import backends, ops
from fastattn.block_mask import BlockMask
from fastattn.distributed.blocks import cut
from fastattn.distributed.comm import Message, Peers, Pending
from fastattn.distributed.layout import Part, Piece, View, parts, placed
from fastattn.distributed.routes import Hop, Route, placed_of, returns_of, steps_of
from fastattn.functional import merge
from fastattn.spec import AttentionSpec, Learned, Operands, Options

_FORWARD = torch.ops.fastattn.attention_forward.default
_BACKWARD = torch.ops.fastattn.attention_backward.default


class Plan(NamedTuple):
    """One call: the sizes of the whole, which every rank knows, and this rank's part."""

    peers: Peers
    strategy: str
    rows: list[list[Piece]]
    """of each rank"""
    routes: list[Route]
    view: View
    options: Options
    """of the whole"""
    backend: str
    seed: Tensor | None
    """of dropout, the same on every rank"""
    device: torch.device
    head: int = 0
    """the first query head, among those of the whole"""
    block_mask: BlockMask | None = None
    """of the whole, for these heads"""

    @property
    def own_rows(self) -> list[tuple[slice, Piece]]:
        """The place of each piece of this rank's queries in q."""
        return placed(self.rows[self.peers.rank])

    def of_rows(self, sinks: Tensor, lse: Tensor) -> Tensor:
        """The sink of each row, in the layout of lse; rows after the last document have none."""
        found = sinks.to(lse.dtype)[:, None].expand_as(lse)
        if self.view.documents is None:
            return found
        return found.masked_fill(self.tokens(lse.device) >= self.view.documents.queries[-1], -torch.inf)

    def tokens(self, device: torch.device) -> Tensor:
        """Where each of this rank's rows stands in the whole, int64 (rows,)."""
        return torch.cat([x.start + x.stride * torch.arange(x.length, device=device) for _, x in self.own_rows])

    def calls(self, route: Route) -> Iterator[tuple[tuple[int, int, int], "_Call"]]:
        """The calls that this rank makes with a piece of keys; each has a name."""
        for index, (where, rows) in enumerate(self.own_rows):
            for number, part in enumerate(parts(rows, route.piece, self.view)):
                own = slice(where.start + part.rows.start, where.start + part.rows.stop)
                yield (route.number, index, number), _Call(own, part.keys, part, rows, route.piece)


class _Call(NamedTuple):
    rows: slice
    """in q"""
    keys: slice
    """in the keys of the piece"""
    part: Part
    of_rows: Piece
    of_keys: Piece


def run(plan: Plan, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """(out, lse) of this rank's rows, differentiable once; bias and mask are for its rows and all keys."""
    tensors = (spec.q, spec.k, spec.v, spec.mask, spec.bias, spec.alibi_slopes, spec.sinks)
    return _ContextParallel.apply(plan, *tensors)  # pyright: ignore[reportReturnType]


# Moving pieces


def _arrivals(plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[int, list[tuple[Route, Tensor, Tensor]]]]:
    """Yield (step, the pieces to compute with), this rank's own in step -1, while the next step's messages are in
    flight."""
    me, steps = plan.peers.rank, steps_of(plan.routes, plan.strategy, plan.peers.size)
    last = {hop.route.number: step for step, hops in enumerate(steps) for hop in hops if hop.sender == me}
    own = [route for route in plan.routes if route.source == me]
    places = [where for where, piece in placed_of(plan.routes, me)]
    held = {
        route.number: torch.cat([x[:, :, where].reshape(-1) for x in (k, v)])
        for route, where in zip(own, places, strict=True)
    }

    def unpack(route: Route) -> tuple[Route, Tensor, Tensor]:
        return route, *_views(route, held[route.number], k, v)

    def begin(step: int) -> tuple[Pending, dict[int, Tensor]]:
        hops = steps[step] if step < len(steps) else []
        coming = {h.route.number: k.new_empty(_size(h.route, k, v)) for h in hops if h.receiver == me}
        return plan.peers.start(
            [Message(held[h.route.number], h.receiver, 1 + h.route.number) for h in hops if h.sender == me],
            [Message(coming[h.route.number], h.sender, 1 + h.route.number) for h in hops if h.receiver == me],
        ), coming

    pending, coming = begin(0)
    yield -1, [unpack(route) for route in own]
    for step in range(len(steps)):
        pending.wait()
        held = {number: x for number, x in held.items() if last.get(number, -1) > step} | coming
        arrived = [route for route in plan.routes if route.number in coming]
        # Start from the nearest rank of the ring: a fixed order of sums, whichever message arrives first.
        arrived.sort(key=lambda route: ((me - route.source) % plan.peers.size, route.number))
        pending, coming = begin(step + 1)
        yield step, [unpack(route) for route in arrived]
    pending.wait()


def _size(route: Route, k: Tensor, v: Tensor) -> int:
    """The number of elements of a piece's keys and values, which travel in one buffer."""
    return k.shape[0] * k.shape[1] * route.piece.length * (k.shape[3] + v.shape[3])


def _views(route: Route, buffer: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and the values of a piece in its buffer."""
    n = route.piece.length
    keys, values = buffer.split([k.shape[0] * k.shape[1] * n * width for width in (k.shape[3], v.shape[3])])
    return keys.view(*k.shape[:2], n, -1), values.view(*v.shape[:2], n, -1)


def _operator_call(plan: Plan, of_all: Operands, call: _Call) -> tuple[Operands, Options]:
    """Operands and options of one call, from those of the whole."""
    part, rows, keys = call.part, call.of_rows, call.of_keys
    own = of_all._replace(mask=_cut(of_all.mask, call.rows, keys), bias=_cut(of_all.bias, call.rows, keys))
    if plan.block_mask is not None:
        own = own._replace(block_mask=list(cut(plan.block_mask, rows, keys).tensors))
    if plan.seed is not None:
        at = {"rows": (part.first_row, rows.stride), "keys": (part.first_key, keys.stride)}
        own = own._replace(seed=ops.seed_of_part(plan.seed, batch=part.document, head=plan.head, **at))
    if of_all.alibi_slopes is not None:
        own = own._replace(alibi_slopes=_slopes(plan, part, of_all.alibi_slopes) * part.step)
    offset: int | None = part.q_offsets[0]
    starts = part.starts or (None, None)
    numbers = {
        "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "seqused_k": part.used, "kv_start": part.kv_starts
    }  # fmt: skip
    if len({*part.q_offsets}) > 1:
        numbers["q_offset_tensor"], offset = part.q_offsets, 0
    given = {name: torch.tensor(x, dtype=torch.int32, device=plan.device) for name, x in numbers.items() if x}
    return own._replace(**given), plan.options._replace(q_offset=offset, left=part.left, right=part.right)


def _slopes(plan: Plan, part: Part, slopes: Tensor) -> Tensor:
    """Those of a call's entries, (1 or entries, Hq)."""
    return slopes if plan.view.documents is None else slopes[_documents(part, slopes)]


def _far(plan: Plan, part: Part) -> Tensor:
    """(1 or B, 1): how much farther the keys of a call are than the kernel counts, in tokens."""
    return torch.tensor(part.far, device=plan.device)[:, None]


def _documents(part: Part, slopes: Tensor) -> slice:
    """The documents whose slopes a call uses, if documents have their own slopes."""
    count = 1 if part.starts is None else len(part.starts[0]) - 1
    return slice(part.document, part.document + count) if slopes.shape[0] > 1 else slice(0, 1)


def _cut(x: Tensor | None, rows: slice, keys: Piece) -> Any:
    if x is None:
        return None
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 else x[..., keys.positions]


def _needed(ctx: Any) -> Learned:
    """Whether the gradients of operands are needed."""
    _plan, _q, _k, _v, _mask, bias, slopes, sinks = ctx.needs_input_grad
    return Learned(bias, slopes, sinks)


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None,
        slopes: Tensor | None, sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        of_all = Operands(mask, bias, slopes)  # a sink counts once per row, not once per pair of pieces
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        width = v.shape[3]
        learn_far = plan.view.distances and _needed(ctx).alibi_slopes and any(x.piece.stride > 1 for x in plan.routes)
        # Beside out, for the gradient of slopes: the sum of weights and values, each times what `_far` says, and of
        # these weights.
        total = q.new_zeros((*q.shape[:3], 2 * width + 1 if learn_far else width), dtype=dtype)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=dtype)
        calls: dict[tuple[int, int, int], tuple[slice, Tensor, Tensor]] = {}
        for _, arrived in _arrivals(plan, k, v):
            for route, own_k, own_v in arrived:
                for name, call in plan.calls(route):
                    where = call.rows
                    operands, options = _operator_call(plan, of_all, call)
                    own_keys = own_k[:, :, call.keys], own_v[:, :, call.keys]
                    forward = ops.Forward(q[:, :, where], *own_keys, operands, options, plan.backend)
                    part, part_lse, statistics = _FORWARD(*ops.flatten(forward))
                    if slopes is not None and any(call.part.far):
                        more = _far(plan, call.part)
                        part_lse = part_lse - (_slopes(plan, call.part, slopes) * more).to(part_lse.dtype)[..., None]
                    if learn_far:
                        more = _far(plan, call.part)[..., None, None].to(dtype).expand(*part_lse.shape, 1)
                        part = torch.cat([part, part * more, more], -1)
                    calls[name] = where, statistics, part_lse
                    own = total[:, :, where], lse[:, :, where]
                    total[:, :, where], lse[:, :, where] = merge(*own, part, part_lse)
        if sinks is not None:  # a part without values
            total, lse = merge(total, lse, torch.zeros_like(total), plan.of_rows(sinks, lse))
        out = total[..., :width].to(q.dtype)
        # To get the probabilities of the whole, each pair's softmax uses the lse of all pairs.
        statistics = []
        for where, of_part, part_lse in calls.values():
            more = (lse[:, :, where] - part_lse).masked_fill(part_lse == -torch.inf, 0.0)
            statistics.append(backends.statistics_within(of_part, more, plan.backend))
        ctx.plan, ctx.calls = plan, {at: i for i, at in enumerate(calls)}
        far = total[..., width:] if learn_far else None
        ctx.save_for_backward(q, k, v, mask, bias, slopes, sinks, out, lse, far, *statistics)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, mask, bias, slopes, sinks, out, lse, far, *statistics = ctx.saved_tensors
        plan: Plan = ctx.plan
        of_all = Operands(mask, bias, slopes)
        dout = torch.zeros_like(out) if dout is None else dout
        needed = _needed(ctx)
        wanted = [needed.bias, needed.alibi_slopes, False]  # sinks have theirs below, once for the whole
        sums = _Sums(plan, q, k, v, bias if needed.bias else None, slopes if needed.alibi_slopes else None)
        for step, arrived in _arrivals(plan, k, v):
            for route, own_k, own_v in arrived:
                into = sums.keys_of(route)
                for name, call in plan.calls(route):
                    where = call.rows
                    operands, options = _operator_call(plan, of_all, call)
                    backward = ops.Backward(
                        dout[:, :, where], None if dlse is None else dlse[:, :, where], q[:, :, where],
                        own_k[:, :, call.keys], own_v[:, :, call.keys], out[:, :, where], statistics[ctx.calls[name]],
                        operands, options, plan.backend, wanted,
                    )  # fmt: skip
                    sums.add(call, into, _BACKWARD(*ops.flatten(backward)))
            sums.send_on(step, [route for route, _, _ in arrived])
        dk, dv = sums.finish()
        dsinks, delta = None, out.new_empty(0)
        if far is not None or (sinks is not None and needed.sinks):
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            delta = delta if dlse is None else delta - dlse
        if far is not None:
            sums.add_far((dout * far[..., :-1]).sum(-1) - delta * far[..., -1])
        if sinks is not None and needed.sinks:
            weights = torch.exp(plan.of_rows(sinks, lse) - lse).masked_fill(lse == -torch.inf, 0.0)
            dsinks = -(weights * delta).sum((0, 2)).to(sinks.dtype)
        dbias, dslopes = (
            None if total is None else total.to(x.dtype)
            for total, x in ((sums.dbias, bias), (sums.dslopes, slopes))
        )  # fmt: skip
        return None, sums.dq.to(q.dtype), dk, dv, None, dbias, dslopes, dsinks


class _Sums:
    """The gradients of a backward pass, summed in a fixed order, including those of keys and values in transit."""

    def __init__(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, slopes: Tensor | None) -> None:
        self._plan, self._k, self._v = plan, k, v
        self._returns = returns_of(plan.routes, plan.strategy, plan.peers.size)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.dq = torch.zeros_like(q, dtype=dtype)
        self.dbias, self.dslopes = (None if x is None else torch.zeros_like(x, dtype=dtype) for x in (bias, slopes))
        self._dtype = dtype
        self._mine: dict[int, Tensor] = {}
        """what this rank's rows contribute to each piece, dk and dv one after the other"""
        self._coming: list[tuple[Hop, Tensor]] = []
        self._home: dict[int, list[tuple[int, Tensor]]] = {}
        self._pending: Pending | None = None

    def _views(self, route: Route, buffer: Tensor) -> tuple[Tensor, Tensor]:
        return _views(route, buffer, self._k, self._v)

    def keys_of(self, route: Route) -> tuple[Tensor, Tensor]:
        """The tensors to which the gradients of a piece's keys and values are added."""
        self._mine[route.number] = self._k.new_zeros(_size(route, self._k, self._v), dtype=self._dtype)
        return self._views(route, self._mine[route.number])

    def add(self, call: _Call, into: tuple[Tensor, Tensor], gradients: tuple[Tensor, ...]) -> None:
        """Add the gradients of one call."""
        dq, dk, dv, dbias, dslopes, _ = gradients
        self.dq[:, :, call.rows] += dq
        into[0][:, :, call.keys] += dk
        into[1][:, :, call.keys] += dv
        if self.dbias is not None:
            _cut(self.dbias, call.rows, call.of_keys).add_(dbias)
        if self.dslopes is not None:
            _slopes(self._plan, call.part, self.dslopes).add_(dslopes, alpha=call.part.step)

    def add_far(self, of_rows: Tensor) -> None:
        """Take in what the slopes add by `_far`: of each row (B, Hq, rows), gradients of scores times tokens."""
        assert self.dslopes is not None
        documents, several = self._plan.view.documents, self.dslopes.shape[0] > 1
        if documents is None or not several:
            self.dslopes -= of_rows.sum(2).sum_to_size(self.dslopes.shape)
            return
        ends = torch.tensor(documents.queries[1:], device=of_rows.device)
        number = torch.searchsorted(ends, self._plan.tokens(of_rows.device), right=True)
        inside = number < len(ends)  # rows after the last document see nothing
        self.dslopes.index_add_(0, number[inside], of_rows[0, :, inside].mT, alpha=-1)

    def send_on(self, step: int, computed: list[Route]) -> None:
        """After the pieces of a step, add the gradients that arrived with them and send the sums on."""
        if step < 0:
            return
        plan, me = self._plan, self._plan.peers.rank
        self._arrive()
        hops = self._returns[step]
        sends = [
            Message(self._mine.pop(h.route.number), h.receiver, 1 + h.route.number) for h in hops if h.sender == me
        ]
        self._coming = [
            (hop, self._k.new_empty(_size(hop.route, self._k, self._v), dtype=self._dtype))
            for hop in hops
            if hop.receiver == me
        ]
        receives = [Message(buffer, hop.sender, 1 + hop.route.number) for hop, buffer in self._coming]
        self._pending = plan.peers.start(sends, receives)

    def _arrive(self) -> None:
        if self._pending is None:
            return
        self._pending.wait()
        for hop, buffer in self._coming:
            if hop.route.source == self._plan.peers.rank:
                self._home.setdefault(hop.route.number, []).append((hop.sender, buffer))
            else:
                self._mine[hop.route.number] = buffer.add_(self._mine[hop.route.number])
        self._pending, self._coming = None, []

    def finish(self) -> tuple[Tensor, Tensor]:
        """dk and dv of this rank's keys."""
        self._arrive()
        dk, dv = torch.zeros_like(self._k), torch.zeros_like(self._v)
        me = self._plan.peers.rank
        own = [route for route in self._plan.routes if route.source == me]
        for route, (where, _) in zip(own, placed_of(self._plan.routes, me), strict=True):
            total = self._mine[route.number]
            for _, buffer in sorted(self._home.get(route.number, []), key=lambda x: route.stops.index(x[0])):
                total.add_(buffer)
            dk[:, :, where], dv[:, :, where] = self._views(route, total)
        return dk, dv

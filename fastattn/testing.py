"""How right is right: the one tolerance rule, and the comparison of any backend with the specification.

The rule: the error of a result against float64 may be at most **twice** the error that plain eager PyTorch makes in
the same dtype on the same inputs, plus the rounding floor of that dtype. Both the largest error and the RMS error are
held to it. No tolerance is chosen by hand. One evaluation may be exact by luck, so that of a call of attention is the
worst of several, whose scores add up the same products in another order: ``ORDERS``.

The weights of a row sum to 1 (less beside a sink, about 1 under dropout) however large scores and values are. So calls
are checked with one column of values, and of the gradient that flows in, that is 1: the sums appear in the output and
in dv, and are held to the rule by themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import _rounding, ops
from fastattn._rounding import learned_operands
from fastattn.backends import reference
from fastattn.backends.reference import definition
from fastattn.backends.reference.kvcache import quantise
from fastattn.functional import Backend, attention, attention_varlen, attention_with_kvcache, explain, rotary
from fastattn.spec import make_spec
from fastattn.spec.cache_operands import dequantised, over_keys

FACTOR = 2.0
ORDERS = 8
"""How often eager PyTorch computes a call of attention, each time with the head dim in another order."""


def rounding_floor(expected: Tensor, dtype: torch.dtype, intermediate: float | Tensor = 1.0) -> tuple[float, float]:
    """(largest, RMS) error that rounding alone explains.

    One rounding of the result to ``dtype``, and one of each intermediate value in the accumulator, which is float32
    (float64 for float64): what remains where the exact result cancels to zero.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    eps, floor = torch.finfo(dtype).eps, torch.finfo(accumulator).eps
    if not isinstance(intermediate, Tensor):
        intermediate = torch.tensor(float(intermediate))
    return (
        eps * _largest(expected) + floor * max(1.0, _largest(intermediate)),
        eps * _rms(expected) + floor * max(1.0, _rms(intermediate)),
    )


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_parity(
    actual: Tensor,
    expected: Tensor,
    eager: Tensor | Sequence[Tensor],
    name: str = "result",
    intermediate: float | Tensor = 1.0,
    stored: Tensor | None = None,
) -> None:
    """Hold ``actual`` to the rule.

    Args:
        actual: the result under test.
        expected: the same computed in float64.
        eager: the same computed by plain eager PyTorch in the dtype of ``actual``, from the same inputs; where it was
            computed several times, in other orders, its largest error counts.
        name: what the result is called in the error.
        intermediate: size of what is summed on the way to the result, one value or one per element.
        stored: error that follows from what the interface stores between two steps, one per element: the larger of
            this and the error of ``eager`` counts.

    Raises:
        AssertionError: wrong shape, NaN or infinity in other places than ``expected`` has them, or an error beyond the
            rule; with the figures.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    dtype = actual.dtype
    peers = [eager] if isinstance(eager, Tensor) else eager
    actual, expected, *peers = (t.detach().to("cpu", torch.float64) for t in (actual, expected, *peers))
    finite = expected.isfinite()
    if not torch.equal(actual[~finite], expected[~finite]) or not actual[finite].isfinite().all():
        bad = int((actual[finite].isfinite().logical_not()).sum())
        raise AssertionError(f"{name}: {bad} elements are not finite where the specification is, or differ at infinity")
    difference, *peer_differences = ((t - expected)[finite] for t in (actual, *peers))
    if difference.numel() == 0:
        return
    stored_difference = torch.zeros(()) if stored is None else stored.detach().cpu().double()
    floors = rounding_floor(expected[finite], dtype, intermediate)
    for measure, size, floor in zip(("largest", "RMS"), (_largest, _rms), floors, strict=True):
        error = size(difference)
        peer = max(size(t) for t in (*peer_differences, stored_difference))
        bound = FACTOR * peer + floor
        if not error <= bound:
            raise AssertionError(
                f"{name}: {measure} error {error:.3e} against float64 exceeds {bound:.3e} "
                f"= {FACTOR:g} x {peer:.3e} (eager {dtype}) + {floor:.1e} (rounding)"
            )


def _run_specification(
    inputs: dict[str, Any], options: dict[str, Any], seed: int, dtype: torch.dtype, order: Tensor | None = None
) -> list[Tensor]:
    """[out, lse, dq, dk, dv, ...] of `reference.attention` in ``dtype``; the head dim in this order on the way."""
    q, k, v = (inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v"))
    # Operands are promoted for float64; otherwise left in their own dtype, as eager code would.
    operands = {
        name: (x.detach().double() if dtype == torch.float64 else x.detach()).requires_grad_(x.requires_grad)
        for name, x in learned_operands(options).items()
    }
    leaves = [q, k, v, *(x for x in operands.values() if x.requires_grad)]
    spec = make_spec(q, k, v, **{**options, **operands})
    seed_tensor = None
    if spec.dropout_p > 0.0:
        torch.manual_seed(seed)
        seed_tensor = ops.draw_seed(q.device)
    in_order = (q, k) if order is None else (q[..., order], k[..., order])
    out, lse = definition.attention(*in_order, v, spec.operands(seed_tensor), spec.options)
    return [out, lse, *_gradients(out, lse, leaves, inputs)]


def _orders(head_dim: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    return [torch.randperm(head_dim, generator=generator).to(device) for _ in range(ORDERS)]


def _gradients(out: Tensor, lse: Tensor, leaves: list[Tensor], inputs: dict[str, Any]) -> list[Tensor]:
    dout, dlse = inputs["dout"].to(out.dtype), inputs.get("dlse")
    outputs, grads = [out], [dout]
    if dlse is not None:  # where a row is empty lse is -inf and has no gradient
        outputs, grads = [out, lse], [dout, dlse.to(lse.dtype).masked_fill(lse.detach() == -torch.inf, 0.0)]
    return list(torch.autograd.grad(outputs, leaves, grads))


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: Backend | None = None, seed: int = 0, lse_gradient: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    """Hold `fastattn.attention` on ``backend`` to the rule: out, lse and every gradient, from one call.

    With ``cu_seqlens_q`` and ``cu_seqlens_k`` among the options, and ``seqused_k``, the same for
    `fastattn.attention_varlen`.

    Args:
        q, k, v: inputs as for the function, in the dtype under test.
        backend: as there.
        seed: seeds the gradients that flow in, and dropout.
        lse_gradient: also return lse and send a gradient through it.
        options: further arguments of `fastattn.attention`; the gradients of ``bias``, ``alibi_slopes`` and ``sinks``
            are checked where they require one.

    Raises:
        AssertionError: as `assert_parity`.
    """
    packed = "cu_seqlens_q" in options
    if packed:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    chosen = explain(q, k, v, return_lse=lse_gradient, **options).backend if not packed and backend is None else backend
    # PyTorch's sums are PyTorch's, and those of float64 have no better truth.
    sums = chosen != "torch" and v.dtype != torch.float64 and v.shape[3] > 1 and v.stride(3) != 0
    if sums:
        v = _with_ones(v).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v}
    shape = (*q.shape[:3], v.shape[3])
    inputs["dout"] = torch.randn(shape, generator=generator).to(q.device, q.dtype)
    if sums:
        inputs["dout"][..., -1] = 1.0
    if lse_gradient:
        inputs["dlse"] = torch.randn(shape[:3], generator=generator).to(q.device)
    learned = {name: x for name, x in learned_operands(options).items() if x.requires_grad}
    leaves = [q, k, v, *learned.values()]

    torch.manual_seed(seed)
    function: Any = attention
    given = (q, k, v)
    if packed:
        function, given = attention_varlen, tuple(t[0].transpose(0, 1) for t in (q, k, v))
    results = function(*given, backend=backend, return_lse=lse_gradient, **options)
    out, lse = results if lse_gradient else (results, q.new_empty(0))
    if packed:
        out, lse = out.transpose(0, 1)[None], lse[None]
    actual = [out, lse, *_gradients(out, lse, leaves, inputs)]
    _hold_to_the_rule(actual, inputs, options, seed, lse_gradient, lse_alone=chosen == "torch", sums=sums)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in learned)]
    for name, leaf, gradient in zip(names, leaves, actual[2:], strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype, f"{name}: shape or dtype of its input"


def _with_ones(v: Tensor) -> Tensor:
    """A copy of ``v`` with its strides, gaps between elements included, whose last column is 1."""
    storage = v.detach().untyped_storage().clone()
    copy = v.new_empty(0).set_(storage, v.storage_offset(), v.shape, v.stride())  # pyright: ignore[reportArgumentType]
    once = copy  # what is expanded has each element once
    for dim, stride in enumerate(v.stride()):
        once = once[(slice(None),) * dim + (slice(1),)] if stride == 0 else once
    once[..., -1] = 1.0
    return copy


def _hold_to_the_rule(
    actual: list[Tensor], inputs: dict[str, Any], options: dict[str, Any], seed: int, lse_gradient: bool = True,
    lse_alone: bool = False, sums: bool = False,
) -> None:  # fmt: skip
    """Compare [out, lse, dq, dk, dv, ...], computed by whatever means, with the specification.

    ``sums``: the last column of v and of the gradient of out is 1, and the sums of the weights there are checked.
    """
    q, out = inputs["q"], actual[0]
    learned = [name for name, x in learned_operands(options).items() if x.requires_grad]
    expected = _run_specification(inputs, options, seed, torch.float64)
    orders = _orders(q.shape[-1], q.device)
    eager = [_run_specification(inputs, options, seed, q.dtype, order) for order in orders]
    if q.dtype.itemsize < 4:  # lse is never kept in half precision
        for one, order in zip(eager, orders, strict=True):
            one[1] = _run_specification(inputs, options, seed, torch.float32, order)[1]
    names = ["out", "lse", "dq", "dk", "dv", *(f"d{name}" for name in learned)]
    if "cu_seqlens_q" in options:
        effects = _rounding.packed_effects(inputs, options, seed, expected[0], expected[1], out)
    else:
        effects = _rounding.effects(inputs, options, seed, expected[0], expected[1], out, lse_alone=lse_alone)
    for name, ours, exact, *plain in zip(names, actual, expected, *eager, strict=False):
        if name[1:] in learned and ours.dtype == torch.float64 != q.dtype:
            ours = ours.float()  # computed in float32, whatever it is kept in
        if name != "lse" or lse_gradient:
            assert_parity(ours, exact, plain, name, *effects.get(name, ()))
    if sums:
        found = [_weight_sums(x) for x in (actual, expected, *eager)]
        for index, name in enumerate(("sums of the weights", "sums of the weights in the backward pass")):
            ours, exact, *plain = (x[index] for x in found)
            assert_parity(ours, exact, plain, name, exact)


def _weight_sums(results: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each row's weights (B, Hq, Lq), from out; of all weights of a key head (B, Hk), from dv."""
    out, dv = results[0], results[4]
    return out[..., -1], dv[..., -1].double().sum(-1).to(dv.dtype)


def check_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, *,
    cache_lens: int | Tensor, block_table: Tensor | None = None, backend: Backend | None = None,
    num_splits: int | None = None, lse: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Hold `fastattn.attention_with_kvcache` on ``backend`` to the rule: what it writes into the caches, out and lse.

    And the sums of the weights, where ``backend`` names one whose arithmetic is ours: the last column of the values is
    1 then, in copies of them.

    Args:
        q, k_cache, v_cache, k, v, cache_lens, block_table: as for the function, which writes into the caches.
        backend, num_splits: as there.
        lse: also ask for lse.
        options: further arguments of the function, but `cu_seqlens_q`. With rotary tables q and k are turned by the
            same tables, and what is written for k is held to the rule too.

    Raises:
        AssertionError: as `assert_parity`; or where a cache differs in any bit from what it should hold.
    """
    lens = [cache_lens] * q.shape[0] if isinstance(cache_lens, int) else cache_lens.tolist()
    added = 0 if k is None else k.shape[2]
    exact_q, eager_q, new_k = _turned_operands(q, k, lens, options)
    scales = options.get("k_scale"), options.get("v_scale")
    # As in `check_attention`; a quantised cache holds no exact 1.
    sums = backend not in (None, "torch") and q.dtype != torch.float64 and v_cache.dtype == q.dtype
    sums &= v_cache.shape[3] > 1 and v_cache.stride(3) != 0
    if sums:
        v_cache = _with_ones(v_cache)
        v = None if v is None else _with_ones(v)
    expected_caches = [
        _after_append(cache, scale, new, lens, block_table)
        for cache, scale, new in zip((k_cache, v_cache), scales, (new_k, v), strict=True)
    ]
    function: Any = attention_with_kvcache
    results = function(
        q, k_cache, v_cache, k, v, cache_lens=cache_lens, block_table=block_table, num_splits=num_splits,
        backend=backend, return_lse=lse, **options,
    )  # fmt: skip
    for name, cache, scale, after in zip("kv", (k_cache, v_cache), scales, expected_caches, strict=True):
        for what, actual, wanted in ((f"{name}_cache", cache, after[0]), (f"{name}_scale", scale, after[1])):
            if actual is not None and wanted is not None and not _same_bits(actual, wanted):
                raise AssertionError(f"{what}: not the new rows in their places and nothing else")

    def specification(dtype: torch.dtype, order: Tensor | None = None) -> list[tuple[Tensor, ...]]:
        """(out, lse) over the keys of each batch entry; in float64 also the sizes of what is summed for each."""
        found = []
        for entry, n in enumerate(lens):
            own_k, own_v = (
                dequantised(cache, scale, block_table, slice(entry, entry + 1), n + added, dtype).to(dtype)
                for cache, scale in expected_caches
            )
            own_q = (exact_q if dtype == torch.float64 else eager_q)[entry : entry + 1].to(dtype)
            if order is not None:
                own_q, own_k = own_q[..., order], own_k[..., order]
            found.append(_run_step(own_q, own_k, own_v, entry, options))
        return found

    orders = _orders(q.shape[-1], q.device)
    expected, eager = specification(torch.float64), [specification(q.dtype, order) for order in orders]
    eager_lse = [specification(torch.float32, order) for order in orders] if q.dtype.itemsize < 4 else eager
    out, actual_lse = results if lse else (results, None)
    both = [(out, eager)] if actual_lse is None else [(out, eager), (actual_lse, eager_lse)]
    for index, (name, (actual, plain)) in enumerate(zip(("out", "lse"), both, strict=False)):
        exact, size = (torch.cat([step[i] for step in expected]) for i in (index, index + 2))
        plain = [torch.cat([step[index] for step in one]) for one in plain]
        assert_parity(actual, exact, plain, name, size)
        if sums and name == "out":
            actual, exact, *plain = (x[..., -1] for x in (actual, exact, *plain))
            assert_parity(actual, exact, plain, "sums of the weights", exact)


def _turned_operands(
    q: Tensor, k: Tensor | None, lens: list[int], options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """q turned by its rotary positions in float64, and as plain eager PyTorch turns it; and the rows that are written
    for k, which are held to the rule themselves. All as they are in a call without rotary positions."""
    cos, sin, interleaved = (options.get(f"rotary_{name}") for name in ("cos", "sin", "interleaved"))
    if cos is None or sin is None:
        return q, q, k
    starts, added = torch.tensor(lens, device=q.device)[:, None], 0 if k is None else k.shape[2]
    of_q = starts + added - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    exact_q, eager_q = (_turned(q.to(dtype), cos, sin, of_q, interleaved) for dtype in (torch.float64, q.dtype))
    if k is None:
        return exact_q, eager_q, None
    of_k = starts + torch.arange(added, device=q.device)
    written = rotary.turn(k, cos, sin, of_k, bool(interleaved))
    exact, eager = (_turned(k.to(dtype), cos, sin, of_k, interleaved) for dtype in (torch.float64, k.dtype))
    assert_parity(written, exact, eager, "turned k")
    return exact_q, eager_q, written


def _turned(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool | None) -> Tensor:
    """x (B, H, L, D) turned by its positions (B, L), in its own dtype throughout."""
    c, s = (table[position][:, None].to(x.dtype) for table in (cos, sin))  # (B, 1, L, R / 2)
    half = cos.shape[1]
    first, second = slice(half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = x.clone()
    turned[..., first] = x[..., first] * c - x[..., second] * s
    turned[..., second] = x[..., first] * s + x[..., second] * c
    return turned


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is equal to itself."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.view(bits))


def _after_append(
    cache: Tensor, scale: Tensor | None, new: Tensor | None, lens: list[int], block_table: Tensor | None
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Copies of a cache and of its scale as they are when the new rows (B, Hk, Lnew, D) are there."""
    if scale is None or new is None:
        return _appended(cache, new, lens, block_table), scale
    given = None if scale.ndim == 3 else scale.reshape(1, -1, 1, 1)
    values, measured = quantise(new, given, cache.dtype)
    cache = _appended(cache.view(torch.uint8), values.view(torch.uint8), lens, block_table).view(cache.dtype)
    return cache, scale if given is not None else _appended(scale[..., None], measured, lens, block_table)[..., 0]


def _appended(cache: Tensor, new: Tensor | None, lens: list[int], block_table: Tensor | None) -> Tensor:
    """A copy of the cache with the new rows (B, Hk, Lnew, D) in their places."""
    cache = cache.clone()
    for entry, n in enumerate(lens if new is not None else []):
        assert new is not None
        position = torch.arange(n, n + new.shape[2], device=cache.device)
        if block_table is None:
            cache[entry, position] = new[entry].transpose(0, 1)
        else:
            page = block_table[entry, position // cache.shape[1]].long()
            cache[page, position % cache.shape[1]] = new[entry].transpose(0, 1)
    return cache


def _run_step(q: Tensor, k: Tensor, v: Tensor, entry: int, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """`reference.attention` of one batch entry over the keys it has; see `check_kvcache`."""
    own = {"causal": True, **options}
    start = own.pop("mask_start", None)
    start = 0 if start is None else start if isinstance(start, int) else int(start[entry])
    for name, outside in (("mask", True), ("bias", 0.0)):
        if (x := own.get(name)) is not None:
            x = x[(None,) * (4 - x.ndim)]
            x = x if x.shape[0] == 1 else x[entry : entry + 1]
            broadcast = x.shape[3] == 1 and options.get("mask_start") is None
            own[name] = x if broadcast else over_keys(x, start, k.shape[2], outside)
    if own.get("kv_start") is not None:
        own["kv_start"] = own["kv_start"][entry : entry + 1]
    apart = ("k_scale", "v_scale", "rotary_cos", "rotary_sin", "rotary_interleaved", "batch_invariant")
    own = {name: x for name, x in own.items() if name not in apart}
    own |= {name: x.double() if q.dtype == torch.float64 else x.float() for name, x in learned_operands(own).items()}
    if own.get("alibi_slopes") is not None and own["alibi_slopes"].ndim == 2:
        own["alibi_slopes"] = own["alibi_slopes"][entry]
    spec = make_spec(q, k, v, **own)
    out, lse = reference.attention(
        q, k, v, spec.mask, spec.bias, spec.alibi_slopes, spec.sinks, kv_start=spec.kv_start, left=spec.left,
        right=spec.right, q_offset=spec.q_offset, scale=spec.scale, softcap=spec.softcap,
    )  # fmt: skip
    if q.dtype != torch.float64:
        return out, lse
    effects = _rounding.effects({"q": q, "k": k, "v": v, "dout": out}, own, 0, out, lse, out)
    return out, lse, effects["out"][0], effects["lse"][0]

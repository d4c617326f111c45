"""Calls of `fastattn.attention_with_kvcache`, held to the rule."""

from typing import Any

import torch
from torch import Tensor

from fastattn.backends import reference
from fastattn.backends.reference.kvcache import quantise
from fastattn.functional import Backend, attention_with_kvcache
from fastattn.spec import make_spec
from fastattn.spec.cache_operands import dequantised, over_keys
from fastattn.testing import rounding
from fastattn.testing.calls import orders_of, with_ones
from fastattn.testing.rounding import learned_operands
from fastattn.testing.rule import assert_parity


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
            same tables, and what is written for k is held to the rule, not to bits.

    Raises:
        AssertionError: as `assert_parity`; or where a cache differs in any bit from what it should hold.
    """
    lens = [cache_lens] * q.shape[0] if isinstance(cache_lens, int) else cache_lens.tolist()
    added = 0 if k is None else k.shape[2]
    exact_q, eager_q, turned_k = _turned_operands(q, k, lens, options)
    scales = options.get("k_scale"), options.get("v_scale")
    # As in `check_attention`; a quantised cache holds no exact 1.
    sums = backend not in (None, "torch") and q.dtype != torch.float64 and v_cache.dtype == q.dtype
    sums &= v_cache.shape[3] > 1 and v_cache.stride(3) != 0
    if sums:
        v_cache = with_ones(v_cache)
        v = None if v is None else with_ones(v)
    new_k = k if turned_k is None else None
    expected_caches = [
        _after_append(cache, scale, new, lens, block_table)
        for cache, scale, new in zip((k_cache, v_cache), scales, (new_k, v), strict=True)
    ]
    if turned_k is not None and scales[0] is not None:
        expected_caches[0] = (expected_caches[0][0], scales[0].clone())
    function: Any = attention_with_kvcache
    results = function(
        q, k_cache, v_cache, k, v, cache_lens=cache_lens, block_table=block_table, num_splits=num_splits,
        backend=backend, return_lse=lse, **options,
    )  # fmt: skip
    if turned_k is not None:
        _check_turned(k_cache, scales[0], *turned_k, lens, block_table, expected_caches[0])
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
            found.append(run_step(own_q, own_k, own_v, entry, options))
        return found

    orders = orders_of(q.shape[-1], q.device)
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
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """q turned by its rotary positions in float64, and as plain eager PyTorch turns it; and k likewise. Without rotary
    positions q as it is, and None."""
    cos, sin, interleaved = (options.get(f"rotary_{name}") for name in ("cos", "sin", "interleaved"))
    if cos is None or sin is None:
        return q, q, None
    starts, added = torch.tensor(lens, device=q.device)[:, None], 0 if k is None else k.shape[2]
    of_q = starts + added - q.shape[2] + torch.arange(q.shape[2], device=q.device)
    exact_q, eager_q = (_turned(q.to(dtype), cos, sin, of_q, interleaved) for dtype in (torch.float64, q.dtype))
    if k is None:
        return exact_q, eager_q, None
    of_k = starts + torch.arange(added, device=q.device)
    exact, eager = (_turned(k.to(dtype), cos, sin, of_k, interleaved) for dtype in (torch.float64, k.dtype))
    return exact_q, eager_q, (exact, eager)


def _check_turned(
    cache: Tensor, scale: Tensor | None, exact: Tensor, eager: Tensor, lens: list[int], block_table: Tensor | None,
    expected: tuple[Tensor, Tensor | None],
) -> None:  # fmt: skip
    """Hold the new rows in a cache to the rule, and write them into what the cache is expected to hold."""
    bytes_ = cache.view(torch.uint8) if scale is not None else cache
    places = _places(lens, exact.shape[2], block_table, cache)
    written = cache[places]  # (B, L, Hk, D)
    exact, eager = exact.transpose(1, 2), eager.transpose(1, 2)
    if scale is not None:
        given = None if scale.ndim == 3 else scale.reshape(1, 1, -1, 1)
        values, measured = quantise(eager, given, cache.dtype)
        eager = values.to(eager.dtype) * measured.to(eager.dtype)
        written = written.to(eager.dtype) * (scale[places][..., None] if given is None else given).to(eager.dtype)
    assert_parity(written, exact, eager, "turned k")
    ours = expected[0] if scale is None else expected[0].view(torch.uint8)
    ours[places] = bytes_[places]
    if scale is not None and expected[1] is not None and scale.ndim == 3:
        expected[1][places] = scale[places]


def _places(lens: list[int], added: int, block_table: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """(page or batch entry, slot) of every new row, (B, Lnew) each."""
    position = torch.tensor(lens)[:, None] + torch.arange(added)
    if block_table is None:
        return torch.arange(len(lens))[:, None].expand_as(position), position
    pages = block_table.cpu().long().gather(1, position // cache.shape[1])
    return pages, position % cache.shape[1]


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


def run_step(q: Tensor, k: Tensor, v: Tensor, entry: int, options: dict[str, Any]) -> tuple[Tensor, ...]:
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
    effects = rounding.effects({"q": q, "k": k, "v": v, "dout": out}, own, 0, out, lse, out)
    return out, lse, effects["out"][0], effects["lse"][0]

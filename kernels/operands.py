"""The named groups in which kernels take their arguments.

An absent operand is None, at any depth, which is a compile-time fact. Integers inside a group are encoded; see "Encoded
strides" in README.md. Lengths and sizes are plain arguments instead. Pass groups on unchanged: inside a kernel, Triton
cannot rebuild a group that holds None.
"""

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """Rows of every batch entry and head: q, k, v, out and gradients; or the rows of a KV cache."""

    ptr: Any
    """None for a gradient that another launch makes"""
    strides: Any
    """(batch, head, row) from `launch.encode_strides`"""


class Results(NamedTuple):
    """The tensors that the forward kernel fills."""

    out: Any
    """`Rows`"""
    lse: Any
    """float32 (batch, q_heads, rows), contiguous"""
    statistics: Any
    """float32 (2, batch, q_heads, rows), contiguous: see `scores.store_statistics`"""


class Cache(NamedTuple):
    """The rows of a KV cache, of every page, slot and head."""

    ptr: Any
    strides: Any
    """(page, slot, head, column or None if adjacent) from `launch.encode_strides`"""
    scale: Any
    """float32, the factor of a row's numbers; None if the cache is not quantised"""
    scale_strides: Any
    """(page, slot, head), encoded; page and slot are None if all rows of a head share one scale"""


class Turning(NamedTuple):
    """Rotary positions: tables, and the queries that the call turns beside its new keys."""

    cos: Any
    """float (positions, R / 2), contiguous; None if nothing turns. Test this and not the group"""
    sin: Any
    q: Any
    """`Rows`"""
    out: Any
    """`Rows`, of the turned queries"""


class Scores(NamedTuple):
    """A mask or a bias, broadcast to (batch, head, query, key) by strides of 0."""

    ptr: Any
    """None if absent. Test this and not the group: Triton 3.6.0 cannot compare a tuple that holds None."""
    strides: Any
    """from `launch.encode_wide`; None for heads or queries: all share one; None for keys: adjacent elements"""
    columns: Any
    """the number of its columns, encoded; keys without one are allowed and have no bias. None: every key has one"""
    unit: Any
    """16 if the strides count units of 16 elements; None if a row may begin at any element"""


class Terms(NamedTuple):
    """The terms that change the products of queries and keys before the softmax."""

    mask: Any
    """`Scores`; 0 forbids"""
    bias: Any
    """`Scores`"""
    slopes: Any
    """float32 (batch, q_heads) or None"""
    sinks: Any
    """float32 (q_heads,) or None"""
    scale: Any
    """positive"""
    softcap: Any
    to_base_2: Any
    """log2(e) times softcap, or else scale: the factor that `finish_scores` leaves to the exponential if it adds no
    term"""


class Dropout(NamedTuple):
    seed: Any
    """int64, or None without dropout"""
    part: Any
    """None, or the seed again if these follow it: first batch entry, head, row, step of rows, key, step of keys"""
    p: Any
    keep_scale: Any
    """the factor of kept probabilities"""


class Packed(NamedTuple):
    """The starts of packed sequences, int (sequences + 1,), or None."""

    q: Any
    k: Any
    used: Any
    """int (sequences,), the number of keys that each one uses; or None"""


class Sparse(NamedTuple):
    """The lines of a block mask, by query or by key: see `fastattn.block_mask.BlockTensors`."""

    lines: Any
    """None without a block mask"""
    entries: Any
    pool: Any
    batch_stride: Any
    """the distance between batch entries in lines, encoded"""
    head_stride: Any


class Table(NamedTuple):
    """A block mask as a table: the tile of the pool at each (batch, head, query block, key block)."""

    ptr: Any
    """None without a block mask"""
    pool: Any
    batch_stride: Any
    head_stride: Any


class BiasGradient(NamedTuple):
    """The contiguous gradient of a bias: encoded sizes, None along the dimensions that the kernel sums over."""

    ptr: Any
    batches: Any
    heads: Any
    rows: Any
    cols: Any


class Partial(NamedTuple):
    """Results of one split of the keys; None if the keys are not divided."""

    out: Any
    """float32 (splits, rows, Dv), normalised"""
    statistics: Any
    """float32 (2, splits, rows): maximum and log2 of the sum, as in the forward kernel"""

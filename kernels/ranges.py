"""The tiles that a program computes: positions, packed sequences, edge and inner tiles, lines of a block mask."""

import triton
import triton.language as tl

from .tiles import decode_size

# Side of the tiles of a block mask. Every launch configuration has tiles that divide it.
SPARSE_BLOCK: tl.constexpr = tl.constexpr(128)


@triton.jit
def query_offset(q_offset, q_offset_ptr, batch, q_len, kv_len):
    """The absolute position of query row 0 of this batch entry, clamped to a range that is safe in int32."""
    if q_offset_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(q_offset_ptr + batch), -(1 << 30)), 1 << 30).to(tl.int32)
    elif q_offset is None:
        return kv_len - q_len
    else:
        return q_offset


@triton.jit
def locate(program, cu_seqlens_ptr, sequences, heads, length, BLOCK: tl.constexpr, scale=1):
    """(tile, number of tiles, batch, head) of a program: tiles of ``length`` rows of each head of each batch entry.

    A packed sequence has ``scale`` times the rows that ``cu_seqlens`` gives. The host sizes the grid for packed
    sequences without reading their lengths: the slots of sequence b start at ``cu_seqlens[b] // BLOCK + b``, which
    leaves at least as many slots as it has tiles. A binary search finds the sequence of a slot. Lengths 30, 0, 70 with
    BLOCK 32 have slots 0, 1 and 2 to 5. A tile may lie after the last one of its sequence.
    """
    if cu_seqlens_ptr is None:
        tiles = tl.cdiv(length, BLOCK)
        batch_head = (program // tiles).to(tl.int64)
        return program % tiles, tiles, batch_head // heads, batch_head % heads
    else:
        slots = length // BLOCK + sequences
        slot = program % slots
        batch, above = slot * 0, slot * 0 + sequences
        while above - batch > 1:
            middle = (batch + above) // 2
            before = tl.load(cu_seqlens_ptr + middle).to(tl.int32) * scale // BLOCK + middle <= slot
            batch = tl.where(before, middle, batch)
            above = tl.where(before, above, middle)
        tile = slot - (tl.load(cu_seqlens_ptr + batch).to(tl.int32) * scale // BLOCK + batch)
        return tile, slots, batch.to(tl.int64), (program // slots).to(tl.int64)


@triton.jit
def row_count(packed, sequences, q_heads, q_len):
    """Query rows of all heads and batch entries, 64-bit. In memory, packed sequences are one batch entry."""
    entries = sequences if packed.q is None else 1
    return tl.cast(q_len, tl.int64) * q_heads * entries


@triton.jit
def rows_of(cu_seqlens_ptr, batch, length):
    """(batch entry in memory, first row, number of rows): packed sequences are one batch entry in memory."""
    if cu_seqlens_ptr is None:
        return batch, 0, length
    else:
        first = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        return batch * 0, first, (tl.load(cu_seqlens_ptr + batch + 1) - first).to(tl.int32)


@triton.jit
def keys_of(packed, batch, length):
    """`rows_of` for keys: the number stops at the keys that a packed sequence uses."""
    entry, first, count = rows_of(packed.k, batch, length)
    if packed.used is not None:
        count = tl.minimum(tl.maximum(tl.load(packed.used + batch), 0), count).to(tl.int32)
    return entry, first, count


@triton.jit
def tile_ranges(start, inner_start, inner_end, end, past_end, READS_SCORES: tl.constexpr, BLOCK: tl.constexpr):
    """Split the visible range ``start .. end`` into edge tiles on both sides and inner tiles, which are fully visible.

    Returns (start, edges_left, right_start, edges, inner_start, inners); README.md has a picture. There are ``edges``
    edge tiles: ``edges_left`` of them start at ``start``, the others at ``right_start``. ``inners`` inner tiles start
    at ``inner_start``. Kernels read a mask or bias (``READS_SCORES``) at every index of a tile, so if the program's own
    tile reaches ``past_end``, all tiles are edge tiles.
    """
    start = start // BLOCK * BLOCK
    limit = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, start)
    inner_start = tl.minimum(tl.maximum(tl.cdiv(inner_start, BLOCK) * BLOCK, start), limit)
    right_start = tl.maximum(inner_end // BLOCK * BLOCK, inner_start)
    if READS_SCORES:
        right_start = tl.where(past_end, inner_start, right_start)
    edges_left = (inner_start - start) // BLOCK
    edges = edges_left + tl.maximum(tl.cdiv(end - right_start, BLOCK), 0)
    return start, edges_left, right_start, edges, inner_start, (right_start - inner_start) // BLOCK


@triton.jit
def visible_keys(row, offset, left, right, kv_len, BLOCK_M: tl.constexpr):
    """The keys ``start .. end`` that some query of the tile ``row`` sees."""
    start, end = 0, kv_len
    if right is not None:
        end = tl.minimum(tl.maximum(row + BLOCK_M + offset + right, 0), kv_len)
    if left is not None:
        start = tl.minimum(tl.maximum(row + offset - left, 0), kv_len)
    return start, end


@triton.jit
def key_range(
    row, offset, left, right, q_len, kv_len, READS_SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tile_ranges` over the keys that the query tile ``row`` sees."""
    start, end = visible_keys(row, offset, left, right, kv_len, BLOCK_M)
    inner_start, inner_end = 0, kv_len
    if right is not None:
        inner_end = tl.minimum(tl.maximum(row + offset + right + 1, 0), kv_len)
    if left is not None:
        inner_start = tl.minimum(tl.maximum(row + BLOCK_M - 1 + offset - left, 0), kv_len)
    return tile_ranges(start, inner_start, inner_end, end, row + BLOCK_M > q_len, READS_SCORES, BLOCK_N)


@triton.jit
def first_key(kv_start_ptr, batch, kv_len):
    """The first key of a batch entry that takes part."""
    return tl.minimum(tl.maximum(tl.load(kv_start_ptr + batch), 0), kv_len).to(tl.int32)


@triton.jit
def skip_before(first, start, edges_left, right_start, edges, inner_start, inners, BLOCK: tl.constexpr):
    """`tile_ranges` over keys without those before ``first``; the tile of ``first`` is an edge tile."""
    begin, right = first // BLOCK * BLOCK, edges - edges_left
    start = tl.maximum(start, tl.minimum(begin, right_start))
    inner_start = tl.minimum(tl.maximum(inner_start, tl.cdiv(first, BLOCK) * BLOCK), right_start)
    edges_left, inners = (inner_start - start) // BLOCK, (right_start - inner_start) // BLOCK
    skipped = tl.maximum(begin - right_start, 0) // BLOCK
    edges = edges_left + tl.maximum(right - skipped, 0)
    return start, edges_left, right_start + skipped * BLOCK, edges, inner_start, inners


@triton.jit
def seen_tiles(
    row, offset, left, right, q_len, kv_len, kv_start_ptr, batch, READS_SCORES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first key that takes part, 0 without ``kv_start_ptr``; and `key_range` from there on)."""
    start, edges_left, right_start, edges, inner_start, inners = key_range(
        row, offset, left, right, q_len, kv_len, READS_SCORES, BLOCK_M, BLOCK_N
    )
    first = 0
    if kv_start_ptr is not None:
        first = first_key(kv_start_ptr, batch, kv_len)
        start, edges_left, right_start, edges, inner_start, inners = skip_before(
            first, start, edges_left, right_start, edges, inner_start, inners, BLOCK_N
        )
    return first, start, edges_left, right_start, edges, inner_start, inners


@triton.jit
def unseen_before(first, col, right_start, edges, inner_start, inners, BLOCK: tl.constexpr):
    """(right_start, edges, inners) of `query_range` for the key tile ``col``: no tiles before ``first``, edge tiles at
    it."""
    apart = col < first
    right_start, edges = tl.where(apart, inner_start, right_start), tl.where(apart, edges + inners, edges)
    return right_start, tl.where(col + BLOCK <= first, 0, edges), tl.where(apart, 0, inners)


@triton.jit
def query_range(
    col, offset, left, right, q_len, kv_len, READS_SCORES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`tile_ranges` over the queries that see the key tile ``col``."""
    start, inner_start, inner_end, end = 0, 0, q_len, q_len
    row = col - offset
    if right is not None:
        start = tl.minimum(tl.maximum(row - right, 0), q_len)
        inner_start = tl.minimum(tl.maximum(row + BLOCK_N - 1 - right, 0), q_len)
    if left is not None:
        end = tl.minimum(tl.maximum(row + BLOCK_N + left, 0), q_len)
        inner_end = tl.minimum(tl.maximum(row + left + 1, 0), q_len)
    return tile_ranges(start, inner_start, inner_end, end, col + BLOCK_N > kv_len, READS_SCORES, BLOCK_M)


@triton.jit
def tile_position(tile, start, edges_left, right_start, inner_start, EDGE: tl.constexpr, BLOCK: tl.constexpr):
    """The start of tile number ``tile`` of the edge or the inner tiles.

    Inner tiles use 64 bits from the start: only then can the compiler see that addresses grow by a constant.
    """
    if EDGE:
        return tl.where(tile < edges_left, start + tile * BLOCK, right_start + (tile - edges_left) * BLOCK)
    else:
        return tl.cast(inner_start, tl.int64) + tl.cast(tile, tl.int64) * BLOCK


@triton.jit
def tile_of_pass(tile, start, edges_left, inner_start, inners, PASS: tl.constexpr):
    """The first three arguments of `tile_position`, or two of `sparse_position`, for tile number ``tile`` of a pass.
    Pass 0 goes over the inner tiles, 1 over the edge tiles, 2 over the inner and then the edge tiles, all as edge
    tiles.
    """
    if PASS == 0:
        return tile, inner_start, edges_left
    elif PASS == 1:
        return tile, start, edges_left
    else:
        inner = tile < inners
        first, behind = tl.where(inner, inner_start, start), tl.where(inner, inners, edges_left)
        return tl.where(inner, tile, tile - inners), first, behind


@triton.jit
def sparse_line(sparse, batch, head, index):
    """The line of an `operands.Sparse` or `Table` that contains query or key ``index`` of a head of a batch entry."""
    first = batch * decode_size(sparse.batch_stride) + head * decode_size(sparse.head_stride)
    return first + (index + batch * 0) // SPARSE_BLOCK


@triton.jit
def sparse_range(sparse, line, BLOCK: tl.constexpr):
    """(first edge entry, edges, first inner entry, inners) of a line of a block mask, counted in tiles of ``BLOCK``.

    Its partial tiles are edge tiles; its full ones lie within the sequence.
    """
    offsets_ptr = sparse.lines + line * 3
    start, inner_start, end = tl.load(offsets_ptr), tl.load(offsets_ptr + 1), tl.load(offsets_ptr + 2)
    pieces: tl.constexpr = SPARSE_BLOCK // BLOCK
    return start, (inner_start - start) * pieces, inner_start, (end - inner_start) * pieces


@triton.jit
def sparse_position(tile, first_entry, sparse, BLOCK: tl.constexpr):
    """The start of tile number ``tile`` of the edge or the inner tiles; ``first_entry`` is the entry of the first."""
    pieces: tl.constexpr = SPARSE_BLOCK // BLOCK
    tile += first_entry * 0  # the interpreter's loop counters are Python integers
    block = tl.load(sparse.entries + (first_entry + tile // pieces).to(tl.int64) * 2)
    return block * SPARSE_BLOCK + tile % pieces * BLOCK


@triton.jit
def sparse_pool_tile(tile, first_entry, sparse, BLOCK: tl.constexpr):
    """Pointer to the tile of the pool that contains edge tile number ``tile``."""
    pieces: tl.constexpr = SPARSE_BLOCK // BLOCK
    tile += first_entry * 0
    return pool_tile(sparse.pool, tl.load(sparse.entries + (first_entry + tile // pieces).to(tl.int64) * 2 + 1))


@triton.jit
def pool_tile(pool_ptr, number):
    return pool_ptr + number.to(tl.int64) * (SPARSE_BLOCK * SPARSE_BLOCK)

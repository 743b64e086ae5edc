"""Activate and keep the largest: the epilogue that the Triton kernels of this folder share.

`triton` runs it on h, `triton_linear` on the matrix product that makes h.
Letters: N tokens, M edges, K kept, G groves.
"""

import triton
import triton.language as tl

from kalmagrove_kernels.edge.triton_basis import base_value, count_terms, evaluate


@triton.jit
def _halves(key, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(key, [ROWS, 2, WIDTH // 2]), (0, 2, 1)))


@triton.jit
def _order(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _quick(size, cols, place, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [ROWS, PLACES] of the K largest of every row; whether any of them is in doubt.

    A key holds the high bits of a size and, in the low log2(WIDTH), the column: one maximum finds
    both. Each lane sorts its keys by four, so that a round looks at, and removes, heads only. In
    doubt are neighbours of the first K + 1 with equal high bits. A negative size is none.
    """
    low: tl.constexpr = WIDTH - 1
    key = (size & ~low) | (low - cols)
    left, right = _halves(key, ROWS, WIDTH)
    a, b = _halves(left, ROWS, WIDTH // 2)
    c, d = _halves(right, ROWS, WIDTH // 2)
    a, b = _order(a, b)
    c, d = _order(c, d)
    a, c = _order(a, c)
    b, d = _order(b, d)
    b, c = _order(b, c)
    most = tl.max(a, axis=1, keep_dims=True)
    top = tl.zeros([ROWS, place.shape[1]], tl.int32) - 1
    after = top
    for r in tl.static_range(K):
        top = tl.where(place == r, most, top)
        won = a == most
        a, b = tl.where(won, b, a), tl.where(won, c, b)
        c, d = tl.where(won, d, c), tl.where(won, -1, d)
        most = tl.max(a, axis=1, keep_dims=True)
        after = tl.where(place == r, most, after)
    doubt = (after >= 0) & ((top ^ after) <= low)
    return low - (top & low), tl.max(tl.max(doubt.to(tl.int32), axis=1), axis=0)


@triton.jit
def _exact(size, cols, place, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns [ROWS, PLACES] of the K largest of every row; of equals the lower column first."""
    found = tl.zeros([ROWS, place.shape[1]], tl.int32)
    for r in tl.static_range(K):
        most = tl.max(size, axis=1, keep_dims=True)
        at = tl.min(tl.where(size == most, cols, WIDTH - 1), axis=1, keep_dims=True)
        found = tl.where(place == r, at, found)
        size = tl.where(cols == at, -1, size)
    return found


@triton.jit
def _activate(
    h,
    low,
    high,
    own,
    scale,
    WIDTH: tl.constexpr,
    BASE: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """E of h, fp32. own, scale: pointers to row 0 of the table and to the scales."""
    e = evaluate(h, low, high, own, WIDTH, KIND, DEGREE, GRID, CONSTANTS)
    if BASE != "none":
        e += tl.load(scale).to(tl.float32) * base_value(h, BASE)
    return e


@triton.jit
def keep(
    h,
    h_ptr,
    rows,
    count,
    group,
    table,
    scale,
    span,
    edges,
    value,
    index,
    partial,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BASE: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """The epilogue of a tile of h [ROWS, WIDTH]: activate, select, store what is kept.

    h_ptr: where h lies in memory too: the kept are activated once more, which is cheaper than to
    look for them in the tile. rows: int64 [ROWS]; those from `count` on are no rows. group: that of
    each row [ROWS or 1, 1]. table: of `tabulated`. partial: where this program's energy and outside
    count go. PLACES: K padded to a power of two.
    """
    cols = tl.arange(0, WIDTH)[None, :]
    valid = (rows < count)[:, None] & (cols < edges)
    low, high = tl.load(span + 2 * group), tl.load(span + 2 * group + 1)
    own = table + group * (count_terms(KIND, DEGREE, GRID, SIZE) * WIDTH)
    scales = scale + group * edges if BASE != "none" else table
    h = tl.where(valid, h.to(tl.float32), low)
    e = _activate(
        h,
        low,
        high,
        own + cols,
        # Of no known contiguity, as the look-ups in the table are: so one layout does for both.
        scales + tl.where(valid, cols, 0),
        WIDTH,
        BASE,
        KIND,
        DEGREE,
        GRID,
        CONSTANTS,
    )
    e = tl.where(valid, e, 0.0)
    tl.store(partial, tl.sum(tl.sum(e * e, axis=1), axis=0))
    outside = ((h < low) | (h > high)).to(tl.int32)
    tl.store(partial + 1, tl.sum(tl.sum(outside, axis=1), axis=0).to(tl.float32))

    place = tl.arange(0, PLACES)[None, :]
    stored = rows[:, None] * K + place
    real = (rows < count)[:, None] & (place < K)
    if GIVEN:
        at = (tl.load(index + stored, mask=real, other=0) - group * edges).to(tl.int32)
        at = tl.where(real, at, 0)
    else:
        # A NaN loses its sign too: it is larger than any number.
        size = tl.where(cols < edges, e.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
        at, doubt = _quick(size, cols, place, K, ROWS, WIDTH)
        if doubt > 0:  # rare, but for rows of zeros and the like
            at = _exact(size, cols, place, K, ROWS, WIDTH)
        at = tl.where(real, at, 0)
        tl.store(index + stored, (group * edges + at).to(tl.int64), mask=real)
    kept = tl.load(h_ptr + rows[:, None] * edges + at, mask=real, other=0.0).to(tl.float32)
    kept = _activate(
        kept,
        low,
        high,
        own + at,
        scales + at,
        WIDTH,
        BASE,
        KIND,
        DEGREE,
        GRID,
        CONSTANTS,
    )
    tl.store(value + stored, kept, mask=real)

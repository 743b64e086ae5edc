"""Triton kernels of the basis projection. `stages` launches them; `triton` strings them together.

Rows are pairs of token and channel in the order of `kalmagrove_kernels.permute`, so those of a
channel c are start[c] up to start[c + 1]; a program finds its channel and rows by itself, as the
host never learns the counts. Sums are fp32, in an order that does not depend on the launch: two
runs give the same bits.
Letters: N tokens, D model width, C channels, R rank, K kept, S = N * K rows. A block of them has
ROWS rows, RANKS ranks, DEPTH steps of the summed width, COLUMNS output columns.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _tile(
    start_C1,
    channels,
    usual,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHARERS: tl.constexpr = 1,
):
    """Channel, first row and end of the channel's rows, for the program's tile of ROWS rows.

    SHARERS programs in a row have the same tile.

    Channel c owns the tile numbers start[c] // ROWS + c up to start[c + 1] // ROWS + c: enough for
    its rows, apart from all others', and S // ROWS + C in all. A tile whose first row is not before
    the end is empty.

    Programs that run at once should share rows of x and weights in the L2 cache: GROUP channels
    take turns, tile by tile, if each has the `usual` number of tiles (and any order is correct).
    """
    tile = tl.program_id(0) // SHARERS
    if GROUP > 1:
        turn = GROUP * usual
        first_tile = (tile // turn) * turn
        if first_tile + turn <= tl.num_programs(0) // SHARERS:
            tile = first_tile + (tile % GROUP) * usual + (tile % turn) // GROUP
    slot = tl.arange(0, SLOTS)
    real = slot < channels
    start = tl.load(start_C1 + slot, mask=real, other=0)
    stop = tl.load(start_C1 + slot + 1, mask=real, other=0)
    before = real & (start // ROWS + slot <= tile)
    channel = tl.sum(before.to(tl.int32), 0) - 1
    mine = slot == channel
    begin = tl.sum(tl.where(mine, start, 0), 0)
    end = tl.sum(tl.where(mine, stop, 0), 0)
    return channel, begin + (tile - begin // ROWS - channel) * ROWS, end


@triton.jit
def _pairs(order_S, row, GATHER: tl.constexpr):
    """The pair that stands in a sorted row; without `order` rows are pairs."""
    pair = row
    if GATHER:
        pair = tl.load(order_S + row)
    return pair


@triton.jit
def _inner(
    x_ND,
    w_RD,
    token,
    rank,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x at the tokens times w^T at the ranks: [tokens, ranks], summed over D in fp32."""
    d = tl.arange(0, DEPTH)
    x_ptrs = x_ND + token.to(tl.int64)[:, None] * D + d[None, :]
    w_ptrs = w_RD + rank[None, :] * D + d[:, None]
    sums = tl.zeros([token.shape[0], rank.shape[0]], tl.float32)
    for at in tl.range(0, D, DEPTH, num_stages=STAGES):
        if D % DEPTH == 0:
            x = tl.load(x_ptrs + at)
            w = tl.load(w_ptrs + at)
        else:
            x = tl.load(x_ptrs + at, mask=(at + d)[None, :] < D, other=0.0)
            w = tl.load(w_ptrs + at, mask=(at + d)[:, None] < D, other=0.0)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _act(z, INNER_SILU: tl.constexpr):
    if INNER_SILU:
        z *= tl.sigmoid(z)
    return z


@triton.jit(do_not_specialize=["channels", "usual"])
def rank_kernel(
    x_ND,
    w_CRD,
    order_S,
    start_C1,
    z_SR,
    gate_S,
    a_SR,
    channels,
    usual,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    INNER_SILU: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = x w_c^T, and gate act(z) as well where there are gates. Axis 1: blocks of ranks."""
    channel, first, end = _tile(start_C1, channels, usual, GROUP, ROWS, SLOTS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    # Rows and ranks past the end repeat the last one instead of asking for a mask at every step.
    pair = _pairs(order_S, tl.minimum(row, end - 1), GATHER)
    w_RD = w_CRD + channel.to(tl.int64) * (R * D)
    z = _inner(x_ND, w_RD, pair // K, tl.minimum(rank, R - 1), D, DEPTH, STAGES, PRECISION)
    z = z.to(z_SR.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * R + rank[None, :]
    live = (row < end)[:, None] & (rank < R)[None, :]
    tl.store(z_SR + at, z, mask=live)
    if GATED:
        gate = tl.load(gate_S + pair).to(tl.float32)[:, None]
        a = gate * _act(z.to(tl.float32), INNER_SILU)
        tl.store(a_SR + at, a.to(a_SR.dtype.element_ty), mask=live)


@triton.jit
def _weighted(
    z_SR,
    gate_S,
    row,
    pair,
    rank,
    live,
    R: tl.constexpr,
    GATED: tl.constexpr,
    INNER_SILU: tl.constexpr,
):
    """gate * act(z) in the type of z, or z itself; zero where not live."""
    z = tl.load(z_SR + row.to(tl.int64)[:, None] * R + rank[None, :], mask=live, other=0.0)
    if GATED:
        gate = tl.load(gate_S + pair).to(tl.float32)[:, None]
        z = (gate * _act(z.to(tl.float32), INNER_SILU)).to(z.dtype)
    return z


@triton.jit
def _in_registers(a):
    """a itself. The compiler puts an operand that it knows to be loaded into shared memory; of one
    put together from halves it does not know, and a second program fits on the multiprocessor."""
    rows: tl.constexpr = a.shape[0]
    half: tl.constexpr = a.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(a, (rows, 2, half)), (0, 2, 1)))
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), a.shape)


@triton.jit
def _store_columns(
    a,
    w_RD,
    out_S1,
    live,
    column_0,
    PIECE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store a w, [rows, PIECE] from column_0 on, at the live of the row pointers."""
    rank = tl.minimum(tl.arange(0, a.shape[1]), R - 1)  # a is zero where there is no rank
    w_ptrs = w_RD + rank[:, None] * D
    for at in tl.range(column_0, tl.minimum(column_0 + PIECE, D), COLUMNS, num_stages=STAGES):
        column = (at + tl.arange(0, COLUMNS))[None, :]
        if D % COLUMNS == 0:
            w = tl.load(w_ptrs + column)
        else:
            w = tl.load(w_ptrs + column, mask=column < D, other=0.0)
        out = tl.dot(a, w, input_precision=PRECISION).to(out_S1.dtype.element_ty)
        # Many times the size of the L2 cache: it need not drive out what others read again.
        tl.store(out_S1 + column, out, mask=live & (column < D), eviction_policy=EVICT)


@triton.jit(do_not_specialize=["channels", "usual"])
def expand_kernel(
    z_SR,
    gate_S,
    w_CRD,
    order_S,
    start_C1,
    out_SD,
    channels,
    usual,
    D: tl.constexpr,
    R: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    INNER_SILU: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
    HELD: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = (gate act(z)) w_c, written where the pair stands.

    Programs next to each other write the pieces of PIECE columns of the same rows, so that a row is
    whole before the L2 cache has to write parts of it to memory.
    """
    PIECES: tl.constexpr = (D + PIECE - 1) // PIECE
    channel, first, end = _tile(start_C1, channels, usual, GROUP, ROWS, SLOTS, PIECES)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    pair = _pairs(order_S, tl.minimum(row, end - 1), GATHER)
    r = tl.arange(0, RANKS)
    w_RD = w_CRD + channel.to(tl.int64) * (R * D)
    out_S1 = out_SD + pair.to(tl.int64)[:, None] * D
    column_0 = (tl.program_id(0) % PIECES) * PIECE
    live = (row < end)[:, None]
    if R <= RANKS:
        a = _weighted(z_SR, gate_S, row, pair, r, live & (r < R)[None, :], R, GATED, INNER_SILU)
        if HELD:
            a = _in_registers(a)
        _store_columns(
            a, w_RD, out_S1, live, column_0, PIECE, D, R, COLUMNS, STAGES, EVICT, PRECISION
        )
    else:
        for at in range(column_0, tl.minimum(column_0 + PIECE, D), COLUMNS):
            column = (at + tl.arange(0, COLUMNS))[None, :]
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            for rank_0 in tl.range(0, R, RANKS, num_stages=STAGES):
                rank = rank_0 + r
                a = _weighted(
                    z_SR, gate_S, row, pair, rank, live & (rank < R)[None, :], R, GATED, INNER_SILU
                )
                w_ptrs = w_RD + tl.minimum(rank, R - 1)[:, None] * D
                w = tl.load(w_ptrs + column, mask=column < D, other=0.0)
                sums = tl.dot(a, w, sums, input_precision=PRECISION)
            tl.store(out_S1 + column, sums.to(out_SD.dtype.element_ty), mask=live & (column < D))


@triton.jit(do_not_specialize=["channels", "usual"])
def fused_kernel(
    x_ND,
    gate_S,
    v_CRD,
    u_CRD,
    order_S,
    start_C1,
    z_SR,
    out_SD,
    channels,
    usual,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INNER_SILU: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`rank_kernel` and `expand_kernel` in one: z stays on the chip (and is kept for backward)."""
    channel, first, end = _tile(start_C1, channels, usual, GROUP, ROWS, SLOTS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    rank = tl.arange(0, RANKS)
    pair = tl.load(order_S + tl.minimum(row, end - 1))
    w_offset = channel.to(tl.int64) * (R * D)
    clamped = tl.minimum(rank, R - 1)
    z = _inner(x_ND, v_CRD + w_offset, pair // K, clamped, D, DEPTH, STAGES, PRECISION)
    z = z.to(z_SR.dtype.element_ty)
    live = (row < end)[:, None]
    real = live & (rank < R)[None, :]
    tl.store(z_SR + row.to(tl.int64)[:, None] * R + rank[None, :], z, mask=real)
    gate = tl.load(gate_S + pair).to(tl.float32)[:, None]
    a = tl.where(real, gate * _act(z.to(tl.float32), INNER_SILU), 0.0).to(z.dtype)
    out_S1 = out_SD + pair.to(tl.int64)[:, None] * D
    _store_columns(a, u_CRD + w_offset, out_S1, live, 0, D, D, R, COLUMNS, STAGES, EVICT, PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    rows_SD,
    y_ND,
    tokens,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = the sum of a token's K rows, k = 0 first."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    live = (token < tokens) & (column < D)
    row_ptrs = rows_SD + token * (K * D) + column
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.static_range(K):
        # Read once: leave the cache to what is read again.
        part = tl.load(row_ptrs + k * D, mask=live, other=0.0, eviction_policy="evict_first")
        sums += part.to(tl.float32)
    tl.store(y_ND + token * D + column, sums.to(y_ND.dtype.element_ty), mask=live)

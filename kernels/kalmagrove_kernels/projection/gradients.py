"""Triton kernels of the projection's gradients: beside z, and of the weights.

The rest of the backward pass is `kernels.expand_kernel` and `kernels.combine_kernel` again.
Letters and conventions as in `kernels`.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kalmagrove_kernels.projection.kernels import _act, _inner, _pairs, _tile


@triton.jit
def _halves(t):
    """The left and the right half of the columns; where they lie in registers nothing moves."""
    rows: tl.constexpr = t.shape[0]
    half: tl.constexpr = t.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(t, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def _through_act(
    da, z_SR, a_SR, dz_SR, gate, row, rank, end, R: tl.constexpr, INNER_SILU: tl.constexpr
):
    """Store a and dz of these ranks; returns their part of dgate."""
    at = row.to(tl.int64)[:, None] * R + rank[None, :]
    live = (row < end)[:, None] & (rank < R)[None, :]
    z = tl.load(z_SR + at, mask=live, other=0.0).to(tl.float32)
    act = _act(z, INNER_SILU)
    dgate = tl.sum(da * act, 1)  # act(0) = 0 where there is no rank
    dz = gate[:, None] * da
    if INNER_SILU:
        sigmoid = tl.sigmoid(z)
        dz *= sigmoid + act * (1.0 - sigmoid)
    tl.store(dz_SR + at, dz.to(dz_SR.dtype.element_ty), mask=live)
    tl.store(a_SR + at, (gate[:, None] * act).to(a_SR.dtype.element_ty), mask=live)
    return dgate


@triton.jit(do_not_specialize=["channels", "usual"])
def rank_backward_kernel(
    dy_ND,
    u_CRD,
    z_SR,
    gate_S,
    order_S,
    start_C1,
    a_SR,
    dz_SR,
    dgate_S,
    channels,
    usual,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INNER_SILU: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From da = dy u_c^T: dgate = <da, act(z)>, dz = gate da act'(z), and a = gate act(z) again.

    All ranks of a row are summed in one program, RANKS at a time. gate and dgate are in pair order.
    """
    channel, first, end = _tile(start_C1, channels, usual, GROUP, ROWS, SLOTS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    pair = tl.load(order_S + tl.minimum(row, end - 1))
    gate = tl.load(gate_S + pair).to(tl.float32)
    u_RD = u_CRD + channel.to(tl.int64) * (R * D)
    dgate = tl.zeros([ROWS], tl.float32)
    for rank_0 in tl.static_range(0, R, RANKS):
        rank = tl.minimum(rank_0 + tl.arange(0, RANKS), R - 1)
        da = _inner(dy_ND, u_RD, pair // K, rank, D, DEPTH, STAGES, PRECISION)
        # In halves: half the registers.
        half = rank_0 + tl.arange(0, RANKS // 2)
        left, right = _halves(da)
        dgate += _through_act(left, z_SR, a_SR, dz_SR, gate, row, half, end, R, INNER_SILU)
        half += RANKS // 2
        dgate += _through_act(right, z_SR, a_SR, dz_SR, gate, row, half, end, R, INNER_SILU)
    tl.store(dgate_S + pair, dgate.to(dgate_S.dtype.element_ty), mask=row < end)


@triton.jit(do_not_specialize=["split"])
def weights_kernel(
    a_SR,
    dy_ND,
    du_CRD,
    dz_SR,
    x_ND,
    dv_CRD,
    order_S,
    start_C1,
    split,
    K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    GATHER: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du_c = a^T dy and dv_c = dz^T x over one part of a channel's rows: [split, C, R, D].

    Axes: channel (fastest: programs that run at once then read the same columns of x or dy, which
    stay in the L2 cache); columns, the parts of each; blocks of ranks of du, then of dv.
    """
    channel = tl.program_id(0)
    part = tl.program_id(1) % split
    block = tl.program_id(2)
    blocks: tl.constexpr = (R + RANKS - 1) // RANKS
    if block < blocks:
        left_SR, right_ND, out_CRD = a_SR, dy_ND, du_CRD
    else:
        left_SR, right_ND, out_CRD = dz_SR, x_ND, dv_CRD
    rank = (block % blocks) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(1) // split * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(start_C1 + channel), tl.load(start_C1 + channel + 1)
    rows = (end - begin + split * DEPTH - 1) // (split * DEPTH) * DEPTH  # of a part
    begin += part * rows
    sums = tl.zeros([RANKS, COLUMNS], tl.float32)
    for first in tl.range(begin, tl.minimum(begin + rows, end), DEPTH, num_stages=STAGES):
        row = first + tl.arange(0, DEPTH)
        safe = tl.minimum(row, end - 1)
        token = _pairs(order_S, safe, GATHER) // K
        left = tl.load(
            left_SR + safe.to(tl.int64)[None, :] * R + rank[:, None],
            mask=(row < end)[None, :] & (rank < R)[:, None],
            other=0.0,
        )
        right_ptrs = right_ND + token.to(tl.int64)[:, None] * D + column[None, :]
        if D % COLUMNS == 0:
            right = tl.load(right_ptrs)
        else:
            right = tl.load(right_ptrs, mask=column[None, :] < D, other=0.0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    out_CRD += (part * tl.num_programs(0) + channel).to(tl.int64) * (R * D)
    out_ptrs = out_CRD + rank[:, None] * D + column[None, :]
    live = (rank < R)[:, None] & (column < D)[None, :]
    tl.store(out_ptrs, sums.to(out_CRD.dtype.element_ty), mask=live)

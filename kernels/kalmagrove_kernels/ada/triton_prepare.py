"""What ADA does to queries and keys before it attends, in one pass over them, and its gradients.

Convolution along the sequence, SiLU, RMS norm per head, rotation; each may be absent. A head is
worked on in two halves, as its rotary pairs are (i, R/2 + i). All in fp32 registers.
Letters: B batch, T tokens, C packed channels, H heads, R width of a head, P taps.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels.ada import cuda_convolve
from kalmagrove_kernels.ada.steps import Steps
from kalmagrove_kernels.launch import Launcher, cdiv, power_of_2


class Tile(NamedTuple):
    """Tokens and heads of a program, and its warps."""

    rows: int
    heads: int
    warps: int = 4


# With rotation a program takes several heads, which share the cosines and sines of its tokens.
TILES = {"plain": Tile(32, 1), "rotated": Tile(16, 8, 8)}
# Of the convolution's gradient: tokens of a program, of a step of it, channels, warps, and steps
# that are loaded ahead.
SPAN, STEP, COLUMNS, WARPS, STAGES = 256, 16, 64, 4, 3


@triton.jit
def _columns(slot_S, head, r_0, R: tl.constexpr, C, HALF: tl.constexpr, SLOTS: tl.constexpr):
    """Packed channels of the head's entries from r_0 on, and which of them there are."""
    half: tl.constexpr = (R + 1) // 2
    r = r_0 + tl.arange(0, HALF)
    there = (tl.arange(0, HALF) < half) & (r < R)
    col = head * R + r
    if SLOTS:
        col = tl.load(slot_S + col, mask=there, other=0).to(tl.int32)
        there = there & (col < C)
    return col, there


@triton.jit
def _convolved(
    x_BTC, taps_PC, segment_BT, batch, t, col, there, T, C, P: tl.constexpr, SEGMENTS: tl.constexpr
):
    """The channels `col` at the tokens t, after the convolution (P = 0: none), in fp32."""
    row = batch.to(tl.int64) * T + t
    live = (t < T)[:, None] & there[None, :]
    z = tl.load(x_BTC + row[:, None] * C + col[None, :], mask=live, other=0.0).to(tl.float32)
    if P > 0:
        own = tl.load(segment_BT + row, mask=t < T, other=0) if SEGMENTS else 0
        z *= tl.load(taps_PC + col, mask=there, other=0.0).to(tl.float32)[None, :]
        for p in tl.static_range(1, P):
            reached = live & (t >= p)[:, None]
            if SEGMENTS:
                same = tl.load(segment_BT + row - p, mask=(t >= p) & (t < T), other=0) == own
                reached = reached & same[:, None]
            ptrs = x_BTC + (row - p)[:, None] * C + col[None, :]
            x = tl.load(ptrs, mask=reached, other=0.0).to(tl.float32)
            z += x * tl.load(taps_PC + p * C + col, mask=there, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _turns(angle_THr, t, head, T, AHEADS, R: tl.constexpr, HALF: tl.constexpr):
    """Cosine and sine of the angles; AHEADS is 1 where all heads share them."""
    i = tl.arange(0, HALF)
    row = t * AHEADS + tl.minimum(head, AHEADS - 1)
    live = (t < T)[:, None] & (i < R // 2)[None, :]
    angle = tl.load(angle_THr + row[:, None] * (R // 2) + i[None, :], mask=live, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _inverse_rms(low, high, rank_H, head, eps, R: tl.constexpr, RANKS: tl.constexpr):
    rank = tl.load(rank_H + head).to(tl.float32) if RANKS else R * 1.0
    square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    return tl.rsqrt(square / rank + eps)[:, None], rank


@triton.jit
def prepare_kernel(
    x_BTC,
    taps_PC,
    slot_S,
    rank_H,
    angle_THr,
    segment_BT,
    y_BTHR,
    T,
    C,
    H,
    AHEADS,
    eps,
    R: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: blocks of tokens, blocks of heads, B."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, head_0 = tl.program_id(2), tl.program_id(1) * HEADS
    half: tl.constexpr = (R + 1) // 2
    entry = tl.arange(0, HALF)
    if ROTATE:
        cos, sin = _turns(angle_THr, t, head_0, T, AHEADS, R, HALF)
    for head in range(head_0, tl.minimum(head_0 + HEADS, H)):
        col_l, there_l = _columns(slot_S, head, 0, R, C, HALF, SLOTS)
        col_h, there_h = _columns(slot_S, head, half, R, C, HALF, SLOTS)
        low = _convolved(x_BTC, taps_PC, segment_BT, batch, t, col_l, there_l, T, C, P, SEGMENTS)
        high = _convolved(x_BTC, taps_PC, segment_BT, batch, t, col_h, there_h, T, C, P, SEGMENTS)
        if SILU:
            low, high = low * tl.sigmoid(low), high * tl.sigmoid(high)
        if NORM:
            inverse, _ = _inverse_rms(low, high, rank_H, head, eps, R, RANKS)
            low, high = low * inverse, high * inverse
        if ROTATE:
            if AHEADS > 1:
                cos, sin = _turns(angle_THr, t, head, T, AHEADS, R, HALF)
            low, high = low * cos - high * sin, high * cos + low * sin
        row = (batch.to(tl.int64) * T + t) * H + head
        y_ptrs = y_BTHR + row[:, None] * R + entry[None, :]
        live = (t < T)[:, None] & (entry < half)[None, :]
        tl.store(y_ptrs, low.to(y_BTHR.dtype.element_ty), mask=live)
        live = live & (half + entry < R)[None, :]
        tl.store(y_ptrs + half, high.to(y_BTHR.dtype.element_ty), mask=live)


@triton.jit
def _silu_gradient(da, z):
    sigmoid = tl.sigmoid(z)
    return da * sigmoid * (1.0 + z * (1.0 - sigmoid))


@triton.jit
def unprepare_kernel(
    dy_BTHR,
    x_BTC,
    taps_PC,
    slot_S,
    rank_H,
    angle_THr,
    segment_BT,
    dz_BTC,
    T,
    C,
    H,
    AHEADS,
    eps,
    R: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The gradient of what the convolution put out; the convolution is computed again."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, head_0 = tl.program_id(2), tl.program_id(1) * HEADS
    half: tl.constexpr = (R + 1) // 2
    entry = tl.arange(0, HALF)
    if ROTATE:
        cos, sin = _turns(angle_THr, t, head_0, T, AHEADS, R, HALF)
    for head in range(head_0, tl.minimum(head_0 + HEADS, H)):
        col_l, there_l = _columns(slot_S, head, 0, R, C, HALF, SLOTS)
        col_h, there_h = _columns(slot_S, head, half, R, C, HALF, SLOTS)
        row = (batch.to(tl.int64) * T + t) * H + head
        dy_ptrs = dy_BTHR + row[:, None] * R + entry[None, :]
        live_l, live_h = (t < T)[:, None] & there_l[None, :], (t < T)[:, None] & there_h[None, :]
        low = tl.load(dy_ptrs, mask=live_l, other=0.0).to(tl.float32)
        high = tl.load(dy_ptrs + half, mask=live_h, other=0.0).to(tl.float32)
        if ROTATE:
            if AHEADS > 1:
                cos, sin = _turns(angle_THr, t, head, T, AHEADS, R, HALF)
            low, high = low * cos + high * sin, high * cos - low * sin
        if NORM or SILU:
            z_l = _convolved(
                x_BTC, taps_PC, segment_BT, batch, t, col_l, there_l, T, C, P, SEGMENTS
            )
            z_h = _convolved(
                x_BTC, taps_PC, segment_BT, batch, t, col_h, there_h, T, C, P, SEGMENTS
            )
            if NORM:
                a_l, a_h = z_l, z_h
                if SILU:
                    a_l, a_h = z_l * tl.sigmoid(z_l), z_h * tl.sigmoid(z_h)
                inverse, rank = _inverse_rms(a_l, a_h, rank_H, head, eps, R, RANKS)
                a_l, a_h = a_l * inverse, a_h * inverse
                along = (tl.sum(low * a_l, 1) + tl.sum(high * a_h, 1)) / rank
                low = inverse * (low - a_l * along[:, None])
                high = inverse * (high - a_h * along[:, None])
            if SILU:
                low, high = _silu_gradient(low, z_l), _silu_gradient(high, z_h)
        dz_ptrs = dz_BTC + (batch.to(tl.int64) * T + t)[:, None] * C
        tl.store(dz_ptrs + col_l[None, :], low.to(dz_BTC.dtype.element_ty), mask=live_l)
        tl.store(dz_ptrs + col_h[None, :], high.to(dz_BTC.dtype.element_ty), mask=live_h)


@triton.jit
def unconvolve_kernel(
    dz_BTC,
    x_BTC,
    taps_PC,
    segment_BT,
    dx_BTC,
    part_NPC,
    T,
    C,
    P: tl.constexpr,
    FIRST: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx_s = sum_p taps[p] dz_(s + p), and what a span of tokens adds to dtaps.

    dtaps of four taps from FIRST on, dx only with the first of them: their sums stay in registers,
    element by element, up to the end of the span. Grid: C, spans, B.
    """
    span, batch = tl.program_id(1), tl.program_id(2)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = col < C
    sum_0 = tl.zeros([STEP, COLUMNS], tl.float32)
    sum_1, sum_2, sum_3 = sum_0, sum_0, sum_0
    last: tl.constexpr = P if FIRST == 0 else min(P, FIRST + 4)
    for first in tl.range(span * SPAN, tl.minimum((span + 1) * SPAN, T), STEP, num_stages=STAGES):
        t = first + tl.arange(0, STEP)
        row = batch.to(tl.int64) * T + t
        ptrs = row[:, None] * C + col[None, :]
        live = (t < T)[:, None] & there[None, :]
        x = tl.load(x_BTC + ptrs, mask=live, other=0.0).to(tl.float32)
        own = tl.load(segment_BT + row, mask=t < T, other=0) if SEGMENTS else 0
        dx = tl.zeros([STEP, COLUMNS], tl.float32)
        for p in tl.static_range(FIRST, last):
            reaches = (t + p < T)[:, None] & there[None, :]
            if SEGMENTS:
                same = tl.load(segment_BT + row + p, mask=t + p < T, other=0) == own
                reaches = reaches & same[:, None]
            dz = tl.load(dz_BTC + ptrs + p * C, mask=reaches, other=0.0).to(tl.float32)
            if FIRST == 0:
                tap = tl.load(taps_PC + p * C + col, mask=there, other=0.0).to(tl.float32)
                dx += dz * tap[None, :]
            if p == FIRST:
                sum_0 += dz * x
            if p == FIRST + 1:
                sum_1 += dz * x
            if p == FIRST + 2:
                sum_2 += dz * x
            if p == FIRST + 3:
                sum_3 += dz * x
        if FIRST == 0:
            tl.store(dx_BTC + ptrs, dx.to(dx_BTC.dtype.element_ty), mask=live)
    part = part_NPC + (batch.to(tl.int64) * tl.num_programs(1) + span) * (P * C) + FIRST * C + col
    tl.store(part, tl.sum(sum_0, 0), mask=there)
    if FIRST + 1 < P:
        tl.store(part + C, tl.sum(sum_1, 0), mask=there)
    if FIRST + 2 < P:
        tl.store(part + 2 * C, tl.sum(sum_2, 0), mask=there)
    if FIRST + 3 < P:
        tl.store(part + 3 * C, tl.sum(sum_3, 0), mask=there)


PREPARE, UNPREPARE, UNCONVOLVE = map(
    Launcher, (prepare_kernel, unprepare_kernel, unconvolve_kernel)
)


def prepare(x_BTC: Tensor, taps_CP: Tensor | None, steps: Steps, cuda: bool) -> Tensor:
    """See `kalmagrove_kernels.ada.prepare`. cuda: the convolution by itself, and its gradients, in
    CUDA C++."""
    if taps_CP is None and steps.linear:
        return x_BTC.unflatten(-1, (steps.heads, steps.width))
    y_BTHR: Tensor = _Prepare.apply(x_BTC, taps_CP, steps, cuda)
    return y_BTHR


class _Prepare(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BTC: Tensor, taps_CP: Tensor | None, steps: Steps, cuda: bool
    ) -> Tensor:
        x = x_BTC.contiguous()
        taps = None if taps_CP is None else taps_CP.T.contiguous()
        y = x.new_empty((*x.shape[:2], steps.heads, steps.width))
        if steps.linear and cuda and taps is not None:
            y = cuda_convolve.convolve(x, taps, steps.segments_BT).view_as(y)
        elif y.numel():
            _launch(PREPARE, steps, x, taps, (x,), y)
        ctx.save_for_backward(x, taps)
        ctx.steps, ctx.cuda = steps, cuda
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_BTHR: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        steps: Steps = ctx.steps
        dy = dy_BTHR.contiguous()
        if steps.linear:
            dz = dy.flatten(2)
        else:
            dz = torch.empty_like(x)
            if dz.numel():
                _launch(UNPREPARE, steps, x, taps, (dy, x), dz)
        if taps is None:
            return dz, None, None, None
        unconvolve = cuda_convolve.unconvolve if ctx.cuda else _unconvolve
        dx, dtaps_PC = unconvolve(dz, x, taps, steps.segments_BT)
        return dx, dtaps_PC.T.to(taps.dtype), None, None


def _launch(
    kernel: Launcher,
    steps: Steps,
    x: Tensor,
    taps: Tensor | None,
    inputs: tuple[Tensor, ...],
    out: Tensor,
) -> None:
    """`prepare_kernel` or `unprepare_kernel`, of packed rows x."""
    batch, tokens, channels = x.shape
    tile = TILES["plain" if steps.angles_THr is None else "rotated"]
    angle_heads = 1 if steps.angles_THr is None else steps.angles_THr.shape[1]
    kernel(
        (cdiv(tokens, tile.rows), cdiv(steps.heads, tile.heads), batch),
        *inputs, taps, steps.slot_S, steps.rank_H, steps.angles_THr, steps.segments_BT, out,
        tokens, channels, steps.heads, angle_heads, steps.norm_eps or 0.0,
        R=steps.width, HALF=power_of_2((steps.width + 1) // 2), P=0 if taps is None else len(taps),
        SILU=steps.silu, NORM=steps.norm_eps is not None, ROTATE=steps.angles_THr is not None,
        SLOTS=steps.slot_S is not None, RANKS=steps.rank_H is not None,
        SEGMENTS=steps.segments_BT is not None,
        ROWS=tile.rows, HEADS=tile.heads, num_warps=tile.warps,
    )  # fmt: skip


def _unconvolve(
    dz: Tensor, x: Tensor, taps: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    reach = len(taps)
    spans = cdiv(tokens, SPAN)
    dx = torch.empty_like(x)
    parts = x.new_empty((batch * spans, reach, channels), dtype=torch.float32)
    for first in range(0, reach, 4) if x.numel() else ():
        UNCONVOLVE(
            (cdiv(channels, COLUMNS), spans, batch),
            dz, x, taps, segments, dx, parts, tokens, channels,
            P=reach, FIRST=first, SEGMENTS=segments is not None,
            SPAN=SPAN, STEP=STEP, COLUMNS=COLUMNS, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return dx, parts.sum(0)

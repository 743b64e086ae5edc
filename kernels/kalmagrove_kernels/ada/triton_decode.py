"""One token of ADA decoding in Triton: two launches, of which the second is all of the traffic.

`_prepare` makes q and k of every head, and as the only reader of a head's tail it can shift it in
place. `_update` reads and writes the state once, in as many blocks of values as fill the GPU. As
one kernel, every block would read a tail that another may have shifted already, and would repeat
the rotation.
Letters: B batch, H heads, R query/key width, V value width, C channels, P taps.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kalmagrove_kernels.launch import cdiv, power_of_2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# fp32 numbers of the state that a program of `_update` holds at most; programs that fill a GPU.
TILE, PROGRAMS = 8192, 512
_LOG_ZERO = tl.constexpr(-1e4)  # as in `reference`


@triton.jit
def _window(k_row, tail_row, tail_step, channel, real, BEFORE: tl.constexpr, LINES: tl.constexpr):
    """The raw keys of some channels in fp32 [LINES, X]: BEFORE old ones, the new one, zeros."""
    line = tl.arange(0, LINES)[:, None]
    channel, real = channel[None, :], real[None, :]
    old = tl.load(tail_row + line * tail_step + channel, mask=real & (line < BEFORE), other=0.0)
    new = tl.load(k_row + line * 0 + channel, mask=real & (line == BEFORE), other=0.0)
    return old.to(tl.float32) + new.to(tl.float32)


@triton.jit
def _shift(window, tail_row, tail_step, channel, real, BEFORE: tl.constexpr, LINES: tl.constexpr):
    """All of a window but its oldest key becomes the tail."""
    line = tl.arange(0, LINES)[:, None] - 1
    inside = real[None, :] & (line >= 0) & (line < BEFORE)
    tl.store(tail_row + line * tail_step + channel[None, :], window, mask=inside)


@triton.jit
def _convolve(
    window,
    taps,
    taps_channel,
    taps_step,
    channel,
    real,
    BEFORE: tl.constexpr,
    LINES: tl.constexpr,
):
    lag = BEFORE - tl.arange(0, LINES)[:, None]
    place = taps + channel[None, :] * taps_channel + lag * taps_step
    weight = tl.load(place, mask=real[None, :] & (lag >= 0), other=0.0)
    return tl.sum(window * weight.to(tl.float32), axis=0)


@triton.jit
def _shown(slot, head, entry, inside, channels, WIDTH: tl.constexpr):
    """The channels that entries of a head show, and whether there is one."""
    channel = head * WIDTH + entry
    real = inside
    if slot is not None:
        channel = tl.load(slot + channel, mask=inside, other=channels).to(tl.int32)
        real = channel < channels
    return channel, real


@triton.jit
def _angle(pair, width, position, LOG2_THETA: tl.constexpr):
    """position * theta^(-2 pair / width): the power in fp64 but for its fraction, which exp2 takes.

    At position 100,000 one fp32 rounding of a frequency is already 0.01 radians.
    """
    pair = pair.to(tl.float32)
    power = tl.div_rn(-2.0 * pair, tl.zeros_like(pair) + width).to(tl.float64) * LOG2_THETA
    whole = tl.floor(power)
    frequency = tl.exp2((power - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))
    return position.to(tl.float32) * frequency


@triton.jit(do_not_specialize=["q_batch", "k_batch", "tail_batch", "tail_step", "channels"])
def _prepare(
    q,
    k,
    tail,
    taps,
    slot,
    rank,
    position,
    q_out,
    k_out,
    q_batch,
    k_batch,
    tail_batch,
    tail_step,
    taps_channel,
    taps_step,
    channels,
    scale,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,
    LINES: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    LOG2_THETA: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Program b * H + h: fp32 q * scale and k of the head, [R] each, and its tail shifted.

    The entries are held as two halves, so that a rotary pair is the same place in both.
    """
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // HEADS, (place % HEADS).to(tl.int32)
    half: tl.constexpr = (WIDTH + 1) // 2
    low = tl.arange(0, ROWS)
    high = low + half
    in_low, in_high = low < half, (low < half) & (high < WIDTH)
    low_channel, low_real = _shown(slot, head, low, in_low, channels, WIDTH)
    high_channel, high_real = _shown(slot, head, high, in_high, channels, WIDTH)
    q += batch * q_batch
    k += batch * k_batch
    low_q = tl.load(q + low_channel, mask=low_real, other=0.0).to(tl.float32)
    high_q = tl.load(q + high_channel, mask=high_real, other=0.0).to(tl.float32)
    if taps is None:
        low_k = tl.load(k + low_channel, mask=low_real, other=0.0).to(tl.float32)
        high_k = tl.load(k + high_channel, mask=high_real, other=0.0).to(tl.float32)
    else:
        tail += batch * tail_batch
        low_keys = _window(k, tail, tail_step, low_channel, low_real, BEFORE, LINES)
        high_keys = _window(k, tail, tail_step, high_channel, high_real, BEFORE, LINES)
        tl.debug_barrier()  # every thread has read what the others overwrite
        _shift(low_keys, tail, tail_step, low_channel, low_real, BEFORE, LINES)
        _shift(high_keys, tail, tail_step, high_channel, high_real, BEFORE, LINES)
        low_k = _convolve(
            low_keys, taps, taps_channel, taps_step, low_channel, low_real, BEFORE, LINES
        )
        high_k = _convolve(
            high_keys, taps, taps_channel, taps_step, high_channel, high_real, BEFORE, LINES
        )
    if SILU:
        low_k *= tl.sigmoid(low_k)
        high_k *= tl.sigmoid(high_k)

    width = WIDTH
    if rank is not None:
        width = tl.load(rank + head).to(tl.float32)
    if NORM:
        q_norm = tl.rsqrt(tl.sum(low_q * low_q + high_q * high_q, axis=0) / width + eps)
        k_norm = tl.rsqrt(tl.sum(low_k * low_k + high_k * high_k, axis=0) / width + eps)
        low_q, high_q = low_q * q_norm, high_q * q_norm
        low_k, high_k = low_k * k_norm, high_k * k_norm
    if LOG2_THETA is not None:
        now = tl.load(position + batch) if POSITIONS else tl.load(position)
        angle = _angle(low, width, now, LOG2_THETA)
        cos, sin = tl.cos(angle), tl.sin(angle)
        low_q, high_q = low_q * cos - high_q * sin, high_q * cos + low_q * sin
        low_k, high_k = low_k * cos - high_k * sin, high_k * cos + low_k * sin
    q_out += place * WIDTH
    k_out += place * WIDTH
    tl.store(q_out + low, low_q * scale, mask=in_low)
    tl.store(q_out + high, high_q * scale, mask=in_high)
    tl.store(k_out + low, low_k, mask=in_low)
    tl.store(k_out + high, high_k, mask=in_high)


@triton.jit
def _update(
    q,
    k,
    v,
    state,
    log_decay,
    out,
    v_batch,
    v_head,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Program (b * H + h, block of COLS values): S = decay S + k v^T, o = q S."""
    place = tl.program_id(0).to(tl.int64)
    batch, head = place // HEADS, (place % HEADS).to(tl.int32)
    row, col = tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    in_row, in_col = row < WIDTH, col < VALUES
    real = in_row[:, None] & in_col[None, :]
    state += place * WIDTH * VALUES + row[:, None] * VALUES + col[None, :]
    held = tl.load(state, mask=real, other=0.0)
    key = tl.load(k + place * WIDTH + row, mask=in_row, other=0.0)
    query = tl.load(q + place * WIDTH + row, mask=in_row, other=0.0)
    value = tl.load(v + batch * v_batch + head * v_head + col, mask=in_col, other=0.0)
    if log_decay is not None:
        rate = tl.load(log_decay + head).to(tl.float32)
        held *= tl.exp(tl.minimum(tl.maximum(rate, _LOG_ZERO), 0.0))
    held += key[:, None] * value.to(tl.float32)[None, :]
    tl.store(state, held, mask=real)
    tl.store(out + place * VALUES + col, tl.sum(query[:, None] * held, axis=0), mask=in_col)


def block_of_values(heads: int, rows: int, values: int) -> int:
    """Values a program of `_update` takes: few enough that `heads` of them fill the GPU."""
    block = min(power_of_2(values), max(TILE // rows, 16))
    while block > 16 and heads * cdiv(values, block) < PROGRAMS:
        block //= 2
    return block


@torch.no_grad()
def decode_step(
    q_BC: Tensor,
    k_BC: Tensor,
    v_BHV: Tensor,
    state_BHRV: Tensor,
    tail_BPC: Tensor,
    *,
    heads: int,
    width: int,
    scale: float,
    log_decay_H: Tensor | None,
    taps_CP: Tensor | None,
    silu: bool,
    norm_eps: float | None,
    rope_theta: float | None,
    position: Tensor,
    slot_S: Tensor | None,
    rank_H: Tensor | None,
) -> Tensor:
    """See `kalmagrove_kernels.ada.decode.decode_step`."""
    for name, tensor in (("q", q_BC), ("k", k_BC), ("v", v_BHV)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: backend='triton' takes {DTYPES}")
    if state_BHRV.dtype != torch.float32:
        raise TypeError(f"the state is {state_BHRV.dtype}: backend='triton' takes torch.float32")
    q_BC, k_BC, v_BHV = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BC, k_BC, v_BHV))
    (batch, channels), values = k_BC.shape, v_BHV.shape[2]
    o_BHV = v_BHV.new_empty(batch, heads, values)
    if o_BHV.numel() == 0:
        return o_BHV
    taps = 1 if taps_CP is None else taps_CP.shape[1]
    if taps > 1 and tail_BPC.stride(2) != 1:
        raise ValueError("the channels of tail_BPC must be contiguous")
    q_BHR, k_BHR = v_BHV.new_empty(2, batch, heads, width, dtype=torch.float32).unbind()
    half = power_of_2(cdiv(width, 2))
    _prepare[(batch * heads,)](
        q_BC,
        k_BC,
        tail_BPC,
        taps_CP,
        slot_S,
        rank_H,
        position,
        q_BHR,
        k_BHR,
        q_BC.stride(0),
        k_BC.stride(0),
        tail_BPC.stride(0),
        tail_BPC.stride(1),
        0 if taps_CP is None else taps_CP.stride(0),
        0 if taps_CP is None else taps_CP.stride(1),
        channels,
        scale,
        norm_eps or 0.0,
        HEADS=heads,
        WIDTH=width,
        ROWS=half,
        BEFORE=taps - 1,
        LINES=power_of_2(taps),
        SILU=silu,
        NORM=norm_eps is not None,
        LOG2_THETA=None if rope_theta is None else math.log2(rope_theta),
        POSITIONS=position.numel() > 1,
        num_warps=max(half // 32, 1),
    )
    rows = power_of_2(width)
    cols = block_of_values(batch * heads, rows, values)
    _update[(batch * heads, cdiv(values, cols))](
        q_BHR,
        k_BHR,
        v_BHV,
        state_BHRV,
        log_decay_H,
        o_BHV,
        v_BHV.stride(0),
        v_BHV.stride(1),
        HEADS=heads,
        WIDTH=width,
        VALUES=values,
        ROWS=rows,
        COLS=cols,
        num_warps=8 if rows * cols > 4096 else 4,
    )
    return o_BHV

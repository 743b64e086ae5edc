"""RMSNorm per head and gate in Triton: o and g are read once and y is written, all else recomputed.

Backward reads o, g and dy once and writes their gradients. That of the weight is one partial sum a
program, added up in a fixed order: no atomics.
Letters: N = B * T * H rows, V value width, X programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels.launch import Launcher, cdiv, power_of_2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Numbers of o that a program holds at once; programs of the backward pass at most.
TILES = {"forward": 4096, "backward": 2048, "programs": 1056}


@triton.jit
def _place(first, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr):
    """Where a tile of whole rows lies, and what of it exists: [ROWS, WIDTH]."""
    row, col = first + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    return row.to(tl.int64) * VALUES + col, (row < count) & (col < VALUES)


@triton.jit
def _inverse_rms(o, eps, VALUES: tl.constexpr):
    return tl.rsqrt(tl.sum(o * o, axis=1, keep_dims=True) / VALUES + eps)


@triton.jit(do_not_specialize=["count"])
def _forward(
    o_ptr,
    g_ptr,
    weight_ptr,
    y_ptr,
    count,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    place, real = _place(tl.program_id(0) * ROWS, count, ROWS, WIDTH, VALUES)
    y = tl.load(o_ptr + place, mask=real, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        col = tl.arange(0, WIDTH)[None, :]
        weight = tl.load(weight_ptr + col, mask=col < VALUES, other=0.0).to(tl.float32)
        y *= _inverse_rms(y, eps, VALUES) * weight
    if g_ptr is not None:
        g = tl.load(g_ptr + place, mask=real, other=0.0).to(tl.float32)
        y *= g * tl.sigmoid(g)
    tl.store(y_ptr + place, y, mask=real)


@triton.jit(do_not_specialize=["count"])
def _backward(
    dy_ptr,
    o_ptr,
    g_ptr,
    weight_ptr,
    do_ptr,
    dg_ptr,
    partial,
    count,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Program x: every X-th tile of rows; partial [X, V], of the weight's gradient."""
    col = tl.arange(0, WIDTH)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col, mask=col < VALUES, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        place, real = _place(first, count, ROWS, WIDTH, VALUES)
        grad = tl.load(dy_ptr + place, mask=real, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + place, mask=real, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            scale = _inverse_rms(o, eps, VALUES)
            unit = o * scale
            normed = unit * weight
        else:
            normed = o
        if g_ptr is not None:
            g = tl.load(g_ptr + place, mask=real, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(g)
            slope = sigmoid * (1 + g * (1 - sigmoid))
            tl.store(dg_ptr + place, grad * normed * slope, mask=real)
            grad *= g * sigmoid
        if weight_ptr is not None:
            total += grad * unit
            grad *= weight
            grad = scale * (grad - unit * (tl.sum(grad * unit, axis=1, keep_dims=True) / VALUES))
        tl.store(do_ptr + place, grad, mask=real)
    if weight_ptr is not None:
        out = partial + tl.program_id(0) * VALUES + col
        tl.store(out, tl.sum(total, axis=0), mask=col < VALUES)


def _tile(elements: int, values: int) -> dict[str, int]:
    width = power_of_2(values)
    rows = max(elements // width, 1)
    return {"ROWS": rows, "WIDTH": width, "VALUES": values, "num_warps": 4}


FORWARD, BACKWARD = Launcher(_forward), Launcher(_backward)


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, o_BTHV: Tensor, g_BTHV: Tensor | None, weight_V: Tensor | None, eps: float
    ) -> Tensor:
        o_BTHV = o_BTHV.contiguous()
        g_BTHV = None if g_BTHV is None else g_BTHV.contiguous()
        weight_V = None if weight_V is None else weight_V.contiguous()
        ctx.eps = eps
        ctx.save_for_backward(o_BTHV, g_BTHV, weight_V)
        y_BTHV = torch.empty_like(o_BTHV)
        if y_BTHV.numel():
            values = o_BTHV.shape[-1]
            tile, count = _tile(TILES["forward"], values), o_BTHV.numel() // values
            grid = (cdiv(count, tile["ROWS"]),)
            FORWARD(grid, o_BTHV, g_BTHV, weight_V, y_BTHV, count, eps, **tile)
        return y_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHV: Tensor) -> tuple[Tensor | None, ...]:
        o_BTHV, g_BTHV, weight_V = ctx.saved_tensors
        do_BTHV = torch.empty_like(o_BTHV)
        dg_BTHV = None if g_BTHV is None else torch.empty_like(g_BTHV)
        if do_BTHV.numel() == 0:
            zeros = None if weight_V is None else torch.zeros_like(weight_V)
            return do_BTHV, dg_BTHV, zeros, None
        values = o_BTHV.shape[-1]
        tile, count = _tile(TILES["backward"], values), o_BTHV.numel() // values
        programs = min(cdiv(count, tile["ROWS"]), TILES["programs"])
        partial_XV = None
        if weight_V is not None:
            partial_XV = o_BTHV.new_empty(programs, values, dtype=torch.float32)
        BACKWARD(
            (programs,),
            dy_BTHV.contiguous(),
            o_BTHV,
            g_BTHV,
            weight_V,
            do_BTHV,
            dg_BTHV,
            partial_XV,
            count,
            ctx.eps,
            **tile,
        )
        dweight = None if partial_XV is None else partial_XV.sum(0).to(weight_V.dtype)
        return do_BTHV, dg_BTHV, dweight, None


def norm_gate(o_BTHV: Tensor, g_BTHV: Tensor | None, weight_V: Tensor | None, eps: float) -> Tensor:
    """See `kalmagrove_kernels.ada.epilogue.norm_gate`."""
    for name, tensor in (("o", o_BTHV), ("g", g_BTHV), ("weight", weight_V)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}: backend='triton' takes {DTYPES}")
    y_BTHV: Tensor = _NormGate.apply(o_BTHV, g_BTHV, weight_V, eps)
    return y_BTHV

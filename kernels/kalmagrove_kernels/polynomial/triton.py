"""The polynomial layer in Triton: the expansion lives in registers only, forward and backward.

B_0 = 1 needs no product: its coefficients are summed into the bias, and their gradient is that of
the bias. The Q = P - 1 other orders are the terms of one recurrence in fp32, rounded to the dtype
of x as an operand of a matrix product that accumulates in fp32:

    forward  y [N, J]    = sum_q B_q [N, I] c_q^T        along I; x is read once for all q
    inputs   ds [N, I]   = sum_q B_q'(s) * (dy c_q)      along J; dy is read once for several q
    coef     dc_q [J, I] = dy^T B_q                      along N, the basis recomputed

Deterministic: no atomics. Where J * I alone gives too few programs, `coef` splits N and adds the
parts in a fixed order; the gradients of scale and shift add one row a block of tokens.
Letters: N tokens, I inputs, J outputs, P basis functions, Q = P - 1.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels.polynomial import kernels
from kalmagrove_kernels.polynomial.reference import degree_of
from kalmagrove_kernels.polynomial.tiles import TILES, Tile, fit, parts, split_evenly

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Layer(NamedTuple):
    """What all three kernels take: the function's kind and its contiguous parameters."""

    basis: str
    squash: str
    coef_PJI: Tensor
    scale_I: Tensor | None  # fp32, as shift
    shift_I: Tensor | None

    @classmethod
    def of(
        cls,
        kind: tuple[str, str],
        coef_PJI: Tensor,
        scale_I: Tensor | None,
        shift_I: Tensor | None,
    ) -> "Layer":
        scale_I, shift_I = (t if t is None else t.float().contiguous() for t in (scale_I, shift_I))
        return cls(*kind, coef_PJI.contiguous(), scale_I, shift_I)

    @property
    def orders(self) -> int:
        return self.coef_PJI.shape[0] - 1

    def constants(self, precision: str) -> dict[str, Any]:
        degree = degree_of(self.basis, self.coef_PJI.shape[0])
        return {
            "STEPS": recurrence(self.basis, degree),
            "Q": self.orders,
            "FOURIER": self.basis == "fourier",
            "SQUASH": self.squash,
            "PRECISION": "tf32" if precision == "tf32" else "ieee",
            "COMPILED": not triton.knobs.runtime.interpret,
        }


def recurrence(basis: str, degree: int) -> tuple[tuple[float, float], ...]:
    """(a_p, b_p) of B_{p+1} = a_p u B_p - b_p B_{p-1}, p = 0..degree-1; none for "fourier"."""
    rules: dict[str, Any] = {
        "monomial": lambda p: (1.0, 0.0),
        "chebyshev1": lambda p: (2.0 if p else 1.0, 1.0),
        "chebyshev2": lambda p: (2.0, 1.0),
        "legendre": lambda p: ((2 * p + 1) / (p + 1), p / (p + 1)),
        "hermite": lambda p: (3 / math.sqrt(p + 1), math.sqrt(p / (p + 1))),
    }
    return () if basis == "fourier" else tuple(rules[basis](p) for p in range(degree))


def polynomial(
    x_NI: Tensor,
    coef_PJI: Tensor,
    bias_J: Tensor | None,
    *,
    basis: str,
    squash: str,
    scale_I: Tensor | None = None,
    shift_I: Tensor | None = None,
) -> Tensor:
    """See `kalmagrove_kernels.polynomial.polynomial`.

    Raises:
        ValueError: the dtype is not fp16, bf16 or fp32.
    """
    if x_NI.dtype not in DTYPES:
        raise ValueError(f"x is {x_NI.dtype}: backend='triton' takes {DTYPES}; use 'reference'")
    y_NJ: Tensor = _Polynomial.apply(x_NI, coef_PJI, bias_J, scale_I, shift_I, basis, squash)
    return y_NJ


class _Polynomial(torch.autograd.Function):
    """Gradients are returned in fp32 where they are; autograd casts them to the inputs' dtypes."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        coef_PJI: Tensor,
        bias_J: Tensor | None,
        scale_I: Tensor | None,
        shift_I: Tensor | None,
        basis: str,
        squash: str,
    ) -> Tensor:
        ctx.kind = basis, squash
        ctx.save_for_backward(x_NI, coef_PJI, scale_I, shift_I)
        offset_J = coef_PJI[0].sum(1, dtype=torch.float32)
        if bias_J is not None:
            offset_J = offset_J + bias_J
        layer = Layer.of(ctx.kind, coef_PJI, scale_I, shift_I)
        return forward(x_NI.contiguous(), offset_J, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NJ: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, coef_PJI, scale_I, shift_I = ctx.saved_tensors
        layer = Layer.of(ctx.kind, coef_PJI, scale_I, shift_I)
        x_NI, dy_NJ = x_NI.contiguous(), dy_NJ.contiguous()
        needs_x, needs_coef, needs_bias, needs_scale, needs_shift, _, _ = ctx.needs_input_grad
        dx = dcoef = dscale = dshift = None
        if needs_x or needs_scale or needs_shift:
            dx, dscale, dshift = inputs_gradient(x_NI, dy_NJ, layer)
        dbias = dy_NJ.sum(0, dtype=torch.float32)
        if needs_coef:
            dcoef = torch.empty_like(layer.coef_PJI)
            dcoef[0] = dbias[:, None]
            coef_gradient(x_NI, dy_NJ, layer, dcoef[1:])
        return dx, dcoef, dbias if needs_bias else None, dscale, dshift, None, None


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _shape(tile: Tile) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _programs(tile: Tile, rows: int, cols: int) -> int:
    return triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)


def forward(x_NI: Tensor, offset_J: Tensor, layer: Layer) -> Tensor:
    """offset_J: fp32, the bias and the order 0."""
    (n, i), j = x_NI.shape, layer.coef_PJI.shape[1]
    y_NJ = x_NI.new_empty(n, j)
    precision = _precision(x_NI.dtype)
    tile = fit(TILES["forward", precision], layer.orders, x_NI.itemsize)
    grid: Any = (_programs(tile, n, j),)
    operands = x_NI, layer.coef_PJI[1:], offset_J, layer.scale_I, layer.shift_I, y_NJ
    kernels.forward[grid](*operands, n, i, j, i * j, **layer.constants(precision), **_shape(tile))
    return y_NJ


def inputs_gradient(
    x_NI: Tensor, dy_NJ: Tensor, layer: Layer
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x [N, I], scale [I] and shift [I] (fp32; None unless affine)."""
    (n, i), j = x_NI.shape, dy_NJ.shape[1]
    precision = _precision(x_NI.dtype)
    tile = TILES["inputs", precision]
    orders = split_evenly(layer.orders, tile.orders)
    tile = fit(tile, orders, x_NI.itemsize)
    dx_NI = torch.empty_like(x_NI)
    by_block = None  # of scale and shift, a row a block of tokens
    if layer.squash == "affine":
        by_block = x_NI.new_empty(2, triton.cdiv(n, tile.rows), i, dtype=torch.float32)
    dscale, dshift = (None, None) if by_block is None else by_block.unbind()
    grid: Any = (_programs(tile, n, i),)
    operands = x_NI, layer.coef_PJI[1:], dy_NJ, layer.scale_I, layer.shift_I, dx_NI, dscale, dshift
    constants = layer.constants(precision) | {"ORDERS": orders}
    kernels.inputs[grid](*operands, n, i, j, i * j, **constants, **_shape(tile))
    if by_block is None:
        return dx_NI, None, None
    dscale_I, dshift_I = by_block.sum(1).unbind()
    return dx_NI, dscale_I, dshift_I


def coef_gradient(x_NI: Tensor, dy_NJ: Tensor, layer: Layer, out_QJI: Tensor) -> None:
    """Write the gradients of the coefficients of orders 1..Q."""
    (n, i), j = x_NI.shape, dy_NJ.shape[1]
    precision = _precision(x_NI.dtype)
    tile = TILES["coef", precision]
    orders = split_evenly(layer.orders, tile.orders)
    tile = fit(tile, 1, x_NI.itemsize)
    programs = _programs(tile, i, j)
    wanted = parts(programs, n)
    length = triton.cdiv(triton.cdiv(n, wanted), tile.depth) * tile.depth
    count = max(1, triton.cdiv(n, max(length, 1)))
    sums_XQJI = out_QJI.unsqueeze(0)
    if count > 1:
        sums_XQJI = x_NI.new_empty(count, *out_QJI.shape, dtype=torch.float32)
    grid: Any = (programs, count)
    operands = x_NI, dy_NJ, layer.scale_I, layer.shift_I
    for first in range(0, layer.orders, orders):
        constants = layer.constants(precision) | {
            "FIRST": first,
            "ORDERS": min(orders, layer.orders - first),
        }
        sums = sums_XQJI[:, first:]
        kernels.coef[grid](*operands, sums, n, i, j, i * j, length, **constants, **_shape(tile))
    if count > 1:
        out_QJI.copy_(sums_XQJI.sum(0))

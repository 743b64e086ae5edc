"""The basis projection and grouped linear maps in Triton, with their gradients.

Forward: sort the pairs by channel; z = V_c x of every pair; expand gate act(z) by U_c to a row a
pair; sum a token's rows. Backward the same with U_c first and V_c last, beside the gradients of
the weights. As the maps are linear, backward needs z alone: no expanded row is kept.
Letters: N tokens, D model width, C channels, R rank, K kept, S = N * K pairs, G groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels.permute import triton as permute
from kalmagrove_kernels.permute.reference import Sorted
from kalmagrove_kernels.projection import stages, tiles

Summation = Callable[[Tensor, Tensor], Tensor]  # a [S, R] in sorted order, w [C, R, D] -> [N, D]


class Bytes(NamedTuple):
    """GPU memory of one call beyond its arguments, in bytes."""

    saved: int  # between forward and backward, beside the arguments: z and the sorted order
    forward: int  # highest during forward, with its result
    backward: int  # highest during backward beside `saved`, with its results


def workspace_bytes(
    tokens: int,
    kept: int,
    channels: int,
    rank: int,
    width: int,
    dtype: torch.dtype,
    lists: int | None = None,
) -> Bytes:
    """Of `basis_projection` at a shape, fp32 gates, all gradients wanted.

    The largest part is one row of D numbers a pair, only within forward and within backward; with
    a `summation` that writes none, tell the bytes of its `lists`.
    """
    size, pairs = dtype.itemsize, tokens * kept
    order, place = 4 * (pairs + channels + 1) + (lists or 0), 4 * pairs
    z, y = size * pairs * rank, size * tokens * width
    rows = size * pairs * width if lists is None else 0
    weights = size * channels * rank * width
    return Bytes(
        saved=z + order,
        forward=z + order + place + (z if lists is not None else rows) + y,
        backward=max(2 * z + 2 * weights, z + 2 * weights + rows + y) + 4 * pairs,
    )


def basis_projection(
    x_ND: Tensor,
    kept_NK: Tensor,
    index_NK: Tensor,
    v_CRD: Tensor,
    u_CRD: Tensor,
    *,
    inner_silu: bool,
    sort: Callable[[Tensor, int], Sorted] = permute.sort_pairs,
    summation: Callable[[Sorted], Summation] | None = None,
) -> Tensor:
    """See `kalmagrove_kernels.projection.basis_projection`. The weights take the dtype of x.

    Args:
        sort: as `kalmagrove_kernels.permute.sort_pairs`, of any backend.
        summation: makes what takes the place of `stages.expand` and `stages.combine`.
    Raises:
        TypeError: a dtype other than bf16, fp16 and fp32.
    """
    v_CRD, u_CRD = v_CRD.to(x_ND.dtype), u_CRD.to(x_ND.dtype)
    pairs = sort(index_NK, len(v_CRD))
    summed = summation(pairs) if summation else None
    order_S, _, start_C1 = pairs
    y_ND: Tensor = _Projection.apply(
        x_ND, kept_NK, v_CRD, u_CRD, order_S, start_C1, inner_silu, summed
    )
    return y_ND


def grouped_linear(x_SD: Tensor, w_GMD: Tensor, start_G1: Tensor) -> Tensor:
    """See `kalmagrove_kernels.projection.grouped_linear`. The weights take the dtype of x."""
    h_SM: Tensor = _GroupedLinear.apply(x_SD, w_GMD.to(x_SD.dtype), start_G1.to(torch.int32))
    return h_SM


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gate_NK: Tensor,
        v_CRD: Tensor,
        u_CRD: Tensor,
        order_S: Tensor,
        start_C1: Tensor,
        inner_silu: bool,
        summed: Summation | None,
    ) -> Tensor:
        x_ND, gate_NK, v_CRD, u_CRD = (t.contiguous() for t in (x_ND, gate_NK, v_CRD, u_CRD))
        ctx.inner_silu, ctx.summed = inner_silu, summed
        kind = tiles.kind_of(v_CRD.shape[1], x_ND.dtype)
        if summed:
            z_SR, a_SR = stages.gated(
                x_ND, gate_NK, v_CRD, order_S, start_C1, inner_silu=inner_silu
            )
            ctx.save_for_backward(x_ND, gate_NK, v_CRD, u_CRD, z_SR, order_S, start_C1)
            return summed(a_SR, u_CRD)
        if kind in tiles.FUSED and v_CRD.shape[1] <= tiles.TILES["fused"][kind].ranks:
            z_SR, rows_SD = stages.fused(
                x_ND, gate_NK, v_CRD, u_CRD, order_S, start_C1, inner_silu=inner_silu
            )
        else:
            z_SR = stages.rank(x_ND, v_CRD, order_S, start_C1, gate_NK.shape[1])
            rows_SD = stages.expand(z_SR, u_CRD, order_S, start_C1, gate_NK, inner_silu=inner_silu)
        ctx.save_for_backward(x_ND, gate_NK, v_CRD, u_CRD, z_SR, order_S, start_C1)
        return stages.combine(rows_SD, len(x_ND))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_NK, v_CRD, u_CRD, z_SR, order_S, start_C1 = ctx.saved_tensors
        dy_ND = dy_ND.contiguous()
        a_SR, dz_SR, dgate_NK = stages.rank_backward(
            dy_ND, u_CRD, z_SR, gate_NK, order_S, start_C1, inner_silu=ctx.inner_silu
        )
        dx_ND = dv_CRD = du_CRD = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            du_CRD, dv_CRD = stages.weights(
                [a_SR, dz_SR], [dy_ND, x_ND], order_S, start_C1, gate_NK.shape[1]
            )
        del a_SR
        if ctx.needs_input_grad[0] and ctx.summed:
            dx_ND = ctx.summed(dz_SR, v_CRD)
        elif ctx.needs_input_grad[0]:
            dx_ND = stages.combine(stages.expand(dz_SR, v_CRD, order_S, start_C1), len(x_ND))
        return dx_ND, dgate_NK, dv_CRD, du_CRD, None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, w_GMD: Tensor, start_G1: Tensor) -> Tensor:
        x_SD, w_GMD, start_G1 = x_SD.contiguous(), w_GMD.contiguous(), start_G1.contiguous()
        ctx.save_for_backward(x_SD, w_GMD, start_G1)
        return stages.rank(x_SD, w_GMD, None, start_G1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dh_SM: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, w_GMD, start_G1 = ctx.saved_tensors
        dh_SM = dh_SM.contiguous()
        dx_SD = dw_GMD = None
        if ctx.needs_input_grad[0]:
            dx_SD = stages.expand(dh_SM, w_GMD, None, start_G1)
        if ctx.needs_input_grad[1]:
            (dw_GMD,) = stages.weights([dh_SM], [x_SD], None, start_G1)
        return dx_SD, dw_GMD, None

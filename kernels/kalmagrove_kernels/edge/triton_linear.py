"""h = W_e x with the edge activation and top-k as its epilogue, in Triton.

The unfused path writes h, reads it again and starts one more kernel; here h is only written, for
the backward pass. Whether that pays is for `kalmagrove.bench` to say.
Letters: N tokens, D model width, M edges, P basis functions, K kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels.edge.reference import Kept
from kalmagrove_kernels.edge.triton import gradients, outputs, padded, tabulate
from kalmagrove_kernels.edge.triton_basis import describe
from kalmagrove_kernels.edge.triton_select import keep
from kalmagrove_kernels.launch import Launcher

MOST_EDGES = 256
# Rows and depth (in bytes) of a tile by its padded width; warps; stages.
TILES: dict[int, dict[str, int]] = {
    128: {"rows": 64, "depth_bytes": 128, "warps": 8, "stages": 4},
    256: {"rows": 64, "depth_bytes": 128, "warps": 16, "stages": 3},
}


@triton.jit(do_not_specialize=["count"])
def _linear(
    x_ptr,
    w_ptr,
    h_ptr,
    table,
    scale,
    span,
    edges,
    depth,
    count,
    value,
    index,
    partial,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    GIVEN: tl.constexpr,
    BASE: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols, inner = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    x_tile = x_ptr + rows[:, None] * depth + inner[None, :]
    w_tile = w_ptr + cols[None, :] * depth + inner[:, None]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for d in range(0, depth, DEPTH):
        real = inner < depth - d
        x = tl.load(x_tile + d, mask=(rows < count)[:, None] & real[None, :], other=0.0)
        w = tl.load(w_tile + d, mask=(cols < edges)[None, :] & real[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    # Rounded before it is used: what the backward pass reads, and what the unfused path would see.
    h = total.to(h_ptr.dtype.element_ty)
    valid = (rows < count)[:, None] & (cols < edges)[None, :]
    tl.store(h_ptr + rows[:, None] * edges + cols[None, :], h, mask=valid)
    tl.debug_barrier()  # the epilogue reads some of h back, written by other threads
    keep(
        h,
        h_ptr,
        rows,
        count,
        tl.zeros([1, 1], tl.int32),
        table,
        scale,
        span,
        edges,
        value,
        index,
        partial + 2 * program,
        K,
        PLACES,
        GIVEN,
        ROWS,
        WIDTH,
        BASE,
        KIND,
        DEGREE,
        GRID,
        SIZE,
        CONSTANTS,
    )


LINEAR = Launcher(_linear)


class _EdgeTopKLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_MD: Tensor,
        coef_MP: Tensor,
        scale_M: Tensor | None,
        range_2: Tensor,
        given_NK: Tensor | None,
        k: int,
        constants: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (tokens, depth), edges = x_ND.shape, len(w_MD)
        width = padded(edges)
        tile = TILES[max(128, width)]
        programs = triton.cdiv(tokens, tile["rows"])
        h_NM = x_ND.new_empty(tokens, edges)
        value_NK, index_NK, partial = outputs(h_NM, k, given_NK, programs)
        ieee = torch.get_float32_matmul_precision() == "highest"
        LINEAR(
            (programs,),
            x_ND,
            w_MD,
            h_NM,
            tabulate(coef_MP[None], width, constants),
            scale_M,
            range_2,
            edges,
            depth,
            tokens,
            value_NK,
            index_NK,
            partial,
            ROWS=tile["rows"],
            DEPTH=tile["depth_bytes"] // x_ND.element_size(),
            WIDTH=width,
            K=k,
            PLACES=triton.next_power_of_2(k),
            GIVEN=given_NK is not None,
            **constants,
            PRECISION="ieee" if ieee else "tf32",
            num_warps=tile["warps"],
            num_stages=tile["stages"],
        )
        ctx.save_for_backward(x_ND, w_MD, index_NK, h_NM, coef_MP, scale_M, range_2)
        ctx.constants = constants
        energy, outside = partial.sum(0).unbind()
        ctx.mark_non_differentiable(index_NK, energy, outside)
        ctx.set_materialize_grads(False)
        return value_NK, index_NK, energy, outside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue_NK: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, w_MD, index_NK, h_NM, coef_MP, scale_M, range_2 = ctx.saved_tensors
        dh_NM, dcoef, dscale = gradients(
            dvalue_NK, index_NK, h_NM, coef_MP, scale_M, range_2, None, constants=ctx.constants
        )
        return dh_NM @ w_MD, dh_NM.mT @ x_ND, dcoef, dscale, None, None, None, None


def edge_topk_linear(
    x_ND: Tensor,
    w_MD: Tensor,
    coef_MP: Tensor,
    scale_M: Tensor | None,
    range_2: Tensor,
    k: int,
    *,
    basis: str,
    degree: int,
    grid: int,
    base: str,
    index_NK: Tensor | None = None,
) -> Kept:
    """`edge_topk` of h = x W^T, which is rounded to the dtype of x first; without groves.

    Args:
        x_ND, w_MD: of one dtype, bf16, fp16 or fp32; M at most 256.
        The rest as in `kalmagrove_kernels.edge.edge_topk`.
    Raises:
        ValueError: M is larger than 256.
    """
    if len(w_MD) > MOST_EDGES:
        raise ValueError(f"edges={len(w_MD)} must be at most {MOST_EDGES} here; use edge_topk")
    constants = describe(basis, degree, grid) | {"BASE": "none" if scale_M is None else base}
    x_ND, w_MD, coef_MP, range_2 = (t.contiguous() for t in (x_ND, w_MD, coef_MP, range_2))
    scale_M = None if scale_M is None else scale_M.contiguous()
    given_NK = None if index_NK is None else index_NK.contiguous().long()
    return Kept(
        *_EdgeTopKLinear.apply(x_ND, w_MD, coef_MP, scale_M, range_2, given_NK, k, constants)
    )

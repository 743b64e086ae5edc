"""`edge_topk` in CUDA C++ (`csrc/edge`), for B-splines: one warp a row, E never leaves registers.

The forward is one pass over h and one tiny launch for the two sums; the backward, one pass over the
kept edges and one reduction of the coefficients' gradients, in a fixed order and without atomics.
Letters: N tokens, M edges, P basis functions, K kept, G groves.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels import jit
from kalmagrove_kernels.edge.reference import Kept

BASES = {"none": 0, "silu": 1, "identity": 2}
MAX_EDGES, MAX_KEPT, MAX_DEGREE = 512, 32, 5
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper
FORWARD_WARPS, BACKWARD_WARPS = 16, 16  # a block
BLOCKS_PER_SM = 2


class Shape(NamedTuple):
    """What a launch needs to know beside the tensors."""

    rows: int
    edges: int
    grid: int
    degree: int
    kept: int
    base: int
    groves: int

    @property
    def size(self) -> int:
        return self.grid + self.degree


def edge_topk(
    h_NM: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    range_: Tensor,
    k: int,
    *,
    basis: str,
    degree: int,
    grid: int,
    base: str,
    group_N: Tensor | None = None,
    index_NK: Tensor | None = None,
) -> Kept:
    """See `kalmagrove_kernels.edge.edge_topk`.

    Raises:
        NotImplementedError: another basis than B-splines, or a size the kernels are not made for.
        RuntimeError: no GPU, or nvcc is missing.
    """
    degree = 1 if basis == "piecewise_linear" else degree
    rows, edges = h_NM.shape
    shape = Shape(
        rows=rows,
        edges=edges,
        grid=grid,
        degree=degree,
        kept=k if index_NK is None else index_NK.shape[1],
        base=BASES["none" if scale is None else base],
        groves=1 if group_N is None else len(range_),
    )
    _refuse(basis, shape, h_NM.dtype)
    tensors = (h_NM, coef.float(), None if scale is None else scale.float(), range_.float())
    return Kept(*_EdgeTopK.apply(*tensors, group_N, index_NK, shape))


def unsupported(basis: str, degree: int, grid: int, edges: int, kept: int) -> str | None:
    """What of a layer the kernels are not made for, or None."""
    degree = 1 if basis == "piecewise_linear" else degree
    shape = Shape(0, edges, grid, degree, kept, BASES["silu"], 1)
    if basis not in ("bspline", "piecewise_linear"):
        return f"basis={basis} (only bspline and piecewise_linear)"
    if degree > MAX_DEGREE:
        return f"degree={degree} (at most {MAX_DEGREE})"
    if edges > MAX_EDGES:
        return f"edges={edges} (at most {MAX_EDGES})"
    if kept > MAX_KEPT:
        return f"top_k={kept} (at most {MAX_KEPT})"
    if max(_forward_bytes(shape), _backward_bytes(shape)) > SHARED_MEMORY:
        return f"edges={edges} with grid={grid} (too large for shared memory)"
    return None


def _refuse(basis: str, shape: Shape, dtype: torch.dtype) -> None:
    """Raise what the kernels are not made for, naming the remedy."""
    missing = unsupported(basis, shape.degree, shape.grid, shape.edges, shape.kept)
    if dtype not in jit.DTYPES:
        missing = f"{dtype} pre-activations"
    if missing:
        raise NotImplementedError(
            f"the cuda backend of the edge op has no {missing}; choose backend='triton'"
        )


def _slots(edges: int) -> int:
    """Columns a lane holds; few values, since each is a build of its own."""
    return next(s for s in (1, 2, 4, 8, 16) if 32 * s >= edges)


def _forward_bytes(shape: Shape) -> int:
    """Shared memory of a block: polynomials [J, columns, degree + 1] and coefficients [M, P]."""
    intervals = shape.grid + 2 * shape.degree
    table = intervals * 32 * _slots(shape.edges) * (shape.degree + 1)
    return 4 * (table + shape.edges * shape.size)


def _backward_bytes(shape: Shape) -> int:
    """Shared memory of a warp: sums [M, P + 1] and a dense row."""
    return 4 * (shape.edges * (shape.size + 1) + 32 * _slots(shape.edges))


def _backward_warps(shape: Shape) -> int:
    """A power of two; two blocks fit a multiprocessor where they can."""
    warps = BACKWARD_WARPS
    while warps > 4 and warps * _backward_bytes(shape) > SHARED_MEMORY // BLOCKS_PER_SM:
        warps //= 2
    while warps * _backward_bytes(shape) > SHARED_MEMORY:
        warps //= 2
    return warps


def _blocks(h_NM: Tensor, warps: int) -> int:
    """Blocks that fill the device once, or fewer that have a row a warp."""
    most = BLOCKS_PER_SM * jit.multiprocessors(h_NM.device)
    return max(1, min(most, -(-h_NM.shape[0] // warps)))


def _library(h_NM: Tensor, shape: Shape) -> jit.Library:
    return jit.library("edge", h_NM.device, **constants(shape.degree, shape.edges, h_NM.dtype))


def constants(degree: int, edges: int, dtype: torch.dtype) -> dict[str, int]:
    """What a build is made for; dtype: of the pre-activations."""
    return {"DEGREE": degree, "SLOTS": _slots(edges), "DTYPE": jit.DTYPES[dtype]}


class _EdgeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NM: Tensor,
        coef: Tensor,
        scale: Tensor | None,
        range_: Tensor,
        group_N: Tensor | None,
        index_NK: Tensor | None,
        shape: Shape,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h_NM, coef, range_ = h_NM.contiguous(), coef.contiguous(), range_.contiguous()
        scale = None if scale is None else scale.contiguous()
        group_N = None if group_N is None else group_N.to(torch.int32).contiguous()
        given_NK = None if index_NK is None else index_NK.to(torch.int64).contiguous()
        blocks = _blocks(h_NM, FORWARD_WARPS)
        value_NK = coef.new_empty(shape.rows, shape.kept)
        kept_NK = torch.empty_like(value_NK, dtype=torch.int64)
        partial_B2, energy, outside = (
            coef.new_empty(blocks, 2),
            coef.new_empty(()),
            coef.new_empty(()),
        )
        inputs = (h_NM, coef, scale, range_, group_N, given_NK)
        outputs = (value_NK, kept_NK, partial_B2, energy, outside)
        sizes = (shape.rows, blocks, shape.edges, shape.grid, shape.kept, shape.base)
        _library(h_NM, shape).launch("edge_topk_forward", *inputs, *outputs, *sizes)
        ctx.shape = shape
        ctx.save_for_backward(h_NM, coef, scale, range_, group_N, kept_NK)
        ctx.mark_non_differentiable(kept_NK, energy, outside)
        ctx.set_materialize_grads(False)
        return value_NK, kept_NK, energy, outside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue_NK: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h_NM, coef, scale, range_, group_N, kept_NK = ctx.saved_tensors
        shape: Shape = ctx.shape
        warps = _backward_warps(shape)
        blocks = _blocks(h_NM, warps)
        dh_NM, dcoef = torch.empty_like(h_NM), torch.empty_like(coef)
        dscale = None if scale is None else torch.empty_like(scale)
        partial = coef.new_empty(blocks + shape.groves - 1, shape.edges, shape.size + 1)
        inputs = (dvalue_NK.contiguous(), kept_NK, h_NM, coef, scale, range_, group_N)
        outputs = (dh_NM, partial, dcoef, dscale)
        sizes = (shape.edges, shape.grid, shape.kept, shape.base)
        _library(h_NM, shape).launch(
            "edge_topk_backward", *inputs, *outputs, shape.rows, blocks, warps, shape.groves, *sizes
        )
        return dh_NM, dcoef, dscale, None, None, None, None

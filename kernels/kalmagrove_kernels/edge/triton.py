"""The edge activation fused with top-k in Triton, and its backward pass.

Forward: one program a few rows, one warp each, so that nothing crosses warps. A kept element learns
its rank in the selection and stores itself there. Backward: only the kept pairs are evaluated
again; the coefficients' gradients are one-hot matrix products into partial sums, added up in a
fixed order. `triton_linear` puts the same epilogue behind the matrix product that makes h.
Letters: N tokens, M edges, P basis functions, K kept, G groves, S = N * K pairs, B blocks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kalmagrove_kernels.edge.reference import Kept
from kalmagrove_kernels.edge.triton_basis import (
    base_slope,
    base_value,
    count_terms,
    describe,
    differentiate,
    tabulated,
)
from kalmagrove_kernels.edge.triton_select import keep
from kalmagrove_kernels.launch import Launcher

# Elements of h a one-warp program holds; pairs a step of the backward pass takes; its programs.
TILES = {"forward_elements": 512, "backward_pairs": 64, "backward_programs": 528}


@triton.jit
def _tabulate(
    coef,
    table,
    edges,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """Program (i, g): ROWS rows of the table of grove g."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    group, cols = tl.program_id(1), tl.arange(0, WIDTH)[None, :]
    terms: tl.constexpr = count_terms(KIND, DEGREE, GRID, SIZE)
    own = coef + (group * edges + cols) * SIZE
    value = tabulated(row, own, cols < edges, KIND, DEGREE, SIZE, CONSTANTS)
    tl.store(table + (group * terms + row) * WIDTH + cols, value, mask=row < terms)


@triton.jit(do_not_specialize=["edges", "count"])
def _forward(
    h_ptr,
    group_ptr,
    table,
    scale,
    span,
    edges,
    count,
    value,
    index,
    partial,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
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
):
    program = tl.program_id(0)
    first, lines = program.to(tl.int64) * ROWS, tl.arange(0, ROWS)
    rows = first + lines
    cols = tl.arange(0, WIDTH)[None, :]
    valid = (rows < count)[:, None] & (cols < edges)
    if GROUPED:
        group = tl.load(group_ptr + rows, mask=rows < count, other=0)[:, None]
    else:
        group = tl.zeros([1, 1], tl.int32)
    h = tl.load(h_ptr + first * edges + tl.where(valid, lines[:, None] * edges + cols, 0))
    keep(
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


@triton.jit(do_not_specialize=["edges", "tokens"])
def _backward(
    dvalue,
    index,
    h,
    coef,
    scale,
    span,
    start,
    dh,
    partial,
    edges,
    tokens,
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    K: tl.constexpr,
    BASE: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """Program (g, b): every B-th block of the pairs of grove g; partial [B, G, M, P + 1].

    Column P of the partial sums is the gradient of the scale.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    if GROUPED:
        first = tl.load(start + group).to(tl.int64) * K
        last = tl.load(start + group + 1).to(tl.int64) * K
    else:
        last = tokens.to(tl.int64) * K
        first = last * 0
    low, high = tl.load(span + 2 * group), tl.load(span + 2 * group + 1)
    places = tl.arange(0, PLACES)[None, :]
    channels = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH, PLACES], tl.float32)
    for block in range(first + split * PAIRS, last, tl.num_programs(1) * PAIRS):
        pair = block + tl.arange(0, PAIRS)
        real = pair < last
        channel = tl.load(index + pair, mask=real, other=0).to(tl.int32)
        edge = tl.where(real, channel - group * edges, 0)
        grad = tl.load(dvalue + pair, mask=real, other=0.0)
        place = (pair // K) * edges + edge
        x = tl.load(h + place, mask=real, other=0.0).to(tl.float32)
        own = coef + (group * edges + edge) * SIZE
        slope, weight = differentiate(
            x, low, high, own, places, KIND, DEGREE, GRID, SIZE, CONSTANTS
        )
        if BASE != "none":
            s = tl.load(scale + group * edges + edge).to(tl.float32)
            slope += s * base_slope(x, BASE)
            weight = tl.where(places == SIZE, base_value(x, BASE)[:, None], weight)
        tl.store(dh + place, grad * slope, mask=real)
        # Two TF32 halves hold 22 bits of a number, and a one-hot matrix adds no error to them.
        chosen = (channels[:, None] == edge[None, :]).to(tl.float32)
        weight *= grad[:, None]
        coarse = (weight.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(chosen, coarse, total, input_precision="tf32")
        total = tl.dot(chosen, weight - coarse, total, input_precision="tf32")
    out = ((split * tl.num_programs(0) + group) * edges + channels[:, None]) * (SIZE + 1) + places
    tl.store(partial + out, total, mask=(channels[:, None] < edges) & (places <= SIZE))


TABULATE, FORWARD, BACKWARD = map(Launcher, (_tabulate, _forward, _backward))


def tabulate(coef_GMP: Tensor, width: int, constants: dict[str, Any]) -> Tensor:
    """The coefficients as `evaluate` wants them, fp32 [G, terms, width]."""
    groves, edges, _ = coef_GMP.shape
    names = ("KIND", "DEGREE", "GRID", "SIZE", "CONSTANTS")
    shape = {name: constants[name] for name in names}
    rows = count_terms(shape["KIND"], shape["DEGREE"], shape["GRID"], shape["SIZE"])
    table = coef_GMP.new_empty(groves, rows, width, dtype=torch.float32)
    grid = triton.cdiv(rows, 32), groves
    TABULATE(grid, coef_GMP, table, edges, ROWS=32, WIDTH=width, **shape)
    return table


def outputs(h_NM: Tensor, k: int, index_NK: Tensor | None, programs: int) -> tuple[Tensor, ...]:
    """Where a kernel writes values [N, K], indices [N, K] and partial sums [programs, 2]."""
    value_NK = h_NM.new_empty(len(h_NM), k, dtype=torch.float32)
    if index_NK is None:
        index_NK = h_NM.new_empty(len(h_NM), k, dtype=torch.int64)
    return value_NK, index_NK, h_NM.new_empty(programs, 2, dtype=torch.float32)


def gradients(
    dvalue_NK: Tensor,
    index_NK: Tensor,
    h_NM: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    range_: Tensor,
    group_N: Tensor | None,
    *,
    constants: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of h (dense), coef and scale; `constants` as `describe` and the base give."""
    (tokens, edges), k, size = h_NM.shape, index_NK.shape[1], coef.shape[-1]
    groves = 1 if group_N is None else len(coef)
    pairs, start_G1 = TILES["backward_pairs"], None
    if group_N is not None:
        every = torch.arange(groves + 1, device=group_N.device, dtype=group_N.dtype)
        start_G1 = torch.searchsorted(group_N, every)
    splits = min(triton.cdiv(tokens * k, pairs), triton.cdiv(TILES["backward_programs"], groves))
    splits = max(splits, 1)
    partial = h_NM.new_empty(splits, groves, edges, size + 1, dtype=torch.float32)
    dh_NM = torch.zeros_like(h_NM)
    BACKWARD(
        (groves, splits),
        dvalue_NK.float().contiguous(),
        index_NK,
        h_NM,
        coef.contiguous(),
        scale,
        range_,
        start_G1,
        dh_NM,
        partial,
        edges,
        tokens,
        GROUPED=group_N is not None,
        PAIRS=pairs,
        WIDTH=padded(edges),
        PLACES=padded(size + 1),
        K=k,
        **constants,
        num_warps=4,
        num_stages=1,
    )
    grads = partial.sum(0)
    dcoef = grads[..., :size].to(coef.dtype).view_as(coef)
    return dh_NM, dcoef, None if scale is None else grads[..., size].to(scale.dtype).view_as(scale)


def padded(size: int) -> int:
    """The side of a tile that holds `size`: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


class _EdgeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_NM: Tensor,
        coef: Tensor,
        scale: Tensor | None,
        range_: Tensor,
        group_N: Tensor | None,
        given_NK: Tensor | None,
        k: int,
        constants: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (tokens, edges), width = h_NM.shape, padded(h_NM.shape[1])
        rows = max(1, TILES["forward_elements"] // width)
        programs = triton.cdiv(tokens, rows)
        value_NK, index_NK, partial = outputs(h_NM, k, given_NK, programs)
        FORWARD(
            (programs,),
            h_NM,
            group_N,
            tabulate(coef.view(-1, *coef.shape[-2:]), width, constants),
            scale,
            range_,
            edges,
            tokens,
            value_NK,
            index_NK,
            partial,
            GROUPED=group_N is not None,
            ROWS=rows,
            WIDTH=width,
            K=k,
            PLACES=triton.next_power_of_2(k),
            GIVEN=given_NK is not None,
            **constants,
            num_warps=1,
        )
        ctx.save_for_backward(index_NK, h_NM, coef, scale, range_, group_N)
        ctx.constants = constants
        energy, outside = partial.sum(0).unbind()
        ctx.mark_non_differentiable(index_NK, energy, outside)
        ctx.set_materialize_grads(False)
        return value_NK, index_NK, energy, outside

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalue_NK: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = gradients(dvalue_NK, *ctx.saved_tensors, constants=ctx.constants)
        return *grads, None, None, None, None, None


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
    """See `kalmagrove_kernels.edge.edge_topk`."""
    constants = describe(basis, degree, grid) | {"BASE": "none" if scale is None else base}
    given_NK = None if index_NK is None else index_NK.contiguous().long()
    group_N = None if group_N is None else group_N.contiguous()
    scale = None if scale is None else scale.contiguous()
    h_NM, coef, range_ = h_NM.contiguous(), coef.contiguous(), range_.contiguous()
    return Kept(*_EdgeTopK.apply(h_NM, coef, scale, range_, group_N, given_NK, k, constants))

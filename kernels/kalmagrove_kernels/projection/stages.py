"""The projection's stages as plain functions of tensors and a tile: no autograd, no host wait.

`triton` strings them together; a benchmark may time each by itself. Tensors are contiguous and of
one dtype, except the gates; `order` and `start` are those of `kalmagrove_kernels.permute`.
Letters: N tokens, D model width, C channels, R rank, K kept, S = N * K rows, one a pair.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kalmagrove_kernels.launch import Launcher, cdiv, power_of_2
from kalmagrove_kernels.projection import gradients, kernels
from kalmagrove_kernels.projection.tiles import Tile, kind_of, tile_of

PROGRAMS = 264  # that a GPU runs at once: two on each of an H100's multiprocessors

RANK_KERNEL, EXPAND_KERNEL, FUSED_KERNEL, COMBINE_KERNEL = map(
    Launcher,
    (kernels.rank_kernel, kernels.expand_kernel, kernels.fused_kernel, kernels.combine_kernel),
)
RANK_BACKWARD_KERNEL, WEIGHTS_KERNEL = map(
    Launcher, (gradients.rank_backward_kernel, gradients.weights_kernel)
)


def rank(
    x_ND: Tensor,
    w_CRD: Tensor,
    order_S: Tensor | None,
    start_C1: Tensor,
    kept: int = 1,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """z [S, R] in sorted order: w_c x of every row's token; without `order` rows are tokens."""
    z_SR = x_ND.new_empty(len(x_ND) if order_S is None else len(order_S), w_CRD.shape[1])
    _rank(x_ND, w_CRD, order_S, start_C1, z_SR, kept, tile)
    return z_SR


def gated(
    x_ND: Tensor,
    gate_NK: Tensor,
    v_CRD: Tensor,
    order_S: Tensor,
    start_C1: Tensor,
    *,
    inner_silu: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`rank` with its pairs' gates: z and gate act(z), both [S, R] in sorted order."""
    z_SR, a_SR = (x_ND.new_empty(len(order_S), v_CRD.shape[1]) for _ in range(2))
    gates = gate_NK, a_SR, inner_silu
    _rank(x_ND, v_CRD, order_S, start_C1, z_SR, gate_NK.shape[1], tile, gates)
    return z_SR, a_SR


def _rank(
    x_ND: Tensor,
    w_CRD: Tensor,
    order_S: Tensor | None,
    start_C1: Tensor,
    z_SR: Tensor,
    kept: int,
    tile: Tile | None,
    gates: tuple[Tensor, Tensor, bool] | None = None,
) -> None:
    channels, ranks, _ = w_CRD.shape
    tile = tile or tile_of("rank", ranks, x_ND.dtype)
    gate_NK, a_SR, inner_silu = gates or (None, None, False)
    if z_SR.numel():
        grid: Any = (_tiles(z_SR, channels, tile), cdiv(ranks, tile.ranks))
        RANK_KERNEL(
            grid,
            x_ND,
            w_CRD,
            order_S,
            start_C1,
            z_SR,
            gate_NK,
            a_SR,
            **_shape(z_SR, w_CRD, tile),
            K=kept,
            GATHER=order_S is not None,
            GATED=gates is not None,
            INNER_SILU=inner_silu,
            DEPTH=tile.depth,
        )


def rank_backward(
    dy_ND: Tensor,
    u_CRD: Tensor,
    z_SR: Tensor,
    gate_NK: Tensor,
    order_S: Tensor,
    start_C1: Tensor,
    *,
    inner_silu: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """a = gate act(z) and dz, [S, R] in sorted order, and dgate [N, K]."""
    channels, ranks, _ = u_CRD.shape
    a_SR, dz_SR, dgate_NK = (torch.empty_like(t) for t in (z_SR, z_SR, gate_NK))
    tile = tile or tile_of("rank_backward", ranks, dy_ND.dtype)
    if z_SR.numel():
        grid: Any = (_tiles(z_SR, channels, tile),)
        RANK_BACKWARD_KERNEL(
            grid,
            dy_ND,
            u_CRD,
            z_SR,
            gate_NK,
            order_S,
            start_C1,
            a_SR,
            dz_SR,
            dgate_NK,
            **_shape(z_SR, u_CRD, tile),
            K=gate_NK.shape[1],
            INNER_SILU=inner_silu,
            DEPTH=tile.depth,
        )
    return a_SR, dz_SR, dgate_NK


def expand(
    z_SR: Tensor,
    w_CRD: Tensor,
    order_S: Tensor | None,
    start_C1: Tensor,
    gate_NK: Tensor | None = None,
    *,
    inner_silu: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """z w_c, or gate act(z) w_c where there are gates: [S, D] in the order of the pairs.

    Without `order`, in that of the rows.
    """
    channels, ranks, width = w_CRD.shape
    out_SD = z_SR.new_empty(len(z_SR), width)
    tile = tile or tile_of("expand", ranks, z_SR.dtype)
    piece = cdiv(cdiv(width, tile.columns), tile.pieces) * tile.columns
    if out_SD.numel():
        grid: Any = (_tiles(z_SR, channels, tile) * cdiv(width, piece),)
        EXPAND_KERNEL(
            grid,
            z_SR,
            gate_NK,
            w_CRD,
            order_S,
            start_C1,
            out_SD,
            **_shape(z_SR, w_CRD, tile),
            GATHER=order_S is not None,
            GATED=gate_NK is not None,
            INNER_SILU=inner_silu,
            COLUMNS=tile.columns,
            PIECE=piece,
            HELD=tile.held,
            EVICT=_evict(tile),
        )
    return out_SD


def fused(
    x_ND: Tensor,
    gate_NK: Tensor,
    v_CRD: Tensor,
    u_CRD: Tensor,
    order_S: Tensor,
    start_C1: Tensor,
    *,
    inner_silu: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`rank`, then `expand`, in one kernel: z [S, R] and the rows [S, D] in pair order.

    Raises ValueError where the tile does not hold all ranks.
    """
    channels, ranks, width = v_CRD.shape
    tile = tile or tile_of("fused", ranks, x_ND.dtype)
    if tile.ranks < ranks:
        raise ValueError(f"Tile.ranks={tile.ranks} must hold all {ranks} ranks; use rank, expand")
    z_SR = x_ND.new_empty(len(order_S), ranks)
    out_SD = x_ND.new_empty(len(order_S), width)
    if out_SD.numel():
        grid: Any = (_tiles(z_SR, channels, tile),)
        FUSED_KERNEL(
            grid,
            x_ND,
            gate_NK,
            v_CRD,
            u_CRD,
            order_S,
            start_C1,
            z_SR,
            out_SD,
            **_shape(z_SR, v_CRD, tile),
            K=gate_NK.shape[1],
            INNER_SILU=inner_silu,
            DEPTH=tile.depth,
            COLUMNS=tile.columns,
            EVICT=_evict(tile),
        )
    return z_SR, out_SD


def weights(
    left: list[Tensor],
    right: list[Tensor],
    order_S: Tensor | None,
    start_C1: Tensor,
    kept: int = 1,
    *,
    tile: Tile | None = None,
) -> list[Tensor]:
    """left^T right over the rows of each channel, [C, R, D], for one or two such products.

    `left` [S, R] in sorted order, `right` [N, D] gathered by token. Both products in one launch.
    """
    channels, ranks, width = len(start_C1) - 1, left[0].shape[1], right[0].shape[1]
    tile = tile or tile_of("weights", ranks, left[0].dtype)
    if order_S is None:
        # Rows found through `order` take two steps of the pipeline a buffer, others one.
        tile = replace(tile, stages=(tile.stages + 1) // 2)
    blocks, columns = cdiv(ranks, tile.ranks) * len(left), cdiv(width, tile.columns)
    programs = channels * columns * blocks
    split = _parts(programs, len(left[0]) // max(1, channels), tile)
    few = 2 * programs <= PROGRAMS  # whatever the rows are, as a kernel is compiled for a dtype
    if few:
        outs = [a.new_empty(split, channels, ranks, width, dtype=torch.float32) for a in left]
    else:
        outs = [a.new_empty(channels, ranks, width) for a in left]
    if outs[0].numel():
        grid: Any = (channels, columns * split, blocks)
        WEIGHTS_KERNEL(
            grid,
            left[0],
            right[0],
            outs[0],
            left[-1],
            right[-1],
            outs[-1],
            order_S,
            start_C1,
            split,
            K=kept,
            D=width,
            R=ranks,
            GATHER=order_S is not None,
            RANKS=tile.ranks,
            DEPTH=tile.depth,
            COLUMNS=tile.columns,
            **_compiled(left[0], tile),
        )
    return [out.sum(0).to(left[0].dtype) for out in outs] if few else outs


def combine(rows_SD: Tensor, tokens: int, *, tile: Tile | None = None) -> Tensor:
    """y [N, D]: the sum of every token's K rows in fp32, k = 0 first."""
    width = rows_SD.shape[1]
    y_ND = rows_SD.new_empty(tokens, width)
    tile = tile or tile_of("combine", 1, rows_SD.dtype)
    columns = min(tile.columns, power_of_2(max(width, 1)))
    if y_ND.numel():
        grid: Any = (cdiv(tokens, tile.rows), cdiv(width, columns))
        COMBINE_KERNEL(
            grid,
            rows_SD,
            y_ND,
            tokens,
            K=len(rows_SD) // tokens,
            D=width,
            ROWS=tile.rows,
            COLUMNS=columns,
            num_warps=tile.warps,
        )
    return y_ND


def _parts(programs: int, rows: int, tile: Tile) -> int:
    """Into how many parts the rows of a channel are split, where too few programs fill a GPU."""
    return max(1, min(PROGRAMS // max(1, programs), rows // (8 * tile.depth)))


def _tiles(z_SR: Tensor, channels: int, tile: Tile) -> int:
    """An upper bound that needs no counts: see `kernels._tile`."""
    return len(z_SR) // tile.rows + channels


def _shape(z_SR: Tensor, w_CRD: Tensor, tile: Tile) -> dict[str, Any]:
    channels, ranks, width = w_CRD.shape
    return {
        "channels": channels,
        "usual": len(z_SR) // (tile.rows * channels) + 1,
        "D": width,
        "R": ranks,
        "ROWS": tile.rows,
        "RANKS": tile.ranks,
        "GROUP": tile.group,
        "SLOTS": power_of_2(channels),
        **_compiled(z_SR, tile),
    }


def _evict(tile: Tile) -> str:
    return "evict_first" if tile.evict else ""


def _compiled(like: Tensor, tile: Tile) -> dict[str, Any]:
    tf32 = kind_of(1, like.dtype) == "tf32"
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }

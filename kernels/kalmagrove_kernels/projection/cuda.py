"""The projection with CUDA C++ where that is faster: the counting sort, and sums in shared memory.

Everything else is the Triton kernels. `accumulate.BLOCKS` says at which ranks a token's pairs are
added up in shared memory; where that cannot be, rows are expanded and added up as in `triton`.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from kalmagrove_kernels import jit
from kalmagrove_kernels.permute.cuda import sort_pairs
from kalmagrove_kernels.permute.reference import Sorted
from kalmagrove_kernels.projection import accumulate, triton

log = logging.getLogger(__name__)
grouped_linear = triton.grouped_linear


def basis_projection(
    x_ND: Tensor,
    kept_NK: Tensor,
    index_NK: Tensor,
    v_CRD: Tensor,
    u_CRD: Tensor,
    *,
    inner_silu: bool,
    block: accumulate.Block | None = None,
) -> Tensor:
    """See `kalmagrove_kernels.projection.basis_projection`. The weights take the dtype of x.

    Args:
        block: sums in shared memory this way, whatever the table says.
    Raises:
        NotImplementedError: the block cannot run the layer.
        TypeError: a dtype other than bf16, fp16 and fp32.
    """
    (tokens, width), kept = x_ND.shape, index_NK.shape[1]
    if block is None and x_ND.is_cuda:
        shape = x_ND.dtype, tokens, kept, len(v_CRD), v_CRD.shape[1], width
        block = _chosen(*shape, x_ND.device)

    def summation(pairs: Sorted) -> triton.Summation:
        assert block is not None
        order_S, _, start_C1 = pairs
        plan = accumulate.plan(order_S, start_C1, tokens, kept, width, block, x_ND.dtype)
        return lambda a_SR, w_CRD: accumulate.accumulate(a_SR, w_CRD, plan)

    return triton.basis_projection(
        x_ND,
        kept_NK,
        index_NK,
        v_CRD,
        u_CRD,
        inner_silu=inner_silu,
        sort=sort_pairs,
        summation=summation if block else None,
    )


def workspace_bytes(
    tokens: int,
    kept: int,
    channels: int,
    rank: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> triton.Bytes:
    """Of `basis_projection` at a shape, fp32 gates, all gradients wanted.

    Sums in shared memory leave out the rows of the pairs: z twice is then the largest part.
    """
    lists = None
    block = _chosen(dtype, tokens, kept, channels, rank, width, device)
    if block:
        processors = jit.multiprocessors(device)
        lists = accumulate.plan_bytes(tokens, kept, channels, width, block, processors)
    return triton.workspace_bytes(tokens, kept, channels, rank, width, dtype, lists)


def _chosen(
    dtype: torch.dtype,
    tokens: int,
    kept: int,
    channels: int,
    rank: int,
    width: int,
    device: torch.device,
) -> accumulate.Block | None:
    if torch.cuda.get_device_capability(device)[0] != 9:
        block, reason = None, "they need a GPU of compute capability 9"
    else:
        processors = jit.multiprocessors(device)
        shape = dtype, tokens, kept, channels, rank, width
        block, reason = accumulate.block_for(*shape, processors)
    _say(block is not None, reason)
    return block


@cache
def _say(runs: bool, reason: str) -> None:
    log.info("basis_projection: %s", reason if runs else f"no sums in shared memory: {reason}")

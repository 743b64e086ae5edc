"""The counting sort in CUDA C++ (`csrc/permute`): three launches, no wait for the device.

Letters: N tokens, K kept, C channels, S = N * K pairs, B blocks of pairs.
"""

import torch
from torch import Tensor

from kalmagrove_kernels import jit
from kalmagrove_kernels.permute.reference import Sorted

WARP_PAIRS = 128  # as in sort_pairs.cu
MAX_WARPS = 8  # of a block; fewer where the channels' counters fill the shared memory
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper


def sort_pairs(index_NK: Tensor, channels: int) -> Sorted:
    """See `kalmagrove_kernels.permute.sort_pairs`.

    Raises:
        NotImplementedError: more channels than counters fit in shared memory.
        RuntimeError: no GPU, or nvcc is missing.
    """
    index_S = index_NK.contiguous().view(-1)
    pairs = index_S.numel()
    warps = _warps(channels)
    blocks = max(1, -(-pairs // (warps * WARP_PAIRS)))
    order_S, place_S = (torch.empty_like(index_S, dtype=torch.int32) for _ in range(2))
    count_BC, total_C = order_S.new_empty(blocks, channels), order_S.new_empty(channels)
    start_C1 = order_S.new_empty(channels + 1)
    tensors = (index_S, count_BC, total_C, order_S, place_S, start_C1)
    sizes = (index_S.element_size(), pairs, channels, blocks, warps)
    jit.library("permute", index_S.device).launch("sort_pairs", *tensors, *sizes)
    return Sorted(order_S, place_S, start_C1)


def _warps(channels: int) -> int:
    """Warps of a block: each has a counter a channel, beside the channels' starts."""
    for warps in (MAX_WARPS, 4, 2, 1):
        if 4 * ((warps + 1) * channels + warps) <= SHARED_MEMORY:
            return warps
    raise NotImplementedError(
        f"the cuda backend of the counting sort has no {channels} channels (at most "
        f"{SHARED_MEMORY // 8 - 1}); choose backend='triton'"
    )

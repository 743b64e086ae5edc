"""The counting sort in Triton: three passes over the index, no float, no atomic.

`_rank` ranks every pair within its channel and its block of BLOCK pairs, and counts; one prefix
sum over the counts, channel-major, is the first place of every (channel, block); `_place` adds the
two. The order is that of the reference, bit for bit.
Letters: S pairs, C channels, B blocks of pairs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kalmagrove_kernels.launch import Launcher
from kalmagrove_kernels.permute.reference import Sorted

BLOCK = 256  # pairs a program: comparisons grow with S * BLOCK, the table of counts with S / BLOCK
CHUNK = 32  # of these, compared at a time


def sort_pairs(index_NK: Tensor, channels: int) -> Sorted:
    """See `kalmagrove_kernels.permute.sort_pairs`."""
    index_S = index_NK.contiguous().view(-1)
    pairs = index_S.numel()
    blocks = triton.cdiv(pairs, BLOCK)
    rank_S, order_S, place_S = (torch.empty_like(index_S, dtype=torch.int32) for _ in range(3))
    if pairs == 0:
        return Sorted(order_S, place_S, order_S.new_zeros(channels + 1))
    count = rank_S.new_zeros(1 + channels * blocks)
    start_C1 = rank_S.new_empty(channels + 1)
    grid: Any = (blocks,)
    RANK(grid, index_S, rank_S, count, pairs, blocks, BLOCK=BLOCK, CHUNK=CHUNK, num_warps=8)
    first = count.cumsum(0, dtype=torch.int32)  # of (channel, block), at channel * blocks + block
    grid = (max(blocks, triton.cdiv(channels + 1, BLOCK)),)
    PLACE(
        grid,
        *(index_S, rank_S, first, order_S, place_S, start_C1, pairs, blocks, channels),
        BLOCK=BLOCK,
    )
    return Sorted(order_S, place_S, start_C1)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def _rank(  # type: ignore[no-untyped-def]
    index_S, rank_S, count, pairs, blocks, BLOCK: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.load(index_S + pair, mask=pair < pairs, other=-1).to(tl.int32)
    # Of the pairs of the same channel in the block: 1 for an earlier one, 2^16 for any.
    seen = tl.zeros([BLOCK, CHUNK], tl.int32)
    for chunk in range(0, BLOCK, CHUNK):
        rival = block * BLOCK + chunk + tl.arange(0, CHUNK)
        theirs = tl.load(index_S + rival, mask=rival < pairs, other=-1).to(tl.int32)
        same = (channel[:, None] == theirs[None, :]).to(tl.int32)
        seen += same * tl.where(rival[None, :] < pair[:, None], 65537, 65536)
    both = tl.sum(seen, 1)
    rank, total = both & 65535, both >> 16
    tl.store(rank_S + pair, rank, mask=pair < pairs)
    # The last pair of a channel in the block knows how many there are; the table starts at zero,
    # and at 1: its prefix sum then is exclusive.
    slot = 1 + channel.to(tl.int64) * blocks + block
    tl.store(count + slot, rank + 1, mask=(pair < pairs) & (rank + 1 == total))


@triton.jit(do_not_specialize=["pairs", "blocks", "channels"])
def _place(  # type: ignore[no-untyped-def]
    index_S, rank_S, first, order_S, place_S, start_C1, pairs, blocks, channels, BLOCK: tl.constexpr
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(first + i.to(tl.int64) * blocks, mask=i <= channels, other=0)
    tl.store(start_C1 + i, start, mask=i <= channels)
    live = i < pairs
    channel = tl.load(index_S + i, mask=live, other=0).to(tl.int64)
    place = tl.load(first + channel * blocks + tl.program_id(0), mask=live, other=0)
    place += tl.load(rank_S + i, mask=live, other=0)
    tl.store(order_S + place, i, mask=live)
    tl.store(place_S + i, place, mask=live)


RANK, PLACE = Launcher(_rank), Launcher(_place)

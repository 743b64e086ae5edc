"""Sums in shared memory (`csrc/projection`): y = every a_pair w_channel of a token, written once.

`cuda` puts it in the place of expanded rows and their sum. A block of the kernel owns some tokens
and columns; `plan` lists, for each block of tokens, the channels it has pairs of.
Letters: N tokens, D model width, C channels, R rank, K kept, S = N * K pairs in sorted order, B
blocks of tokens, I items (up to 64 pairs of a channel), P = 64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kalmagrove_kernels import jit
from kalmagrove_kernels.projection.tiles import kind_of

# As in accumulate.cu: pairs of an item, the rank, columns of a block, groups of four warps.
PIECE, RANK, COLUMNS, GROUPS = 64, 64, 64, 3
SHARED_MEMORY = 227 * 1024  # bytes a block may use on Hopper
FULL = 16  # pairs of a channel a block should have, on average, for its products to be worth it


@dataclass(frozen=True)
class Block:
    """One way to launch the kernel."""

    stages: int = 6  # slices of the weights on their way
    tokens: int | None = None  # of a block; None: few enough to use all multiprocessors evenly

    def __post_init__(self) -> None:
        if self.stages < GROUPS:
            raise ValueError(f"Block.stages={self.stages} must be at least {GROUPS}, the groups")
        if not 1 <= (self.tokens or 1) <= self.most_tokens:
            raise ValueError(
                f"Block.tokens={self.tokens} must be 1 to {self.most_tokens}: their sums lie in "
                "shared memory"
            )

    @property
    def most_tokens(self) -> int:
        """Of which the sums fit beside the stages' weights and the barriers."""
        barriers = -(-(16 * self.stages + 8 * GROUPS) // 128) * 128
        stages = self.stages * 2 * RANK * COLUMNS
        return (SHARED_MEMORY - stages - barriers) // (4 * COLUMNS)

    def tokens_for(self, tokens: int, width: int, processors: int) -> int:
        """Tokens of a block where there are so many in all: the most with which the blocks, one a
        multiprocessor at a time, come in whole turns."""
        if self.tokens is not None:
            return self.tokens
        across, turns = -(-width // COLUMNS), 0
        while True:
            turns += 1
            down = processors * turns // across
            if down * self.most_tokens >= tokens:
                return max(1, -(-tokens // max(1, down)))


# What runs at a rank (see `tiles.kind_of`); None: expanded rows and their sum, in Triton.
BLOCKS: dict[str, Block | None] = {"r64": Block(), "r128": None, "r256": None}


def candidates() -> Iterator[Block]:
    """Blocks worth timing."""
    yield from (Block(stages) for stages in (6, 3, 4, 5, 7))
    yield from (Block(10, tokens) for tokens in (512, 586))


class Plan(NamedTuple):
    """The lists of all blocks of tokens, in device memory."""

    item_BI4: Tensor  # int32: channel, first place, pairs, nothing
    token_BIP: Tensor  # int16: the pairs' tokens, from the block's first on; -1: none
    items_B: Tensor  # int32: items of a block
    block: Block
    tokens: int  # of all
    block_tokens: int

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self[:3])


def refusal(
    dtype: torch.dtype, channels: int, rank: int, width: int, block: Block | None
) -> str | None:
    """Why the kernel cannot run a layer, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, not {dtype}"
    if block is None:
        return "expanded rows are faster at this rank"
    if rank != RANK:
        return f"rank={rank} must be {RANK}"
    if width % 8 or not width:
        return f"width={width} must be a multiple of 8: rows of 16 bytes"
    if 4 * (3 * channels + 1) > SHARED_MEMORY:
        return f"the lists of {channels} channels do not fit in shared memory"
    return None


def block_for(
    dtype: torch.dtype,
    tokens: int,
    kept: int,
    channels: int,
    rank: int,
    width: int,
    processors: int,
) -> tuple[Block | None, str]:
    """The table's block if the kernel can run the layer and should win, else None and why."""
    kind = kind_of(rank, dtype)
    block = BLOCKS.get(kind)
    reason = refusal(dtype, channels, rank, width, block)
    if block is None or reason:
        return None, str(reason)
    if tokens and block.tokens_for(tokens, width, processors) * kept < FULL * channels:
        return None, f"{channels} channels: less than {FULL} pairs of each for a block"
    return block, f"sums in shared memory, {block}"


def plan(
    order_S: Tensor,
    start_C1: Tensor,
    tokens: int,
    kept: int,
    width: int,
    block: Block,
    dtype: torch.dtype,
) -> Plan:
    """The lists, from the sorted order of `kalmagrove_kernels.permute`; no wait for the device.

    dtype: that of the sums to come, so that both need one build.
    """
    device, channels = order_S.device, len(start_C1) - 1
    block_tokens = block.tokens_for(tokens, width, jit.multiprocessors(device))
    blocks, limit = _sizes(tokens, kept, channels, block_tokens)
    item_BI4 = order_S.new_empty(blocks, limit, 4)
    token_BIP = order_S.new_empty(blocks, limit, PIECE, dtype=torch.int16)
    items_B = order_S.new_empty(blocks)
    if blocks:
        tensors = (order_S, start_C1, item_BI4, token_BIP, items_B)
        sizes = (block_tokens, kept, channels, limit, blocks)
        _library(dtype, device).launch("plan", *tensors, *sizes)
    return Plan(item_BI4, token_BIP, items_B, block, tokens, block_tokens)


def plan_bytes(
    tokens: int, kept: int, channels: int, width: int, block: Block, processors: int
) -> int:
    """What a plan holds."""
    block_tokens = block.tokens_for(tokens, width, processors)
    blocks, limit = _sizes(tokens, kept, channels, block_tokens)
    return blocks * (limit * (16 + 2 * PIECE) + 4)


def _sizes(tokens: int, kept: int, channels: int, block_tokens: int) -> tuple[int, int]:
    """Blocks of tokens, and an upper bound of a block's items."""
    pairs = block_tokens * kept
    return -(-tokens // block_tokens), min(channels, pairs) + pairs // PIECE


def accumulate(a_SR: Tensor, w_CRD: Tensor, plan: Plan) -> Tensor:
    """y [N, D]: the sum over a token's pairs of a w_channel, in fp32, channels in order.

    Raises:
        NotImplementedError: `refusal` has a reason.
        RuntimeError: no GPU, nvcc is missing, or the launch failed.
    """
    channels, rank, width = w_CRD.shape
    reason = refusal(a_SR.dtype, channels, rank, width, plan.block)
    if reason:
        raise NotImplementedError(f"adding up in shared memory: {reason}; use stages.expand")
    y_ND = a_SR.new_empty(plan.tokens, width)
    if not a_SR.numel():
        return y_ND.zero_()
    block, (blocks, limit, _) = plan.block, plan.item_BI4.shape
    tensors = (a_SR, w_CRD, plan.item_BI4, plan.token_BIP, plan.items_B, y_ND)
    sizes = (plan.tokens, channels, width, plan.block_tokens, limit, blocks)
    launch = (jit.multiprocessors(a_SR.device), block.stages)
    _library(a_SR.dtype, a_SR.device).launch("accumulate", *tensors, *sizes, *launch)
    return y_ND


def _library(dtype: torch.dtype, device: torch.device) -> jit.Library:
    return jit.library("projection", device, **constants(dtype))


def constants(dtype: torch.dtype) -> dict[str, int]:
    """What a build is made for."""
    return {"DTYPE": jit.DTYPES[dtype]}

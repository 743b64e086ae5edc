"""Block shapes of the ADA kernels, chosen by measurement on one GPU, and how rows are cut in spans.

`triton` reads them when it launches; docs/kernels.md has what else was timed.
"""

from typing import NamedTuple

import torch

from kalmagrove_kernels.launch import cdiv, power_of_2


class Tile(NamedTuple):
    """chunk: tokens that scores are formed of at once (C). columns: of the result, in a program."""

    chunk: int = 64
    columns: int = 64
    warps: int = 4
    stages: int = 2


# By kernel and by the widest of E and F, as a power of two.
TILES: dict[str, dict[int, Tile]] = {
    "attend": {
        64: Tile(64, 64, warps=4, stages=3),
        128: Tile(64, 64, warps=4, stages=3),
        256: Tile(64, 64, warps=8, stages=1),
    },
    "span": {
        64: Tile(64, 64, warps=4, stages=2),
        128: Tile(64, 64, warps=4, stages=2),
        256: Tile(64, 64, warps=4, stages=2),
    },
}
FP32 = Tile(32, 32, warps=4, stages=1)  # twice the bytes, and no tensor core of full precision

FEW = 120  # programs without which most multiprocessors idle; whole rows are best if so many run
PROGRAMS = 256  # else as many, as a second wave hides what the first one waits for
LONGEST = 4096  # tokens of a span; a longer one would not be read any faster
SHORTEST = 256
ANCHOR = 128  # tokens between the points where the gradient of the decay is known exactly


def tile_of(kind: str, widths: tuple[int, int], dtype: torch.dtype) -> Tile:
    """The tile of a kernel ("attend", "span") over tensors of the widths E and F."""
    widest = max(map(power_of_2, widths))
    tile = FP32 if dtype == torch.float32 else TILES[kind][max(64, min(256, widest))]
    return tile._replace(columns=min(tile.columns, max(16, power_of_2(widths[1]))))


def span_of(tokens: int, columns: int) -> int:
    """Tokens of a span, a power of two. A span that is not the whole row costs a state each.

    columns: sequences times heads times the blocks of columns of a head.
    """
    span = max(SHORTEST, power_of_2(tokens))
    if columns >= FEW:
        return span
    while span > SHORTEST and (span > LONGEST or columns * cdiv(tokens, span) < PROGRAMS):
        span //= 2
    return span

"""How the Triton kernels of the polynomial op cut their work: tables to read, override and sweep.

`triton` takes `TILES`, `fit` adapts an entry to the number of orders, `parts` splits the tokens.
Letters: N tokens, I inputs, J outputs, Q orders.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """One program: `rows` x `cols` of the result, `depth` of the contraction at a time.

    rows, cols, depth are N, J, I (forward); N, I, J (inputs); I, J, N (coef). `orders` are
    accumulated together at most (the forward takes all, one after the other).
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    orders: int = 1


# "half": bf16 and fp16; "tf32" and "ieee": fp32 by torch.get_float32_matmul_precision().
TILES: dict[tuple[str, str], Tile] = {
    ("forward", "half"): Tile(128, 128, 32, warps=4, stages=3),
    ("inputs", "half"): Tile(128, 128, 64, warps=8, stages=3, orders=3),
    ("coef", "half"): Tile(128, 128, 64, warps=4, stages=3),
    ("forward", "tf32"): Tile(128, 128, 32, warps=8, stages=3),
    ("inputs", "tf32"): Tile(128, 64, 32, warps=8, stages=2, orders=3),
    ("coef", "tf32"): Tile(128, 64, 32, warps=8, stages=2),
    ("forward", "ieee"): Tile(64, 64, 16, warps=8, stages=2),
    ("inputs", "ieee"): Tile(64, 32, 16, warps=8, stages=2, orders=3),
    ("coef", "ieee"): Tile(64, 64, 16, warps=8, stages=2),
}
# Worth timing for "half" on a GPU; the winners go into TILES.
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "forward": (
        Tile(128, 128, 32, warps=4, stages=3),  # two programs a multiprocessor hide the expansion
        Tile(128, 128, 32, warps=8, stages=3),
        Tile(128, 256, 32, warps=8, stages=4),  # half the expansion
        Tile(256, 128, 32, warps=8, stages=4),  # fewest bytes
        Tile(128, 256, 64, warps=8, stages=2),
    ),
    "inputs": (
        Tile(128, 128, 64, warps=8, stages=3, orders=3),
        Tile(128, 128, 32, warps=8, stages=4, orders=3),
        Tile(256, 64, 64, warps=8, stages=3, orders=3),
        Tile(128, 64, 64, warps=4, stages=3, orders=3),
        Tile(128, 64, 64, warps=8, stages=4, orders=3),
    ),
    "coef": (
        Tile(128, 128, 64, warps=4, stages=3),
        Tile(128, 256, 64, warps=8, stages=3),
        Tile(128, 128, 32, warps=4, stages=4),
        Tile(128, 128, 64, warps=8, stages=3, orders=2),
        Tile(128, 64, 64, warps=4, stages=3, orders=3),
    ),
}
SHARED_BYTES = 224 * 1024  # of a multiprocessor, for eight warps' programs
FULL = 264  # programs that fill 132 multiprocessors twice
MIN_SPLIT = 1024  # tokens a part of a split contraction has at least


def fit(tile: Tile, orders: int, itemsize: int) -> Tile:
    """The tile with stages, then depth, reduced until what `orders` orders load fits.

    A stage holds [rows, depth] of one operand and `orders` times [depth, cols] of the other.
    """
    budget = SHARED_BYTES * tile.warps // 8
    depth = tile.depth
    while True:
        stage = (tile.rows + orders * tile.cols) * depth * itemsize
        stages = min(tile.stages, budget // stage)
        if stages >= 2 or depth <= 16:
            return tile._replace(depth=depth, stages=max(stages, 1))
        depth //= 2


def split_evenly(orders: int, most: int) -> int:
    """The size of the fewest groups of at most `most` orders, as even as possible."""
    return -(-orders // -(-orders // most))


def parts(programs: int, tokens: int) -> int:
    """How many parts of the tokens, so that `programs` programs a part fill the GPU."""
    return max(1, min(FULL // max(programs, 1), tokens // MIN_SPLIT))

"""The tile table of the projection's Triton kernels, and the candidates a sweep should time.

A stage is one kernel: "rank" (z = x V^T; also a grouped linear map), "rank_backward", "expand"
(a U, and dz V), "fused" (rank and expand in one), "weights" (dU and dV), "combine". A kind is a
class of shapes and number formats, as `kind_of` names it. `TILES[stage][kind]` is what runs where
the caller asks for no other tile; entries may be replaced.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """The block of one program. Powers of two; a stage ignores the fields it has no use for."""

    rows: int = 128  # rows (of tokens for "combine")
    ranks: int = 128  # ranks at a time; the rest in further programs or passes
    depth: int = 64  # steps of the summed width: D, or rows for "weights"
    columns: int = 128  # output columns at a time
    pieces: int = 1  # programs that share the columns of the same rows ("expand")
    group: int = 1  # channels whose tiles take turns; 1: one channel after the other
    warps: int = 4
    stages: int = 3  # depth of the software pipeline
    held: bool = False  # the left operand of "expand" in registers, not in shared memory
    evict: bool = False  # expanded rows leave the L2 cache first ("expand", "fused")
    registers: int | None = None  # limit of a thread's, for more programs a multiprocessor

    def __post_init__(self) -> None:
        for name in ("rows", "ranks", "depth", "columns", "warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"Tile.{name}={size} must be a power of two")
        for name in ("pieces", "group", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"Tile.{name}={getattr(self, name)} must be positive")


# fp32 without tf32 multiplies outside the tensor cores: small tiles, any rank.
_IEEE = Tile(rows=32, ranks=32, depth=16, columns=32, warps=4, stages=2)
_TF32 = Tile(rows=64, ranks=64, depth=32, columns=64, warps=4, stages=3)

TILES: dict[str, dict[str, Tile]] = {
    "rank": {
        "r64": Tile(128, 64, 64, warps=8, stages=3),
        "r128": Tile(128, 128, 64, warps=4, stages=3),
        "r256": Tile(128, 256, 64, warps=8, stages=4),
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "rank_backward": {
        "r64": Tile(128, 64, 64, warps=8, stages=3),
        "r128": Tile(64, 128, 64, warps=4, stages=4),
        "r256": Tile(128, 256, 64, warps=8, stages=4),
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "expand": {
        "r64": Tile(128, 64, columns=128, warps=8, stages=3),
        "r128": Tile(128, 128, columns=64, pieces=4, warps=8, stages=4, held=True),
        "r256": Tile(128, 256, 64, 64, 2, warps=8, stages=3, held=True, registers=128),
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "fused": {
        "r64": Tile(64, 64, 64, 128, warps=4, stages=3),
        "r128": Tile(128, 128, 64, 64, warps=8, stages=3),
        "r256": Tile(128, 256, 64, 64, warps=8, stages=4),
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "weights": {
        "r64": Tile(ranks=64, depth=32, columns=256, warps=8, stages=7),
        "r128": Tile(ranks=128, depth=64, columns=256, warps=8, stages=5),
        "r256": Tile(ranks=256, depth=64, columns=128, warps=8, stages=7),
        "tf32": _TF32,
        "ieee": _IEEE,
    },
    "combine": {kind: Tile(rows=1, columns=2048, warps=4) for kind in ("r64", "r128", "r256")}
    | {kind: Tile(rows=1, columns=1024, warps=8) for kind in ("tf32", "ieee")},
}

# "expand" in half precision where no tile holds all ranks: both operands are then loaded in turns.
BEYOND = Tile(128, 128, columns=64, warps=8, stages=3)

# Kinds whose forward pass runs "fused" instead of "rank" and "expand". The fused kernel holds all
# ranks of a row at once, so a larger rank than its tile's falls back.
FUSED: set[str] = {"r64", "r128", "r256"}


def kind_of(rank: int, dtype: torch.dtype) -> str:
    """The kind of a shape: its class of ranks, or the number format of fp32.

    Raises TypeError for a dtype the kernels do not take.
    """
    if dtype == torch.float32:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"dtype={dtype} must be bfloat16, float16 or float32 for backend='triton'")
    return "r64" if rank <= 64 else "r128" if rank <= 128 else "r256"


def tile_of(stage: str, rank: int, dtype: torch.dtype) -> Tile:
    """The table's tile, with no more ranks than there are (16 at least: one step of a product)."""
    kind = kind_of(rank, dtype)
    if stage == "expand" and kind == "r256" and rank > TILES[stage][kind].ranks:
        return BEYOND
    tile = TILES[stage][kind]
    return replace(tile, ranks=min(tile.ranks, max(16, 1 << (rank - 1).bit_length())))


def candidates(stage: str, rank: int) -> Iterator[Tile]:
    """Tiles worth timing in bf16 at a rank of 33..256; every one compiles for sm_90."""
    ranks = max(16, 1 << (rank - 1).bit_length())
    yield from {
        "rank": _rank_candidates,
        "rank_backward": _rank_candidates,
        "expand": _expand_candidates,
        "fused": _fused_candidates,
        "weights": _weights_candidates,
        "combine": _combine_candidates,
    }[stage](ranks)


def _rank_candidates(ranks: int) -> Iterator[Tile]:
    for rows, warps, stages in [(64, 4, 4), (128, 4, 3), (128, 4, 4), (128, 8, 3), (128, 8, 4)]:
        if ranks * rows // warps <= 4096:
            for group in (1, 26):
                yield Tile(rows, ranks, 64, group=group, warps=warps, stages=stages)
    if ranks <= 128:
        yield from (Tile(256, ranks, 64, group=26, warps=8, stages=s) for s in (3, 4))


def _expand_candidates(ranks: int) -> Iterator[Tile]:
    yield from {
        64: [
            *(Tile(128, 64, columns=128, pieces=p, warps=8, registers=128) for p in (1, 2, 4, 8)),
            Tile(128, 64, columns=128, pieces=4, warps=8, evict=True, registers=128),
            *(Tile(64, 64, columns=128, pieces=p, stages=2) for p in (1, 4)),
            *(Tile(64, 64, columns=256, pieces=p, warps=8, stages=2) for p in (1, 4)),
            Tile(128, 64, columns=256, pieces=2, warps=8, stages=2),
        ],
        128: [
            *(Tile(128, 128, columns=64, pieces=p, warps=8, stages=4) for p in (1, 2, 4)),
            Tile(128, 128, columns=64, pieces=4, warps=8, stages=4, evict=True),
            *(Tile(64, 128, columns=128, pieces=p, stages=2) for p in (1, 4)),
            *(Tile(128, 128, columns=128, pieces=p, warps=8, stages=2, held=True) for p in (1, 4)),
            Tile(128, 128, columns=64, pieces=4, warps=8, stages=4, held=True),
        ],
        256: [
            *(Tile(128, 256, columns=64, pieces=p, warps=8, stages=3) for p in (1, 4)),
            *(
                Tile(128, 256, 64, 64, p, warps=8, stages=s, held=True, registers=128)
                for p in (1, 2, 4)
                for s in (2, 3)
            ),
            Tile(128, 256, 64, 64, 4, warps=8, stages=2, held=True, evict=True, registers=128),
            Tile(64, 256, columns=64, pieces=4, stages=2, held=True),
        ],
    }.get(ranks, [Tile(64, ranks, columns=c, pieces=p) for c in (64, 128) for p in (1, 4)])


def _fused_candidates(ranks: int) -> Iterator[Tile]:
    if ranks <= 64:
        for group in (1, 8, 26):
            yield Tile(64, ranks, 64, 128, group=group)
        yield Tile(64, ranks, 64, 128, group=26, evict=True)
        yield Tile(64, ranks, 64, 256, group=26, warps=8, stages=2)
        yield Tile(128, ranks, 64, 128, group=26, warps=8, registers=128)
        yield Tile(256, ranks, 64, 64, group=26, warps=8, stages=2, registers=128)
        yield Tile(256, ranks, 32, 64, group=26, warps=8, stages=4, registers=128)
    elif ranks == 128:
        for group in (1, 8, 26):
            yield Tile(128, ranks, 64, 64, group=group, warps=8)
        yield Tile(128, ranks, 64, 64, group=26, warps=8, evict=True)
        yield Tile(128, ranks, 64, 128, group=26, warps=8, stages=2)
        yield Tile(64, ranks, 64, 64, group=26, stages=4)
        yield Tile(256, ranks, 64, 64, group=26, warps=16)
    else:
        for group, stages in ((1, 4), (26, 3), (26, 4)):
            yield Tile(128, ranks, 64, 64, group=group, warps=8, stages=stages)
        yield Tile(128, ranks, 64, 64, group=26, warps=8, stages=4, evict=True)


def _weights_candidates(ranks: int) -> Iterator[Tile]:
    for columns, warps, depth, stages in [
        (128, 4, 64, 5),
        (128, 8, 64, 5),
        (128, 8, 64, 7),
        (128, 8, 32, 7),
        (256, 4, 64, 5),
        (256, 8, 64, 5),
        (256, 8, 64, 7),
        (256, 8, 32, 7),
    ]:
        if ranks * columns // warps <= 4096:
            yield Tile(ranks=ranks, depth=depth, columns=columns, warps=warps, stages=stages)


def _combine_candidates(ranks: int) -> Iterator[Tile]:
    del ranks
    for rows, columns, warps in [
        (1, 1024, 4),
        (1, 2048, 4),
        (1, 2048, 8),
        (2, 2048, 8),
        (4, 256, 4),
    ]:
        yield Tile(rows=rows, columns=columns, warps=warps)

"""Any part of a tensor from the parts of any other layout; what is missing or doubled is named."""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kalmagrove.config import CheckpointError
from kalmagrove.engine.tensor_index import (
    Entry,
    Part,
    Piece,
    assemble,
    coverage_faults,
    from_json,
    key_of,
    merge,
    to_json,
)

pytestmark = pytest.mark.unit
SHAPES = [(), (1,), (7,), (6, 5), (4, 3, 5), (2, 3, 4, 3)]


def cuts(shape: tuple[int, ...]) -> Iterator[list[Piece]]:
    """Ways to cut a tensor: whole, into single slices, unevenly; along every dimension."""
    yield [None]
    for dim, size in enumerate(shape):
        yield [(dim, start, 1) for start in range(size)]
        if size > 2:
            yield [(dim, 0, 2), (dim, 2, size - 2)]


def cut(whole: Tensor, piece: Piece) -> Tensor:
    return (whole if piece is None else whole.narrow(*piece)).reshape(-1)


def ranges(numel: int, ranks: int) -> list[tuple[int, int]]:
    """(first, numel) of each rank's partition, the last ones shorter or empty, like ZeRO's."""
    size = -(-numel // ranks)
    return [(min(size * r, numel), max(0, min(size, numel - size * r))) for r in range(ranks)]


class Files:
    """Saved parts, and which of their elements were read."""

    def __init__(self, whole: Tensor, pieces: list[Piece], ranks: int) -> None:
        self.stored, parts, self.elements = {}, [], 0
        for piece in pieces:
            flat = cut(whole, piece)
            for rank, (first, numel) in enumerate(ranges(flat.numel(), ranks)):
                file = f"{piece}-{rank}"
                self.stored[file, key_of("w", "weight")] = flat[first : first + numel]
                if numel:
                    parts.append(Part(file, piece, first, numel))
        self.entry = Entry(tuple(whole.shape), ("weight",), {}, tuple(reversed(parts)))

    def read(self, file: str, key: str, start: int, stop: int) -> Tensor:
        part = self.stored[file, key]
        assert 0 <= start < stop <= len(part), "only what overlaps is read"
        self.elements += stop - start
        return part[start:stop]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout_is_read_from_every_other(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    for pieces, ranks in itertools.product(cuts(shape), (1, 2, 3)):
        files = Files(whole, pieces, ranks)
        assert coverage_faults({"w": files.entry}) == []
        for others, count in itertools.product(cuts(shape), (1, 2, 5)):
            for piece in others:
                flat = cut(whole, piece)
                for first, numel in ranges(flat.numel(), count):
                    found = assemble("w", "weight", files.entry, piece, first, numel, files.read)
                    assert torch.equal(found, flat[first : first + numel]), (pieces, piece, first)


def test_only_what_is_needed_is_read() -> None:
    whole = torch.randn(8, 6, 10)
    for pieces in ([None], [(0, 0, 2), (0, 2, 6)]):
        files = Files(whole, pieces, 3)
        found = assemble("w", "weight", files.entry, None, 101, 57, files.read)
        assert torch.equal(found, whole.flatten()[101:158])
        assert files.elements == 57
    files = Files(whole, [(1, 0, 3), (1, 3, 3)], 2)
    assemble("w", "weight", files.entry, (1, 4, 1), 10, 10, files.read)
    assert files.elements == 30, "one row of one piece"


def test_dtypes_stay() -> None:
    whole = torch.randint(0, 9, (4, 4))
    files = Files(whole, [(1, 0, 2), (1, 2, 2)], 1)
    assert torch.equal(
        assemble("w", "weight", files.entry, None, 3, 9, files.read), whole.flatten()[3:12]
    )


def entry(*parts: tuple[Any, int, int], shape: tuple[int, ...] = (4, 6)) -> dict[str, Entry]:
    return {"w": Entry(shape, ("weight",), {}, tuple(Part("f", *part) for part in parts))}


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        (entry((None, 0, 24)), None),
        (entry((None, 5, 19), (None, 0, 5)), None),
        (entry(((1, 4, 2), 0, 8), ((1, 0, 4), 0, 16)), None),
        (entry((None, 0, 1), shape=()), None),
        (entry(shape=(0, 3)), None),
        (entry(), "dimension 0: [0, 4) of 4 is missing"),
        (entry((None, 0, 5), (None, 6, 18)), "elements: [5, 6) of 24 is missing"),
        (entry((None, 0, 20)), "elements: [20, 24) of 24 is missing"),
        (entry((None, 0, 24), (None, 8, 4)), "elements: [8, 12) of 24 is there twice"),
        (entry((None, 0, 25)), "elements: [24, 25) is beyond 24"),
        (entry(((0, 0, 2), 0, 12)), "dimension 0: [2, 4) of 4 is missing"),
        (entry(((0, 0, 2), 0, 12), ((0, 1, 3), 0, 18)), "dimension 0: [1, 2) of 4 is there twice"),
        (
            entry(((0, 0, 2), 0, 12), ((0, 2, 2), 0, 11)),
            "piece [0, 2, 2]: elements: [11, 12) of 12 is missing",
        ),
        (entry(((0, 0, 4), 0, 24), (None, 0, 24)), "its pieces are cut in different ways"),
        (entry(((0, 0, 4), 0, 24), ((1, 0, 6), 0, 24)), "its pieces are cut in different ways"),
    ],
)
def test_each_element_must_be_there_once(index: dict[str, Entry], fault: str | None) -> None:
    shape = list(index["w"].shape)
    assert coverage_faults(index) == ([] if fault is None else [f"w {shape}: {fault}"])


def test_indices_of_ranks_are_merged_if_they_agree() -> None:
    left = {"w": Entry((4,), ("weight", "m"), {"step": 3.0}, (Part("a", None, 0, 2),))}
    right = {"w": Entry((4,), ("weight", "m"), {"step": 3.0}, (Part("b", None, 2, 2),))}
    merged = merge([left, right])
    assert coverage_faults(merged) == []
    assert from_json(json.loads(json.dumps(to_json(merged)))) == merged
    for other, what in (
        (Entry((4,), ("weight", "m"), {"step": 4.0}, ()), "scalars"),
        (Entry((4,), ("weight",), {"step": 3.0}, ()), "kinds"),
        (Entry((5,), ("weight", "m"), {"step": 3.0}, ()), "shape"),
    ):
        with pytest.raises(CheckpointError, match=f"{what} of w differ between ranks"):
            merge([left, {"w": other}])


@pytest.mark.parametrize("tree", [[], {"w": 3}, {"w": {"shape": [2]}}])
def test_a_damaged_index_is_an_error(tree: Any) -> None:
    with pytest.raises(CheckpointError, match="index is damaged"):
        from_json(tree)

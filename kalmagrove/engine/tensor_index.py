"""Which file holds which part of which tensor, and how any part is put together from others.

Whole tensors are cut twice: into pieces along one dimension (tensor and expert parallelism), and a
piece, flattened, into ranges (ZeRO). A checkpoint's index names every part once; what a rank of
another layout needs is assembled from the parts that overlap it. No engine, no processes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kalmagrove.config import CheckpointError
from kalmagrove.config.names import is_file_name

WEIGHT, BUFFER = "weight", "buffer"  # kinds that are no optimizer state
Piece = tuple[int, int, int] | None  # dimension, start, length; None: whole
Box = tuple[tuple[int, int], ...]  # [start, stop) in every dimension of the whole tensor
Read = Callable[[str, str, int, int], Tensor]  # file, key, start, stop -> 1-D


@dataclass(frozen=True)
class Part:
    """Elements [first, first + numel) of a flattened piece; one entry a kind in `file`."""

    file: str
    piece: Piece
    first: int
    numel: int


@dataclass(frozen=True)
class Entry:
    """One whole tensor and what is kept of it.

    kinds: "buffer", or "weight" and the optimizer's states of the parameter; all are cut alike.
    scalars: states that are one number a parameter, like "step".
    """

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    scalars: Mapping[str, float]
    parts: tuple[Part, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Index = dict[str, Entry]


def key_of(name: str, kind: str) -> str:
    """The name of a part within its file: "blocks.0.norm/exp_avg"."""
    return f"{name}/{kind}"


def to_json(index: Index) -> dict[str, Any]:
    return {
        name: {
            "shape": entry.shape,
            "kinds": entry.kinds,
            "scalars": dict(entry.scalars),
            "parts": [[part.file, part.piece, part.first, part.numel] for part in entry.parts],
        }
        for name, entry in index.items()
    }


def from_json(tree: dict[str, Any]) -> Index:
    """The index that `to_json` wrote.

    Raises:
        CheckpointError: it is not of this form.
    """
    try:
        return {
            name: Entry(
                tuple(entry["shape"]),
                tuple(entry["kinds"]),
                entry["scalars"],
                tuple(_part(*part) for part in entry["parts"]),
            )
            for name, entry in tree.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's index is damaged: {error!r}") from None


def _part(file: str, piece: Any, first: int, numel: int) -> Part:
    if not is_file_name(file):
        raise CheckpointError(f"the checkpoint's index names {file!r}, no file of its folder")
    return Part(file, None if piece is None else tuple(piece), first, numel)


def merge(indices: Iterable[Index]) -> Index:
    """One index from those of all ranks, in their order.

    Raises:
        CheckpointError: two ranks do not agree on a tensor's shape or states.
    """
    whole: Index = {}
    for index in indices:
        for name, entry in index.items():
            known = whole.get(name, Entry(entry.shape, entry.kinds, entry.scalars, ()))
            for what in ("shape", "kinds", "scalars"):
                if getattr(known, what) != getattr(entry, what):
                    raise CheckpointError(
                        f"{what} of {name} differ between ranks: {getattr(known, what)}, "
                        f"{getattr(entry, what)}"
                    )
            parts = known.parts + entry.parts
            whole[name] = Entry(entry.shape, entry.kinds, entry.scalars, parts)
    return whole


def coverage_faults(index: Index) -> list[str]:
    """What is missing or there twice, one line a tensor; none if every element is there once."""
    found = []
    for name, entry in index.items():
        fault = _coverage_fault(entry)
        if fault:
            found.append(f"{name} {list(entry.shape)}: {fault}")
    return found


def _coverage_fault(entry: Entry) -> str | None:
    if not entry.numel:
        return None
    pieces = _by_piece(entry.parts)
    dims = {piece[0] for piece in pieces if piece is not None}
    if len(dims) + (None in pieces) > 1:
        return "its pieces are cut in different ways"
    if None not in pieces:
        spans = [(piece[1], piece[1] + piece[2]) for piece in pieces if piece is not None]
        dim = dims.pop() if dims else 0
        fault = _tiling_fault(spans, entry.shape[dim])
        if fault:
            return f"dimension {dim}: {fault}"
    for piece, parts in pieces.items():
        size = math.prod(_lengths(_box(entry.shape, piece)))
        fault = _tiling_fault([(p.first, p.first + p.numel) for p in parts], size)
        if fault:
            where = "" if piece is None else f"piece {list(piece)}: "
            return f"{where}elements: {fault}"
    return None


def _tiling_fault(spans: list[tuple[int, int]], size: int) -> str | None:
    """Where the spans leave out or repeat something of [0, size)."""
    reached = 0
    for start, stop in sorted(spans):
        if start > reached:
            return f"[{reached}, {start}) of {size} is missing"
        if start < reached:
            return f"[{start}, {min(reached, stop)}) of {size} is there twice"
        reached = stop
    if reached < size:
        return f"[{reached}, {size}) of {size} is missing"
    return f"[{size}, {reached}) is beyond {size}" if reached > size else None


def assemble(
    name: str, kind: str, entry: Entry, piece: Piece, first: int, numel: int, read: Read
) -> Tensor:
    """Elements [first, first + numel) of the flattened `piece` of a tensor, on the CPU.

    Only rows (of the tensor as `_collapsed` has it) that hold something of it are read. The entry
    must be covered; see `coverage_faults`.
    """
    if not numel:
        return torch.empty(0)
    entry, piece = _collapsed(entry, piece)
    wanted = _box(entry.shape, piece)
    width = math.prod(_lengths(wanted)[1:])
    top, bottom = first // width, -(-(first + numel) // width)
    start = wanted[0][0]
    wanted = ((start + top, start + bottom), *wanted[1:])
    out: Tensor | None = None
    for box, block in _blocks(key_of(name, kind), entry, wanted, read):
        if box == wanted:
            out = block
            break
        if out is None:
            out = block.new_empty(_lengths(wanted))
        common = _common(wanted, box)
        out[_within(common, wanted)] = block[_within(common, box)]
    assert out is not None, f"nothing of {name} overlaps what is asked for"
    skip = first - top * width
    return out.reshape(-1)[skip : skip + numel]


def _collapsed(entry: Entry, piece: Piece) -> tuple[Entry, Piece]:
    """The same with as few dimensions as the cuts allow, so that rows are short.

    Cuts along dimension 0 are ranges of the flattened tensor: it has one dimension then, and a row
    is an element. Otherwise what lies before the dimension that is cut is one, and so is the rest.
    """
    pieces = {piece, *(part.piece for part in entry.parts)}
    dims = {cut[0] for cut in pieces if cut is not None}
    if len(dims) > 1:
        return entry, piece
    dim = dims.pop() if dims else 0
    inner = math.prod(entry.shape[dim + 1 :])
    if dim == 0:
        shape: tuple[int, ...] = (entry.numel,)
        moved = {p: None if p is None else (0, p[1] * inner, p[2] * inner) for p in pieces}
    else:
        shape = (math.prod(entry.shape[:dim]), entry.shape[dim], inner)
        moved = {p: None if p is None else (1, p[1], p[2]) for p in pieces}
    parts = tuple(replace(part, piece=moved[part.piece]) for part in entry.parts)
    return replace(entry, shape=shape, parts=parts), moved[piece]


def _blocks(key: str, entry: Entry, wanted: Box, read: Read) -> Iterator[tuple[Box, Tensor]]:
    """The rows of each piece that overlaps `wanted`, with their place in the whole tensor."""
    for piece, parts in _by_piece(entry.parts).items():
        held = _box(entry.shape, piece)
        common = _common(wanted, held)
        if any(start >= stop for start, stop in common):
            continue
        box = (common[0], *held[1:])
        width = math.prod(_lengths(held)[1:])
        begin, end = ((row - held[0][0]) * width for row in common[0])
        found = [
            read(part.file, key, max(begin - part.first, 0), min(end - part.first, part.numel))
            for part in sorted(parts, key=lambda part: part.first)
            if part.first < end and begin < part.first + part.numel
        ]
        flat = found[0] if len(found) == 1 else torch.cat(found)
        yield box, flat.view(_lengths(box))


def _by_piece(parts: Iterable[Part]) -> dict[Piece, list[Part]]:
    found: dict[Piece, list[Part]] = {}
    for part in parts:
        found.setdefault(part.piece, []).append(part)
    return found


def _box(shape: tuple[int, ...], piece: Piece) -> Box:
    spans = [(0, size) for size in shape]
    if piece is not None:
        dim, start, length = piece
        spans[dim] = (start, start + length)
    return tuple(spans)


def _lengths(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _common(left: Box, right: Box) -> Box:
    return tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))


def _within(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - base, stop - base)
        for (start, stop), (base, _) in zip(inner, outer, strict=True)
    )

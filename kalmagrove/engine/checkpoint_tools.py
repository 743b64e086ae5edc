"""What can be done to a checkpoint without a run: verify it, convert it. One process, no engine.

Called by `kalmagrove checkpoint`.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kalmagrove.config import CheckpointError
from kalmagrove.engine.checkpoint_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    faults,
    find_checkpoints,
    part_faults,
    read_index,
    read_state,
    shard_file,
    sync,
    write_state,
)
from kalmagrove.engine.rank_state import RANK
from kalmagrove.engine.tensor_files import FileWriter, Stored, TensorReader
from kalmagrove.engine.tensor_index import (
    BUFFER,
    WEIGHT,
    Entry,
    Index,
    Part,
    assemble,
    coverage_faults,
    key_of,
    to_json,
)

RANDOM_STATES = (key_of(RANK, "torch"), key_of(RANK, "cuda"))


def newest(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run there.

    Raises:
        CheckpointError: there is none.
    """
    found = find_checkpoints(path)
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint; give the folder of a run or checkpoint")
    return found[0]


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line each: files, checksums, and what they cover.

    Raises:
        CheckpointError: another version of the code made it.
    """
    found = faults(folder)
    try:
        index = read_index(folder)
    except CheckpointError as error:
        return [*found, str(error)]
    return found or coverage_faults(index) or part_faults(index, TensorReader(folder))


def convert(source: Path, target: Path, *, weights_only: bool = False) -> None:
    """Write the checkpoint `source` anew as one process would have: one file of whole tensors.

    Any layout loads either. `target` appears when it is complete.

    Args:
        weights_only: leave out the optimizer's states, which then begin anew.

    Raises:
        CheckpointError: `source` is not whole, `target` exists or cannot be written.
    """
    partial = target.with_name(target.name + ".tmp")
    for folder in (target, partial):
        if folder.exists():
            raise CheckpointError(f"{folder} exists already; give another target, or remove it")
    wrong = verify(source)
    if wrong:
        raise CheckpointError(f"{source} is damaged: {'; '.join(wrong[:5])}")
    files = FileWriter(partial)
    files.attempt(lambda: partial.mkdir(parents=True))
    files.attempt(lambda: _convert(source, files, weights_only))
    files.attempt(lambda: partial.rename(target))
    files.attempt(lambda: sync(target.parent))
    if files.error is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{target} could not be written: {files.error}")


def _convert(source: Path, files: FileWriter, weights_only: bool) -> None:
    state, reader, file = read_state(source), TensorReader(source), shard_file(0)
    index = read_index(source)
    if weights_only:
        index = {
            name: entry if entry.kinds == (BUFFER,) else replace(entry, kinds=(WEIGHT,), scalars={})
            for name, entry in index.items()
        }
    ranks = [shard_file(rank) for rank in range(state["layout"]["world"])]
    tensors = {
        key_of(name, kind): _whole(name, kind, entry, reader)
        for name, entry in index.items()
        for kind in entry.kinds
        if entry.numel
    }
    files.tensors(file, tensors | _rank_state(ranks, reader), reader.metadata(ranks[0]))
    weights = {key: Stored.of(reader.whole(WEIGHTS_FILE, key)) for key in reader.keys(WEIGHTS_FILE)}
    files.tensors(WEIGHTS_FILE, weights)
    files.json(INDEX_FILE, to_json({name: _in_one(entry, file) for name, entry in index.items()}))
    if files.error is not None:
        raise files.error
    alone = {"world": 1, "tp": 1, "ep": 1, "cp": 1, "dp": 1, "zero.stage": 0}
    layout = {**state["layout"], **alone}
    write_state(files.folder, {**state, "layout": layout, "files": files.written})
    sync(files.folder)


def _whole(name: str, kind: str, entry: Entry, reader: TensorReader) -> Stored:
    """The tensor put together when its turn to be written has come."""
    dtype = reader.dtype(entry.parts[0].file, key_of(name, kind))

    def read() -> Tensor:
        return assemble(name, kind, entry, None, 0, entry.numel, reader.read)

    return Stored(dtype, (entry.numel,), read)


def _in_one(entry: Entry, file: str) -> Entry:
    return replace(entry, parts=(Part(file, None, 0, entry.numel),) if entry.numel else ())


def _rank_state(ranks: list[str], reader: TensorReader) -> dict[str, Stored]:
    """The random states of the first rank, and the sum of what the ranks counted."""
    found: dict[str, Stored] = {}
    for key in reader.keys(ranks[0]):
        if key in RANDOM_STATES:
            found[key] = Stored.of(reader.whole(ranks[0], key))
        elif key.startswith(key_of(RANK, "")):
            counts = torch.stack([reader.whole(file, key) for file in ranks])
            found[key] = Stored.of(counts.sum(0).to(counts.dtype))
    return found


def sizes(index: Index) -> dict[str, tuple[int, int]]:
    """(tensors, elements) of every kind: weights, buffers, each of the optimizer's states."""
    found: dict[str, tuple[int, int]] = {}
    for entry in index.values():
        for kind in entry.kinds:
            tensors, elements = found.get(kind, (0, 0))
            found[kind] = tensors + 1, elements + entry.numel
    return found

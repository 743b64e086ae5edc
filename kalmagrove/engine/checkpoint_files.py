"""A checkpoint as files: names, integrity, age, and whether it fits a run. One process, no engine.

Used by `checkpoint`, which adds what needs an engine and all ranks.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kalmagrove.config import CheckpointError
from kalmagrove.config.files import checkpoints_in, step_of
from kalmagrove.engine.tensor_files import TensorReader, inside
from kalmagrove.engine.tensor_index import Index, from_json, key_of

FORMAT = 2
STATE_FILE = "state.json"
INDEX_FILE = "index.json"
WEIGHTS_FILE = "model.safetensors"
UNFINISHED = (".tmp", ".old")
# Sections of a configuration that say what the model is: of `Run`, of `Retrofit`.
MODEL_KEYS = (
    "model", "base", "scratch", "last", "blocks", "replace", "ffn", "hidden", "train", "embeddings",
    "norms",
)  # fmt: skip
# Settings under `model` that change neither weights nor results.
FREE_MODEL_KEYS = ("model.name", "model.backend", "model.init")
POSITION_KEYS = ("samples",)  # of the batches' state: where they are, not what they are


class FormatError(CheckpointError):
    """A checkpoint that another version of the code can read."""


def shard_file(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def find_checkpoints(path: Path) -> list[Path]:
    """Checkpoint folders at `path`, newest first: itself, or those in a run's folder."""
    if (path / STATE_FILE).is_file():
        return [path]
    for place in (path / "checkpoints", path):
        if found := checkpoints_in(place):
            return found
    return []


def remove_unfinished(checkpoints: Path) -> None:
    """Delete what a killed save left; a whole checkpoint being replaced gets its name back."""
    for folder in checkpoints.glob("step-*"):
        if folder.suffix not in UNFINISHED:
            continue
        final = folder.with_suffix("")
        if folder.suffix == ".old" and not final.exists():
            folder.rename(final)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def rotate(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep`, renaming first so that half a deletion is never loaded."""
    for folder in find_checkpoints(checkpoints)[keep:]:
        doomed = folder.with_name(folder.name + ".tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def set_aside(checkpoints: Path, newer_than: int) -> list[Path]:
    """Rename checkpoints of later steps to step-N.aside: the run that made them is not continued.

    Else rotation and `resume=auto` would prefer them to the new ones.
    """
    moved = []
    for folder in find_checkpoints(checkpoints):
        if step_of(folder) > newer_than:
            aside, number = folder.with_name(folder.name + ".aside"), 2
            while aside.exists():
                aside, number = folder.with_name(f"{folder.name}.aside{number}"), number + 1
            moved.append(folder.rename(aside))
    return moved


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(tree, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def write_state(folder: Path, tree: dict[str, Any]) -> None:
    """Write `state.json`, which vouches for all other files, with a checksum of itself."""
    write_json(folder / STATE_FILE, {**tree, "checksum": _checksum_of(tree)})


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
        FormatError: it is of another format.
    """
    path = inside(folder, STATE_FILE)
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stated = tree.pop("checksum", None)  # older versions wrote none
        version = tree["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if stated is not None and stated != _checksum_of(tree):
        raise CheckpointError(f"{STATE_FILE} has a wrong checksum")
    if version != FORMAT:
        raise FormatError(
            f"{path} has format {version}; this version of kalmagrove reads format {FORMAT}; "
            "continue it with the version that made it, or use checkpoint.resume=never"
        )
    return tree


def _checksum_of(tree: dict[str, Any]) -> int:
    """CRC-32 of a tree of plain data, the same before it is written and after it is read."""
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32."""
    total, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total, size = zlib.crc32(block, total), size + len(block)
    return size, total


def faults(folder: Path, rank: int = 0, ranks: int = 1, *, only: str | None = None) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; none if it is whole.

    Args:
        rank, ranks: of several processes, each reads its share of the files.
        only: look at this file alone.

    Raises:
        FormatError: another version of the code made it.
    """
    try:
        files = read_state(folder)["files"]
    except FormatError:
        raise
    except (CheckpointError, KeyError) as error:
        return [str(error)]  # also a rank that does not see what others see says so
    names = [only] if only else sorted(files)[rank::ranks]
    found = []
    for name in names:
        try:
            path = inside(folder, name)
            if name not in files or not path.is_file():
                found.append(f"{name} is missing")
                continue
            size, total = files[name]
            actual = path.stat().st_size
            if actual != size:
                found.append(f"{name} has {actual} bytes instead of {size}")
            elif checksum(path)[1] != total:
                found.append(f"{name} has a wrong checksum")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
        except (TypeError, ValueError):
            found.append(f"{STATE_FILE} does not say what {name} holds")
        except CheckpointError as error:
            found.append(str(error))
    return found


def read_index(folder: Path) -> Index:
    """The index of a checkpoint's tensors.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = inside(folder, INDEX_FILE)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return from_json(tree)


def part_faults(index: Index, reader: TensorReader, rank: int = 0, ranks: int = 1) -> list[str]:
    """What the files do not hold as the index says, one line each.

    Args:
        rank, ranks: of several processes, each looks at its share of the files.
    """
    found = []
    mine = set(sorted({part.file for entry in index.values() for part in entry.parts})[rank::ranks])
    for name, entry in index.items():
        for part in entry.parts:
            if part.file not in mine:
                continue
            for kind in entry.kinds:
                try:
                    actual = reader.shape(part.file, key_of(name, kind))
                except CheckpointError as error:
                    found.append(str(error))
                    continue
                if actual != (part.numel,):
                    where = f"{part.file}: {key_of(name, kind)}"
                    found.append(f"{where} has shape {actual} instead of {(part.numel,)}")
    return found


def differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Why a checkpoint cannot continue a run: "model.d_model: checkpoint 256, run 128", ...

    A setting that only one of the two knows is of another version of the code, and not compared.
    Nor is the layout: any can be loaded into any.

    Args:
        saved, here: trees with run, parameters and batches, as in `state.json`.
    """
    old, new = _identity(saved), _identity(here)
    lines = [
        f"{key}: checkpoint {_show(old[key])}, run {_show(new[key])}"
        for key in old
        if key in new and old[key] != new[key]
    ]
    if not lines and saved["parameters"] != here["parameters"]:
        lines = ["the parameters' names or shapes differ (made by another version of the code?)"]
    if not lines and saved.get("frozen") != here.get("frozen"):
        lines = ["the weights that do not train differ (has the base model changed?)"]
    return lines


def _identity(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings, flattened to dotted keys, that must agree."""
    run = tree["run"]
    chosen = {
        **{key: run[key] for key in MODEL_KEYS if key in run},
        "data": {"tokenizer": run["data"]["tokenizer"]},
        "optim": {"kind": run["optim"]["kind"], "decay_splines": run["optim"]["decay_splines"]},
        "batches": {k: v for k, v in tree["batches"].items() if k not in POSITION_KEYS},
    }
    flat = dict(_flatten(chosen))
    return {key: value for key, value in flat.items() if not key.startswith(FREE_MODEL_KEYS)}


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree


def _show(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."

"""Where the questions of a task come from: files in a folder, or a dataset on the hub.

The task files of `kalmagrove/evaluate/tasks` name `docs`, `bbh_choice`, `bbh_open` or `mmlu` as
their `custom_dataset`, so lm-eval calls them; `forms` gives what they read one shape.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from kalmagrove.config import DataError
from kalmagrove.evaluate import forms
from kalmagrove.evaluate.forms import Doc

SUFFIXES = ("", ".zst", ".gz")
Row = dict[str, Any]


class Docs(list[Doc]):
    """The questions of a task, as lm-eval takes them: a list that tells the names of its fields."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0]) if self else {}


def docs(
    *,
    form: str,
    file: str,
    hub: dict[str, str],
    shots: str | None = None,
    subject: str | None = None,
    choices: list[str] | None = None,
    files: str | None = None,
    **_: Any,
) -> dict[str, Docs]:
    """The splits `test` and `shots` (examples; empty if the task has none of its own).

    Args:
        form: function of `forms` that makes a question of a row.
        file: with the rows, below the folder `files`.
        hub: path, name, split and shots of a dataset with the same rows, used without `files`.
        shots: a file of examples: rows like those of `file`, or a cot-prompts text.
        subject: only rows of this one.
        choices: the answers of a task whose questions do not list them.

    Raises:
        DataError: naming the file or dataset that is missing or damaged.
    """
    rows: dict[str, list[Row]] = {"shots": []}
    if files is None:
        name, split = hub.get("name"), hub.get("split", "test")
        rows["test"] = fetch_rows(hub["path"], name, split)
        if "shots" in hub:
            rows["shots"] = fetch_rows(hub["path"], name, hub["shots"])
    else:
        rows["test"] = read_rows(locate(files, file))
        if shots is not None and (path := find(files, shots)) is not None:
            rows["shots"] = read_rows(path)
    given = {} if choices is None else {"choices": choices}
    found = {split: _docs(form, rows[split], subject, given, file) for split in rows}
    if not found["test"]:
        raise DataError(f"{file} holds no question" + (f" on {subject}" if subject else ""))
    return found


def bbh_choice(*, name: str, **options: Any) -> dict[str, Docs]:
    """A task of BIG-Bench Hard, to be answered by one of its options."""
    return _bbh("bbh_choice", name, options)


def bbh_open(*, name: str, **options: Any) -> dict[str, Docs]:
    """A task of BIG-Bench Hard, its answer to be written."""
    return _bbh("bbh_open", name, options)


def _bbh(form: str, name: str, options: dict[str, Any]) -> dict[str, Docs]:
    hub = {"path": "SaylorTwift/bbh", "name": name}
    examples = f"bbh/cot-prompts/{name}.txt"
    return docs(form=form, file=f"bbh/{name}.json", hub=hub, shots=examples, **options)


def mmlu(*, subject: str, **options: Any) -> dict[str, Docs]:
    """A subject of MMLU, with its development questions as examples."""
    hub = {"path": "cais/mmlu", "name": subject, "shots": "dev"}
    examples = "mmlu/dev.jsonl"
    return docs(
        form="mmlu", file="mmlu/test.jsonl", hub=hub, shots=examples, subject=subject, **options
    )


def _docs(
    form: str, rows: list[Row], subject: str | None, given: dict[str, Any], file: str
) -> Docs:
    make: Callable[..., Doc | None] = getattr(forms, form)
    made = Docs()
    for number, row in enumerate(rows, start=1):
        try:
            if subject is not None and row.get("subject", subject) != subject:
                continue
            doc = make(row, **given)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{file}: row {number} is no {form} question ({reason})") from None
        if doc is not None:
            made.append(doc)
    return made


def find(files: str, file: str) -> Path | None:
    """`file` below `files`, plain or compressed; `files` may also be the file's own folder."""
    folder = Path(files).expanduser()
    first, _, rest = file.partition("/")
    places = [folder / file] + ([folder / rest] if folder.name == first else [])
    for place in places:
        for suffix in SUFFIXES:
            path = place.with_name(place.name + suffix)
            if path.is_file():
                return path
    return None


def locate(files: str, file: str) -> Path:
    """Like `find`.

    Raises:
        DataError: if the file is missing.
    """
    path = find(files, file)
    if path is None:
        raise DataError(
            f"files={files} lacks {file} (or with .zst, .gz); docs/evaluation.md lists the files "
            "of each suite, and without files= they come from the hub"
        )
    return path


def read_rows(path: Path) -> list[Row]:
    """The rows of a file by its name: .jsonl, .json with `examples`, .csv, .txt (cot-prompts)."""
    return _read_rows(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)  # MMLU's subjects share a file
def _read_rows(path: Path, changed: int) -> list[Row]:
    text = read_text(path)
    kind = next(suffix for suffix in reversed(path.suffixes) if suffix not in SUFFIXES)
    try:
        if kind == ".csv":
            return [dict(row) for row in csv.DictReader(io.StringIO(text))]
        if kind == ".txt":
            return forms.cot_prompts(text)
        if kind == ".json":
            return list(json.loads(text)["examples"])
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def read_text(path: Path) -> str:
    """The text of a file, decompressed by its suffix.

    Raises:
        DataError: if it is missing, damaged or not UTF-8.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".zst":
            raw = _unzstd(raw)
        elif path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; fetch it again") from None


def _unzstd(raw: bytes) -> bytes:
    import zstandard

    parts = []
    while raw:
        frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            parts.append(frame.decompress(raw))
        except zstandard.ZstdError as error:
            raise ValueError(error) from None
        if not frame.eof:
            raise ValueError("it ends inside a zstd frame")
        raw = frame.unused_data
    return b"".join(parts)


def fetch_rows(path: str, name: str | None = None, split: str = "test") -> list[Row]:
    """The rows of a dataset on the hub, or in its cache on this machine.

    Raises:
        DataError: if it cannot be fetched.
    """
    import datasets

    try:
        return list(datasets.load_dataset(path, name, split=split))
    except Exception as error:  # datasets, huggingface_hub and the network raise what they like
        reason = str(error).strip().split("\n")[0][:200]
        shown = path + (f"/{name}" if name else "")
        raise DataError(
            f"the dataset {shown} cannot be fetched ({type(error).__name__}: {reason}); without a "
            "network give files=DIR"
        ) from None

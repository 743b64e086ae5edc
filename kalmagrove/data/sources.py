"""Documents out of files: the standard library's own source, text, JSON lines and parquet.

`locate` lists the files (which also identifies the corpus), `read` yields their documents in order.
Hugging Face datasets are in `hub`.
"""

import glob
import gzip
import io
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kalmagrove import config
from kalmagrove.config import DataError
from kalmagrove.data import hub
from kalmagrove.data.rows import Document, Format, Tally, Where, parse

CHUNK = 1 << 18  # bytes read at once
STDLIB_SKIP = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
# ^ tests repeat themselves and hold foreign encodings; `encodings` is mostly tables


@dataclass(frozen=True)
class Listing:
    """The files of a source, and what identifies their content without reading it all."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    identity: tuple[Any, ...]

    @property
    def total_bytes(self) -> int | None:
        """Of all files; None where there are none to measure (a dataset on the hub)."""
        return sum(p.stat().st_size for p in (*self.train, *self.val)) or None


def locate(source: config.Source) -> Listing:
    """Find the files of `source`.

    Raises:
        DataError: if a path or glob matches no file, or a file is on both sides of the split.
    """
    if source.kind == "stdlib":
        root = stdlib_root()
        files = tuple(stdlib_files(root))
        if not files:
            raise DataError(f"{root} holds no .py files; use data=text with files of your own")
        sums = [(str(p.relative_to(root)), zlib.crc32(p.read_bytes())) for p in files]
        return Listing(files, (), ("python", platform.python_version(), *sums))
    if source.kind == "hf":
        return Listing((), (), hub.identity(source))
    train = _expand("data.source.paths", source.paths)
    val = _expand("data.source.val_paths", source.val_paths)
    if both := set(train) & set(val):
        raise DataError(
            f"{min(both)} is in data.source.paths and in data.source.val_paths; "
            "a held-out file must not be trained on"
        )
    marks = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in (*train, *val)]
    return Listing(train, val, tuple(marks))


def read(
    source: config.Source, form: Format, listing: Listing, split: str, tally: Tally
) -> Iterator[Document]:
    """Documents of `split` ("train": all that is not a held-out split of its own; or "val")."""
    if source.kind == "hf":
        name = source.split if split == "train" else source.val_split
        assert name is not None
        documents = hub.read(source, name, form, tally)
    else:
        files = listing.train if split == "train" else listing.val
        documents = (d for file in files for d in _read_file(source, file, form, tally))
    return islice(documents, source.max_documents)


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(root: Path) -> list[Path]:
    """The .py files below `root` that are text worth learning, sorted by their relative path."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - STDLIB_SKIP)
        for name in names:
            generated = name.startswith("_sysconfigdata")  # differs from machine to machine
            if name.endswith(".py") and not generated:
                found.append(Path(folder, name))
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    return [path for path in found if _is_utf8(path)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _expand(key: str, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        full = str(Path(pattern).expanduser())
        paths = [Path(full)] if Path(full).is_file() else _glob(full)
        if not paths:
            is_folder = Path(full).is_dir()
            problem = "is a folder" if is_folder else "matches no file"
            remedy = f"try {pattern.rstrip('/')}/*" if is_folder else "check the path"
            raise DataError(f"{key}={pattern} {problem}; {remedy}")
        found.update(dict.fromkeys(path.resolve() for path in paths))
    return tuple(found)


def _glob(pattern: str) -> list[Path]:
    return sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())


def _read_file(source: config.Source, file: Path, form: Format, tally: Tally) -> Iterator[Document]:
    try:
        if source.kind == "jsonl":
            yield from _read_jsonl(file, source.key, form, tally)
        elif source.kind == "parquet":
            yield from _read_parquet(file, source.key, form, tally)
        else:
            yield from _read_text(file, form, tally)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _read_text(file: Path, form: Format, tally: Tally) -> Iterator[Document]:
    raw = b"".join(_chunks(file, tally))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        tally.rows += 1
        tally.reject("not UTF-8", Where(str(file), 1))
        return
    yield from parse(text, Where(str(file), 1), "text", form, tally)


def _read_jsonl(file: Path, key: str, form: Format, tally: Tally) -> Iterator[Document]:
    for number, line in enumerate(_lines(_chunks(file, tally)), start=1):
        if not line.strip():
            continue
        where = Where(str(file), number)
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            tally.rows += 1
            utf8 = not isinstance(error, UnicodeDecodeError)
            tally.reject("not JSON" if utf8 else "not UTF-8", where)
            continue
        if not isinstance(row, dict):
            tally.rows += 1
            tally.reject("not a JSON object", where)
            continue
        yield from parse(row.get(key), where, key, form, tally)


def _read_parquet(file: Path, key: str, form: Format, tally: Tally) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is not a parquet file: {error}") from error
    with table:
        if key not in table.schema_arrow.names:
            raise DataError(
                f"{file} has no column {key}, the data.source.key; "
                f"its columns are {', '.join(table.schema_arrow.names)}"
            )
        size, rows, number = file.stat().st_size, max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=1024, columns=[key]):
            for cell in batch.column(0):
                number += 1
                where = Where(str(file), number)
                try:
                    value = cell.as_py()
                except UnicodeDecodeError:
                    tally.rows += 1
                    tally.reject("not UTF-8", where)
                    continue
                yield from parse(value, where, key, form, tally)
            tally.bytes_read += size * len(batch) // rows


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of the line that is still open
    for chunk in chunks:
        head, newline, rest = chunk.partition(b"\n")
        parts.append(head)
        if newline:
            yield b"".join(parts)
            *lines, last = rest.split(b"\n")
            yield from lines
            parts = [last]
    if any(parts):
        yield b"".join(parts)


def _chunks(file: Path, tally: Tally) -> Iterator[bytes]:
    """The content of a file, decompressed by its suffix (.zst, .gz)."""
    with file.open("rb") as raw:
        counted = _counted(raw, tally)
        if file.suffix == ".zst":
            yield from _unzstd(file, counted)
        elif file.suffix == ".gz":
            yield from _ungzip(file, raw, tally)
        else:
            yield from counted


def _counted(raw: io.BufferedReader, tally: Tally) -> Iterator[bytes]:
    while chunk := raw.read(CHUNK):
        tally.bytes_read += len(chunk)
        yield chunk


def _ungzip(file: Path, raw: io.BufferedReader, tally: Tally) -> Iterator[bytes]:
    start = tally.bytes_read
    try:
        with gzip.GzipFile(fileobj=raw) as unzipped:
            while chunk := unzipped.read(CHUNK):
                tally.bytes_read = start + raw.tell()
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is damaged: {error}; fetch it again") from error


def _unzstd(file: Path, compressed: Iterator[bytes]) -> Iterator[bytes]:
    """Frames one after another. `zstandard.stream_reader` would take a cut file for a whole one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = None
    try:
        for data in compressed:
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
    except zstandard.ZstdError as error:
        raise DataError(f"{file} is damaged: {error}; fetch it again") from error
    if frame is not None:
        raise DataError(f"{file} is damaged: it ends inside a zstd frame; fetch it again")

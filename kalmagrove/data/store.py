"""Token caches on disk: written once, checked whenever opened, memory-mapped.

A cache is a folder: `{train,val}.tokens` (uint16 or uint32), `.documents` (int64 offsets, one more
than documents), `.learned` (uint8, conversations only), `tokenizer/` and `manifest.json`.
`prepare` writes it, `loader` reads it.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kalmagrove.config import DataError
from kalmagrove.config.base import Section
from kalmagrove.config.files import read_json
from kalmagrove.data import tokenizer as tokenizers
from kalmagrove.data.chat import Encoded
from kalmagrove.data.tokenizer import Tokenizer

VERSION = 1  # of the layout; part of the cache's key
MANIFEST, VERIFIED, TOKENIZER = "manifest.json", ".verified.json", "tokenizer"
BLOCK = 1 << 22  # bytes written or checked at once


class File(Section):
    """Size and CRC-32 of a file of the cache."""

    bytes: int
    crc32: int


class Split(Section):
    """targets: tokens that are predicted with a loss. text_bytes: UTF-8 bytes they stand for."""

    documents: int
    tokens: int
    targets: int
    text_bytes: int


class Rows(Section):
    """What was read. bad: number of rows by reason; examples: where the first ones are."""

    read: int
    empty: int
    bad: dict[str, int]
    examples: dict[str, tuple[str, ...]]


class TokenizerInfo(Section):
    kind: Literal["bpe", "auto"]
    size: int
    fingerprint: str


class Baseline(Section):
    """Cross-entropies of the held-out targets (see `ngram.fit`), in nats a token."""

    unigram_nats: float
    bigram_nats: float
    train_tokens: int  # that were counted


class Manifest(Section):
    """What a cache holds and where it is from."""

    version: int
    name: str
    format: Literal["text", "messages"]
    source: dict[str, Any]
    val_fraction: float
    seed: int
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "uint32"]
    train: Split
    val: Split
    rows: Rows
    baseline: Baseline
    files: dict[str, File]
    created: str
    versions: dict[str, str]


@dataclass(frozen=True)
class TokenStore:
    """One split, memory-mapped.

    tokens: [N]. offsets: [documents + 1] int64, document i is tokens[offsets[i]:offsets[i + 1]].
    learned: [N] uint8, 1 where the token is a target of the loss; None: every token is.
    """

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    learned: NDArray[np.uint8] | None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> NDArray[np.integer]:
        """Tokens of a document, its end-of-text token first."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Prepared:
    """A checked cache, ready to train on."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: TokenStore
    val: TokenStore

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.size

    @property
    def val_bytes_per_token(self) -> float:
        """Held-out UTF-8 bytes per predicted token: nats / (ln 2 x this) is bits per byte."""
        return self.manifest.val.text_bytes / self.manifest.val.targets

    @property
    def unigram_nats(self) -> float:
        return self.manifest.baseline.unigram_nats

    @property
    def bigram_nats(self) -> float:
        return self.manifest.baseline.bigram_nats

    @cached_property
    def fingerprint(self) -> str:
        """Equal for caches with the same training tokens, wherever and whenever they were made."""
        names = ("train.tokens", "train.learned")
        parts = [f"{n}:{f.bytes}:{f.crc32:08x}" for n in names if (f := self.manifest.files.get(n))]
        return "-".join([self.manifest.tokenizer.fingerprint[:16], *parts])


class SplitWriter:
    """Appends the documents of one split to its files."""

    def __init__(self, folder: Path, name: str, dtype: str, chat: bool) -> None:
        self._dtype = np.dtype(dtype)
        kinds = ("tokens", "documents", "learned") if chat else ("tokens", "documents")
        self._files = {kind: (folder / f"{name}.{kind}").open("wb") for kind in kinds}
        self._offset = np.zeros(1, np.int64)
        self.documents, self.targets, self.text_bytes = 0, 0, 0
        self._files["documents"].write(self._offset.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    @property
    def tokens(self) -> int:
        return int(self._offset[0])

    def add(self, document: Encoded) -> None:
        first = self.documents == 0  # nothing predicts the very first token of a split
        self._files["tokens"].write(document.tokens.astype(self._dtype).tobytes())
        if document.learned is None:
            self.targets += len(document.tokens) - first
        else:
            self._files["learned"].write(document.learned.tobytes())
            self.targets += int(document.learned[int(first) :].sum())
        self._offset += len(document.tokens)
        self._files["documents"].write(self._offset.tobytes())
        self.documents += 1
        self.text_bytes += document.text_bytes

    def finish(self) -> Split:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return Split(
            documents=self.documents,
            tokens=self.tokens,
            targets=self.targets,
            text_bytes=self.text_bytes,
        )


def map_split(folder: Path, name: str, dtype: str) -> TokenStore:
    """Map the files of a split, unchecked."""
    learned = folder / f"{name}.learned"
    return TokenStore(
        tokens=np.memmap(folder / f"{name}.tokens", np.dtype(dtype), "r"),
        offsets=np.memmap(folder / f"{name}.documents", np.int64, "r"),
        learned=np.memmap(learned, np.uint8, "r") if learned.exists() else None,
    )


def describe_files(folder: Path) -> dict[str, File]:
    """Every file of a cache but its manifest, by relative name."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        path.relative_to(folder).as_posix(): File(bytes=path.stat().st_size, crc32=_crc32(path))
        for path in paths
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with (folder / MANIFEST).open("w") as file:
        file.write(manifest.model_dump_json(indent=1))
        file.flush()
        os.fsync(file.fileno())


def open_prepared(path: str | Path, *, verify: bool = False) -> Prepared:
    """Check a cache and open it.

    Sizes are checked always, contents the first time, after any change of a file's date, and with
    `verify`. A bit that fell over on the disk changes no date: see `loader.Rows.read`.

    Raises:
        DataError: naming what is missing or damaged.
    """
    folder = Path(path).expanduser()
    manifest = _read_manifest(folder)
    # None yet, or a note cut short: check again.
    known = None if verify else read_json(folder / VERIFIED)
    _verify(folder, manifest, known or {})
    prepared = Prepared(
        path=folder,
        manifest=manifest,
        tokenizer=tokenizers.load(manifest.tokenizer.kind, folder / TOKENIZER),
        train=map_split(folder, "train", manifest.dtype),
        val=map_split(folder, "val", manifest.dtype),
    )
    found, stated = prepared.tokenizer.fingerprint, manifest.tokenizer.fingerprint
    if found != stated:
        raise _damaged(folder, f"its tokenizer is {found[:12]}, the manifest says {stated[:12]}")
    return prepared


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise DataError(f"no token cache at {folder}; run kalmagrove prepare")
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise _damaged(folder, f"{MANIFEST} is missing") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({_first_line(error)})") from error


def _verify(folder: Path, manifest: Manifest, known: Mapping[str, Any]) -> None:
    """known: by name, the size, dates and checksum with which a file was read before."""
    verified: dict[str, list[int]] = {}
    for name, file in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(folder, f"{name} is missing")
        stat = path.stat()
        if stat.st_size != file.bytes:
            raise _damaged(folder, f"{name} has {stat.st_size} bytes instead of {file.bytes}")
        verified[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, file.crc32]
        if known.get(name) != verified[name] and _crc32(path) != file.crc32:
            raise _damaged(folder, f"the content of {name} does not match its checksum")
    if known != verified:
        _write_verified(folder, verified)


def _write_verified(folder: Path, verified: dict[str, list[int]]) -> None:
    fresh = folder / f"{VERIFIED}.{os.getpid()}"
    try:
        fresh.write_text(json.dumps(verified))
        fresh.replace(folder / VERIFIED)
    except OSError:  # a cache that is shared read-only is checked every time
        fresh.unlink(missing_ok=True)


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(
        f"token cache {folder} is damaged: {what}; delete it, the same command prepares it again"
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _crc32(path: Path) -> int:
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return crc

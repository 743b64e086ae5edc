"""Corpus to token cache: tokenizer, tokens, held-out split, baselines, manifest.

`prepare` is called by the verbs before training; it finds the cache or builds it.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from kalmagrove import config
from kalmagrove.config import DataError
from kalmagrove.data import ngram, sources, store
from kalmagrove.data import tokenizer as tokenizers
from kalmagrove.data.chat import Encoded, encode
from kalmagrove.data.progress import Reporter
from kalmagrove.data.rows import Document, Tally
from kalmagrove.data.sources import Listing
from kalmagrove.data.store import Baseline, Manifest, Prepared, Rows, SplitWriter, TokenizerInfo
from kalmagrove.data.tokenizer import BPE, Auto, Tokenizer

CHUNK_BYTES, CHUNK_DOCUMENTS = 1 << 20, 1024  # of text, given to a tokenizing thread at once


def prepare(data: config.Data, *, progress: bool = True, verify: bool = False) -> Prepared:
    """Find the token cache of `data`, or build it.

    The folder's name holds a hash of all that determines its content (source, files, tokenizer,
    format, held-out choice), so a change of any makes another cache. `seq_len` is not among them:
    packing is a view. Several processes may call this at once: one builds, the others wait.

    Args:
        verify: read all files, also of a cache that was verified before.

    Raises:
        DataError: for data that cannot be read, too many bad rows, or a damaged cache.
    """
    listing = sources.locate(data.source)
    root = Path(data.cache).expanduser()
    folder = root / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', data.name)}-{_key(data, listing)}"
    if folder.exists():
        return store.open_prepared(folder, verify=verify)
    with Reporter(progress) as reporter, _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{folder.name}.lock", reporter):
            if not folder.exists():
                _build(data, listing, folder, reporter)
    return store.open_prepared(folder)


def _key(data: config.Data, listing: Listing) -> str:
    reading = {"max_bad_fraction", "streaming"}  # how it is read, not what
    has_val = bool(listing.val or data.source.val_split)
    parts = [
        store.VERSION,
        data.source.model_dump(mode="json", exclude=reading),
        listing.identity,
        tokenizers.identity(data.tokenizer),
        data.format,
        None if has_val else (data.val_fraction, data.seed),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path, reporter: Reporter) -> Iterator[None]:
    """Hold a lock file; the system frees it however the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.say(f"another process prepares this data; waiting for it ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "has no space left"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            problem = "cannot be written"
        else:
            raise
        raise DataError(f"data.cache={root} {problem}; free it or choose another folder") from error


def _build(data: config.Data, listing: Listing, folder: Path, reporter: Reporter) -> None:
    """Write a cache beside its place and move it there when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed; the lock is ours
    partial.mkdir()
    try:
        _write(data, listing, partial, reporter)
        partial.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(data: config.Data, listing: Listing, folder: Path, reporter: Reporter) -> None:
    tokenizer = _make_tokenizer(data, listing, reporter)
    tokenizer.save(folder / store.TOKENIZER)
    dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.size <= 1 << 16 else "uint32"
    tally = Tally(data.source.max_bad_fraction)
    chat = data.format == "messages"
    with (
        SplitWriter(folder, "train", dtype, chat) as train,
        SplitWriter(folder, "val", dtype, chat) as val,
    ):
        reporter.stage("tokenizing", listing.total_bytes)
        _tokenize(data, listing, tokenizer, tally, train, val, reporter)
        train_split, val_split = train.finish(), val.finish()
    reporter.stage("baselines")
    mapped = [store.map_split(folder, name, dtype) for name in ("train", "val")]
    baseline = ngram.fit(
        mapped[0].tokens, mapped[1].tokens, tokenizer.size, mapped[0].learned, mapped[1].learned
    )
    manifest = Manifest(
        version=store.VERSION,
        name=data.name,
        format=data.format,
        source=data.source.model_dump(mode="json"),
        val_fraction=data.val_fraction,
        seed=data.seed,
        tokenizer=TokenizerInfo(
            kind=data.tokenizer.kind, size=tokenizer.size, fingerprint=tokenizer.fingerprint
        ),
        dtype=dtype,
        train=train_split,
        val=val_split,
        rows=_rows(tally),
        baseline=Baseline(**asdict(baseline)),
        files=store.describe_files(folder),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "tokenizers")},
    )
    for name in manifest.files:
        _sync_file(folder / name)
    store.write_manifest(folder, manifest)
    _sync_folder(folder)
    _report(manifest, tally, reporter)


def _make_tokenizer(data: config.Data, listing: Listing, reporter: Reporter) -> Tokenizer:
    section = data.tokenizer
    if section.kind == "auto":
        assert section.name is not None
        return Auto.fetch(section.name, chat=data.format == "messages")
    tally = Tally(data.source.max_bad_fraction)
    reporter.stage(f"training a BPE of {section.vocab_size} tokens", section.train_bytes)

    def texts() -> Iterator[str]:
        done = 0
        for document, is_val in _assigned(data, listing, tally):
            if is_val:
                continue
            parts = document.content
            yield from (parts,) if isinstance(parts, str) else (m["content"] for m in parts)
            done += len(document.raw)
            reporter.update(done, f"{done / 1e6:.0f} MB of text")
            if done >= section.train_bytes:
                return
        tally.check()

    return BPE.train(texts(), section.vocab_size)


def _assigned(data: config.Data, listing: Listing, tally: Tally) -> Iterator[tuple[Document, bool]]:
    """All documents, training ones first where the held-out ones have files of their own."""
    own_val = bool(listing.val or data.source.val_split)
    for document in sources.read(data.source, data.format, listing, "train", tally):
        yield document, not own_val and _score(document, data.seed) < data.val_fraction
    if own_val:
        for document in sources.read(data.source, data.format, listing, "val", tally):
            yield document, True


def _score(document: Document, seed: int) -> float:
    """A number in [0, 1) from the content alone: order does not matter, copies stay together."""
    digest = hashlib.blake2b(document.raw, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest) / 2**64


def _tokenize(
    data: config.Data,
    listing: Listing,
    tokenizer: Tokenizer,
    tally: Tally,
    train: SplitWriter,
    val: SplitWriter,
    reporter: Reporter,
) -> None:
    own_val = bool(listing.val or data.source.val_split)
    spare = _Spare(train, val)
    workers = data.workers or len(os.sched_getaffinity(0))
    chunks = _chunks(_assigned(data, listing, tally))
    for chunk, encoded in _in_order(
        chunks, lambda part: encode(tokenizer, [d for d, _ in part]), workers
    ):
        for (document, is_val), result in zip(chunk, encoded, strict=True):
            if isinstance(result, str):
                tally.reject(result, document.where)
            elif own_val:
                (val if is_val else train).add(result)
            else:
                spare.add(result, is_val, _score(document, data.seed))
        counts = (
            f"{train.documents + val.documents:,} documents, {train.tokens + val.tokens:,} tokens"
        )
        reporter.update(tally.bytes_read, counts)
    tally.check()
    spare.settle()
    for writer, name in ((train, "training"), (val, "held-out")):
        if not writer.documents:
            total = train.documents + val.documents
            raise DataError(
                f"data.name={data.name} has {total} documents, none is left for the {name} split; "
                "give more documents, or held-out ones of their own as data.source.val_paths"
            )


class _Spare:
    """Makes sure that both splits get a document, whatever the hash says.

    While one side is empty, the other's document nearest to the border is kept back for it.
    """

    def __init__(self, train: SplitWriter, val: SplitWriter) -> None:
        self._writers = (train, val)
        self._kept: tuple[Encoded, float] | None = None
        self._side: bool | None = None  # of all documents so far; None: none yet, or both

    def add(self, document: Encoded, is_val: bool, score: float) -> None:
        if self._kept is None:
            if self._writers[not is_val].documents:
                self._writers[is_val].add(document)
            else:
                self._kept, self._side = (document, score), is_val
        elif is_val != self._side:
            self._writers[not is_val].add(self._kept[0])
            self._kept = None
            self._writers[is_val].add(document)
        else:
            kept, kept_score = self._kept
            nearer = (score > kept_score) if is_val else (score < kept_score)
            if nearer:
                self._kept, document = (document, score), kept
            self._writers[is_val].add(document)

    def settle(self) -> None:
        if self._kept is not None:
            self._writers[not self._side].add(self._kept[0])


def _chunks(
    documents: Iterable[tuple[Document, bool]],
) -> Iterator[list[tuple[Document, bool]]]:
    chunk: list[tuple[Document, bool]] = []
    size = 0
    for document, is_val in documents:
        chunk.append((document, is_val))
        size += len(document.raw)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


Chunk = list[tuple[Document, bool]]
Result = list[Encoded | str]


def _in_order(
    chunks: Iterator[Chunk], work: Callable[[Chunk], Result], workers: int
) -> Iterator[tuple[Chunk, Result]]:
    """(chunk, its result) in order, worked on by threads: tokenizers computes outside the GIL."""
    with _one_thread_a_call(), ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[Chunk, Future[Result]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(work, chunk)))
                if len(waiting) > 2 * workers:
                    head, future = waiting.popleft()
                    yield head, future.result()
            for head, future in waiting:
                yield head, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """Keep tokenizers from starting threads of its own, so that `data.workers` is what runs."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _rows(tally: Tally) -> Rows:
    return Rows(
        read=tally.rows,
        empty=tally.empty,
        bad=dict(tally.bad),
        examples={
            reason: tuple(f"{file}:{row}" for file, row in places)
            for reason, places in tally.places.items()
        },
    )


def _report(manifest: Manifest, tally: Tally, reporter: Reporter) -> None:
    train, val = manifest.train, manifest.val
    reporter.say(
        f"{manifest.name}: {train.documents:,} documents, {train.tokens:,} tokens to train on; "
        f"{val.documents:,} documents, {val.tokens:,} tokens held out"
    )
    if manifest.rows.bad:
        bad = sum(manifest.rows.bad.values())
        reporter.say(f"{bad} of {tally.rows} rows are bad and left out: {tally.describe()}")


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

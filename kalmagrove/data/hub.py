"""Documents out of Hugging Face datasets: by name, streamed or downloaded, or from a local folder.

The only home of `datasets`, imported when a dataset is read. Used by `sources`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kalmagrove import config
from kalmagrove.config import DataError
from kalmagrove.data.rows import Document, Format, Tally, Where, parse


def identity(source: config.Source) -> tuple[Any, ...]:
    """What names the content: for a local folder its files, else the dataset's name alone.

    A dataset on the hub is taken as fixed: without a network its revision cannot be known.
    """
    assert source.dataset is not None
    folder = Path(source.dataset).expanduser()
    if not folder.is_dir():
        return (source.dataset,)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    marks = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return (str(folder.resolve()), *marks)


def read(source: config.Source, split: str, form: Format, tally: Tally) -> Iterator[Document]:
    """Documents of a split, in its order.

    Raises:
        DataError: if the dataset cannot be had: no network, no such dataset, subset or split.
    """
    for number, row in enumerate(_rows(source, split), start=1):
        where = Where(f"{source.dataset}:{split}", number)
        yield from parse(row.get(source.key), where, source.key, form, tally)


def _rows(source: config.Source, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    assert source.dataset is not None
    folder = Path(source.dataset).expanduser()
    name = str(folder) if folder.is_dir() else source.dataset
    # Both opening and reading may go to the network, through libraries that raise errors of their
    # own kinds (httpx, fsspec, huggingface_hub, aiohttp); every one of them means: no data.
    try:
        rows = datasets.load_dataset(name, source.subset, split=split, streaming=source.streaming)
        yield from rows
    except Exception as error:
        subset = f", subset {source.subset}" if source.subset else ""
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"data.source.dataset={source.dataset} (split {split}{subset}) cannot be read: "
            f"{type(error).__name__}: {reason[0][:200]}; it needs a network or a copy in the "
            "Hugging Face cache; without one use files, as in data=jsonl "
            "data.source.paths=[my/*.jsonl], or data=stdlib, which every machine has"
        ) from error

"""Reading documents: every kind of file, bad rows and their limit."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from kalmagrove import config
from kalmagrove.config import DataError
from kalmagrove.data import hub, sources
from kalmagrove.data.rows import Tally

pytestmark = pytest.mark.unit

TEXTS = ["one ünï", "two\nlines", "three 🌲"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def read(form="text", limit=0.0, **source):
    source = config.validate(config.Source, source)
    tally = Tally(limit)
    documents = list(sources.read(source, form, sources.locate(source), "train", tally))
    tally.check()
    return [document.content for document in documents], tally


def jsonl(rows) -> bytes:
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in rows)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix, chunk, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    raw = jsonl([{"text": text} for text in TEXTS])
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    half = raw.index(b"\n") + 1
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(raw[:half]) + pack(raw[half:]))  # two frames or members
    contents, tally = read(kind="jsonl", paths=[str(tmp_path / "*.jsonl*")])
    assert contents == TEXTS
    assert tally.rows == 3
    assert tally.bytes_read == file.stat().st_size


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_cut_file_is_named(tmp_path: Path, suffix, pack):
    file = tmp_path / f"a.jsonl{suffix}"
    file.write_bytes(pack(jsonl([{"text": f"{i} {i * i}"} for i in range(2000)]))[:-20])
    with pytest.raises(DataError, match=rf"a\.jsonl{suffix} is damaged"):
        read(kind="jsonl", paths=[str(file)])


def test_text_and_parquet_and_hub_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    assert read(kind="text", paths=[str(tmp_path / "*.txt")])[0] == TEXTS
    folder = tmp_path / "set"
    folder.mkdir()
    table = pyarrow.table({"body": [*TEXTS, None], "chat": [CHAT] * 4})
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    files = {"kind": "parquet", "paths": [str(folder / "train.parquet")]}
    contents, tally = read(key="body", limit=0.5, **files)
    assert (contents, dict(tally.bad)) == (TEXTS, {"without body": 1})
    assert read("messages", key="chat", **files)[0] == [CHAT] * 4
    with pytest.raises(DataError, match=r"no column text.*body, chat"):
        read(**files)
    for streaming in (True, False):
        named = {"kind": "hf", "dataset": str(folder), "streaming": streaming, "limit": 0.5}
        assert read(key="body", **named)[0] == TEXTS
    assert read(key="body", max_documents=2, **named)[0] == TEXTS[:2]


def test_bad_rows_are_counted_by_reason_and_place(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    rows = [
        {"text": "good"}, b"{broken\n", {"other": 1}, {"text": 5}, b'{"text": "\xff"}\n', b"[1]\n",
        {"text": "\ud800"}, b"\n", {"text": " "}, b"{broken again",
    ]  # fmt: skip
    file.write_bytes(jsonl(rows))
    contents, tally = read(kind="jsonl", paths=[str(file)], limit=1.0)
    assert contents == ["good"]
    assert (tally.rows, tally.empty) == (9, 1)
    assert dict(tally.bad) == {
        "not JSON": 2,
        "without text": 1,
        "with text of type int, not text,": 1,
        "not UTF-8": 2,
        "not a JSON object": 1,
    }
    assert [where.row for where in tally.places["not JSON"]] == [2, 10]
    with pytest.raises(DataError, match=r"7 of 9 rows.*max_bad_fraction=0.5.*a\.jsonl rows 2, 10"):
        read(kind="jsonl", paths=[str(file)], limit=0.5)


def test_too_many_bad_rows_stop_before_the_end(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"no json\n" * 100_000)
    tally = Tally(0.01)
    source = config.validate(config.Source, {"kind": "jsonl", "paths": [str(file)]})
    with pytest.raises(DataError, match="of 1000 rows"):
        list(sources.read(source, "text", sources.locate(source), "train", tally))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "not a list"),
        ([{"role": "user"}], "without role and content"),
        ([{"role": "wizard", "content": "x"}], "role other than"),
        ([{"role": "user", "content": "x"}], "without an assistant turn"),
    ],
)
def test_bad_conversations(tmp_path: Path, messages, reason):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl([{"messages": CHAT}, {"messages": messages}]))
    contents, tally = read("messages", 1.0, kind="jsonl", paths=[str(file)], key="messages")
    assert contents == [CHAT]
    assert any(reason in found for found in tally.bad)


def test_paths_that_cannot_be_meant(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{}")
    for path, problem in ((tmp_path / "*.no", "matches no file"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=problem):
            read(kind="jsonl", paths=[str(path)])
    with pytest.raises(DataError, match="must not be trained on"):
        read(kind="jsonl", paths=[str(tmp_path / "a.jsonl")], val_paths=[str(tmp_path / "*")])


def test_a_dataset_out_of_reach_is_named_with_a_way_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    source = config.validate(config.Source, {"kind": "hf", "dataset": "some/set"})
    with pytest.raises(DataError, match=r"some/set.*no route to host.*data=jsonl"):
        list(hub.read(source, "train", "text", Tally(0)))


def test_stdlib_is_sorted_and_without_tests():
    root = sources.stdlib_root()
    files = [path.relative_to(root).as_posix() for path in sources.stdlib_files(root)]
    assert files == sorted(files)
    assert {"json/decoder.py", "typing.py"} <= set(files)
    parts = {part for file in files for part in file.split("/")[:-1]}
    assert not parts & {"test", "tests", "site-packages", "encodings"}

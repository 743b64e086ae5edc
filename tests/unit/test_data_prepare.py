"""The token cache: split, determinism, damage, concurrency."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kalmagrove import config
from kalmagrove.cli import prepare as cli_prepare
from kalmagrove.config import DataError
from kalmagrove.data import open_prepared, prepare, store

pytestmark = pytest.mark.unit

module = sys.modules["kalmagrove.data.prepare"]  # `prepare` above is its function


def corpus(count=120, seed=0):
    rng = random.Random(seed)
    words = ["the", "grove", "of", "kalma", "edge", "spline", "tree", "gate", "ünï", "🌲", "bark"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 60))) + f" {i}" for i in range(count)]


def write(path: Path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def settings(tmp_path: Path, *paths, source=None, **data) -> config.Data:
    tree = {
        "name": "tiny",
        "source": {"kind": "jsonl", "paths": list(paths)} | (source or {}),
        "tokenizer": {"vocab_size": 300},
        "val_fraction": 0.1,
        "cache": str(tmp_path / "cache"),
        "workers": 1,
    }
    return config.validate(config.Data, tree | data)


def texts(prepared, split):
    tokens = getattr(prepared, split)
    decode = prepared.tokenizer.decode
    return [decode(tokens.document(i)[1:].tolist()) for i in range(tokens.documents)]


def test_every_document_is_on_one_side_and_comes_back(tmp_path):
    rows = corpus()
    prepared = prepare(settings(tmp_path, write(tmp_path / "a.jsonl", rows)), progress=False)
    train, val = texts(prepared, "train"), texts(prepared, "val")
    assert sorted(train + val) == sorted(rows)
    assert 2 <= len(val) <= 30
    manifest = prepared.manifest
    assert (manifest.train.documents, manifest.val.documents) == (len(train), len(val))
    assert manifest.train.tokens == len(prepared.train)
    assert manifest.val.targets == len(prepared.val) - 1
    assert manifest.val.text_bytes == sum(len(text.encode()) for text in val)
    assert prepared.val_bytes_per_token == manifest.val.text_bytes / manifest.val.targets
    assert 0 < prepared.bigram_nats < prepared.unigram_nats < np.log(prepared.vocab_size)
    starts = prepared.train.offsets[:-1]
    assert (prepared.train.tokens[starts] == prepared.tokenizer.eot).all()
    assert prepared.train.tokens.dtype == np.uint16


def test_the_split_depends_on_content_and_seed_not_on_order(tmp_path):
    rows = corpus()
    chosen = []
    for name, order, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        data = settings(tmp_path, write(tmp_path / name, order), seed=seed)
        chosen.append(set(texts(prepare(data, progress=False), "val")))
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_document(tmp_path, fraction):
    rows = corpus(7)
    data = settings(tmp_path, write(tmp_path / "a", rows), val_fraction=fraction)
    prepared = prepare(data, progress=False)
    assert {prepared.train.documents, prepared.val.documents} == {1, 6}
    assert sorted(texts(prepared, "train") + texts(prepared, "val")) == sorted(rows)


def test_one_document_cannot_be_split(tmp_path):
    data = settings(tmp_path, write(tmp_path / "a", ["alone"]))
    with pytest.raises(DataError, match=r"has 1 documents, none is left .*val_paths"):
        prepare(data, progress=False)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_held_out_files_of_their_own(tmp_path):
    train, val = write(tmp_path / "a", corpus(20)), write(tmp_path / "b", corpus(5, seed=1))
    data = settings(tmp_path, train, source={"val_paths": [val]})
    prepared = prepare(data, progress=False)
    assert (texts(prepared, "train"), texts(prepared, "val")) == (corpus(20), corpus(5, seed=1))


def test_same_tokens_for_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 500)
    path = write(tmp_path / "a", corpus())
    prints = []
    for workers in (1, 3):
        data = settings(tmp_path / str(workers), path, workers=workers)
        prepared = prepare(data, progress=False)
        prints.append((prepared.fingerprint, prepared.manifest.files, prepared.path.name))
    assert prints[0] == prints[1]


def test_the_cache_is_found_again_unless_its_content_would_differ(tmp_path, monkeypatch):
    path = write(tmp_path / "a", corpus())
    first = prepare(settings(tmp_path, path), progress=False)
    same = settings(tmp_path, path, seq_len=64, workers=2, document_aware=True)
    monkeypatch.setattr(module, "_build", None)  # would be called to build
    assert prepare(same, progress=False).path == first.path
    monkeypatch.undo()
    others = (
        settings(tmp_path, path, seed=1),
        settings(tmp_path, path, tokenizer={"vocab_size": 301}),
        settings(tmp_path, path, val_fraction=0.2),
        settings(tmp_path, write(tmp_path / "a", corpus(121))),
    )
    paths = {first.path, *(prepare(data, progress=False).path for data in others)}
    assert len(paths) == 5


def flip(path: Path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train.tokens", flip, "content of train.tokens does not match"),
        ("val.documents", flip, "content of val.documents does not match"),
        ("tokenizer/tokenizer.json", flip, "content of tokenizer/tokenizer.json does not match"),
        ("train.tokens", lambda p: os.truncate(p, 100), "train.tokens has 100 bytes instead of"),
        ("val.tokens", Path.unlink, "val.tokens is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", lambda p: os.truncate(p, 100), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_cache_is_named(tmp_path, checked, name, damage, message):
    data = settings(tmp_path, write(tmp_path / "a", corpus(30)))
    prepared = prepare(data, progress=False)
    if not checked:
        (prepared.path / store.VERIFIED).unlink()
    damage(prepared.path / name)
    expected = rf"{prepared.path.name} is damaged: .*{message}"
    for attempt in (lambda: open_prepared(prepared.path), lambda: prepare(data, progress=False)):
        with pytest.raises(DataError, match=expected):
            attempt()


def test_bits_that_fell_over_on_the_disk_are_found_by_verify(tmp_path, capsys):
    """They change no date: only reading all of it finds them."""
    data = settings(tmp_path, write(tmp_path / "a", corpus(30)))
    prepared = prepare(data, progress=False)
    assert cli_prepare._prepare(config.Prepare(data=data, verify=True)) == 0
    assert "verified   every file has the size and checksum" in capsys.readouterr().out
    flip(prepared.path / "train.tokens")
    notes = json.loads((prepared.path / store.VERIFIED).read_text())
    stat = (prepared.path / "train.tokens").stat()
    notes["train.tokens"][1:3] = [stat.st_mtime_ns, stat.st_ctime_ns]
    (prepared.path / store.VERIFIED).write_text(json.dumps(notes))
    assert prepare(data, progress=False).path == prepared.path
    with pytest.raises(DataError, match=r"content of train\.tokens does not match its checksum"):
        cli_prepare._prepare(config.Prepare(data=data, verify=True))


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no token cache at .*nowhere"):
        open_prepared(tmp_path / "nowhere")


def test_a_killed_preparation_leaves_nothing_that_counts(tmp_path, monkeypatch):
    data = settings(tmp_path, write(tmp_path / "a", corpus(30)))
    monkeypatch.setattr(module.shutil, "rmtree", lambda *a, **k: None)  # as after SIGKILL

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.ngram, "fit", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, progress=False)
    left = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert [p.suffix for p in left] == [".partial"]
    monkeypatch.undo()
    prepared = prepare(data, progress=False)
    assert prepared.train.documents + prepared.val.documents == 30
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [prepared.path]


def test_bad_rows_are_in_the_manifest_and_limited(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    write(path, corpus(30))
    path.write_text(path.read_text() + "{broken\n" * 2)
    with pytest.raises(DataError, match=r"2 of 32 rows .*a\.jsonl rows 31, 32"):
        prepare(settings(tmp_path, str(path)), progress=False)
    data = settings(tmp_path, str(path), source={"max_bad_fraction": 0.1})
    rows = prepare(data, progress=True).manifest.rows
    assert (rows.read, rows.bad) == (32, {"not JSON": 2})
    assert rows.examples == {"not JSON": (f"{path}:31", f"{path}:32")}
    assert "2 of 32 rows are bad" in capsys.readouterr().err


def test_conversations_keep_their_mask(tmp_path):
    chats = [
        [{"role": "user", "content": f"{text}?"}, {"role": "assistant", "content": text}]
        for text in corpus(40)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    data = settings(tmp_path, str(path), source={"key": "messages"}, format="messages")
    prepared = prepare(data, progress=False)
    answers = ""
    for split in (prepared.train, prepared.val):
        answers += prepared.tokenizer.decode(split.tokens[split.learned == 1].tolist())
    assert sorted(answers.split("<|end|>")[:-1]) == sorted(corpus(40))
    assert prepared.manifest.val.targets == int(prepared.val.learned.sum())


TWO = """
import json, os, pathlib, sys, time
from kalmagrove import config
from kalmagrove.data import prepare
module = sys.modules["kalmagrove.data.prepare"]
build = module._build
def slow(*args):
    print("built"); time.sleep(1.0); build(*args)
module._build = slow
ready = pathlib.Path(sys.argv[2])
(ready / str(os.getpid())).touch()
while len(list(ready.iterdir())) < 2: time.sleep(0.01)
print(prepare(config.validate(config.Data, json.loads(sys.argv[1]))).fingerprint)
"""


def test_two_processes_build_one_cache(tmp_path):
    data = settings(tmp_path, write(tmp_path / "a", corpus(60)))
    ready = tmp_path / "ready"  # both begin when both have started
    ready.mkdir()
    command = [sys.executable, "-c", TWO, data.model_dump_json(), str(ready)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    prints = [out.split() for out, _ in outputs]
    assert sorted(len(p) for p in prints) == [1, 2]  # one built, one waited
    assert prints[0][-1] == prints[1][-1] == prepare(data, progress=False).fingerprint
    assert sum("waiting for it" in err for _, err in outputs) == 1

"""`kalmagrove evaluate` of a small random Llama and of a run, from local files alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import run
from tests.evaluation import save_llama, write_bbh

pytestmark = pytest.mark.e2e
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}
WORDS = ["suite.tasks=[bbh/navigate,bbh_generate/snarks]", "files=benchmarks", "limit=2"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_bbh(tmp_path / "benchmarks")
    return tmp_path


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert set(found["tasks"]) == {"bbh_navigate", "bbh_generate_snarks"}
    return found


def test_a_hugging_face_model(place: Path) -> None:
    save_llama(place / "llama")
    words = [*WORDS, "run=llama", "price=cpu", "chat=false", "device=cpu"]
    done = run("evaluate", *words, cwd=place, **OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("llama on bbh", "navigate", "random", "majority", "$", "0 of 6 requests"):
        assert word in done.stdout
    folder = place / "evaluations" / "llama-bbh"
    found = results(folder)
    assert found["dollars"] > 0
    assert found["tasks"]["bbh_generate_snarks"]["parse_failures"] is not None
    assert len((folder / "items" / "bbh_navigate.jsonl").read_text().splitlines()) == 2
    assert list((folder / "wandb").glob("offline-run-*/*.wandb")), "W&B, offline"


def test_a_run_on_two_processes(place: Path, settings: list[str]) -> None:
    done = run("train", *settings, "steps=2", "name=short", cwd=place, **OFFLINE)
    assert done.returncode == 0, done.stderr
    words = [*WORDS, "run=runs/short", "corpus=val", "corpus_documents=2", "nproc=2", "out=here"]
    done = run("evaluate", *words, "track=quiet", "max_length=512", cwd=place, **OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bits per byte on val (2 documents" in done.stdout
    found = results(place / "here")
    assert (found["model"], found["device"]["ranks"], found["dollars"]) == ("short", 2, None)
    assert 2 < found["bits_per_byte"]["bits_per_byte"] < 9

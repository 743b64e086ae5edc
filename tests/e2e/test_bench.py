"""`kalmagrove bench` on the processes of this machine."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import run

pytestmark = pytest.mark.e2e
WORDS = [
    "model=kan_tiny", "data.seq_len=64", "batch.tokens=256", "batch.micro=2", "launch.nproc=2",
    "model.vocab_size=500",
]  # fmt: skip


def test_layouts_are_measured_side_by_side(tmp_path: Path) -> None:
    only = ["--steps", "1", "--only", "dp 2, ZeRO 1;ep 2, nothing;tp 2, seq", "--out", "found.json"]
    done = run("bench", "layouts", *only, *WORDS, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    plain, experts, refused = found["layouts"]
    assert found["ranks"] == 2
    assert plain["tokens_per_second"] == pytest.approx(256 / plain["step_seconds"][0], rel=1e-3)
    assert plain["losses"] == pytest.approx(experts["losses"], rel=1e-3)
    assert experts["alltoall_bytes"] == pytest.approx(
        experts["predicted_sent"]["groves and experts"], rel=0.2
    )
    assert "kv_heads=1" in refused["failed"], "kan_tiny has one key/value head"
    assert found["alltoall"][0]["bytes"] == 2**20


def test_attentions_are_measured_at_lengths(tmp_path: Path) -> None:
    only = ["--attentions", "ada,softmax", "--lengths", "32,64", "--tokens", "128", "--steps", "1"]
    words = ["model=kan_tiny", "model.vocab_size=500", "model.backend=reference"]
    done = run("bench", "lengths", *only, "--out", "found.json", *words, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["header"]["backend"] == "reference"
    sizes = found["header"]["parameters"]
    assert sizes["softmax"] == pytest.approx(sizes["ada"], rel=0.05)
    measured = [(r["attention"], r["length"]) for r in found["records"]]
    assert measured == [("ada", 32), ("ada", 64), ("softmax", 32), ("softmax", 64)]
    assert all(r["tokens_per_second"] > 0 for r in found["records"])


def test_the_host_is_measured_and_planned_with(tmp_path: Path) -> None:
    only = ["--steps", "2", "--only", "dp 1, ZeRO 1", "--out", "host.json"]
    words = [*WORDS, "launch.nproc=1", "ffn=kan", "attention=ada"]
    done = run("bench", "host", *only, *words, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "host.json").read_text())
    (layout,) = found["layouts"]
    (kind,) = layout["kinds"]
    assert (kind["attention"], kind["ffn"]) == ("ada", "kan")
    assert kind["layer"] > 0
    assert "forward_layer" in kind
    plan = ["model=kan_tiny", "ffn=kan", "attention=ada", "cluster=h200x1", "search=false"]
    plan += ["batch.tokens=8192", "out=plan.json"]
    done = run("plan", *plan, "host=host.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (best,) = json.loads((tmp_path / "plan.json").read_text())["models"][0]["layouts"]
    layers = 2 * 4 * kind["layer"]  # micro-batches, layers of kan_tiny
    assert best["step_split"]["waiting for the host"] > 0.9 * layers

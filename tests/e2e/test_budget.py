"""A run that stops at its cap, with books that add up."""

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.e2e.conftest import run

pytestmark = pytest.mark.e2e


def test_a_run_stops_at_its_dollars_and_its_ledger_adds_up(
    settings: list[str], tmp_path: Path
) -> None:
    """At a dollar a second: 22 seconds, of which starting takes 6 or more."""
    words = [
        *settings,
        "steps=100000",
        "name=capped",
        "engine.threads=1",
        "sample.max_new_tokens=0",
    ]
    words += ["price.usd_per_core_hour=3600", "budget.usd=22", "checkpoint.every=20"]
    began = time.time()
    done = run("train", *words, cwd=tmp_path)
    assert done.returncode == 76, done.stdout + done.stderr
    assert done.stderr.count("kalmagrove: budget.usd=22 is reached: $") == 1
    assert "the same command with a higher cap continues" in done.stderr
    assert "% of budget.usd=22 used" in done.stdout

    folder = tmp_path / "runs" / "capped"
    lines = [json.loads(text) for text in (folder / "ledger.jsonl").read_text().splitlines()]
    stop = lines[-1]
    assert (stop["event"], stop["status"], stop["budget"]) == ("stop", "budget", {"usd": 22.0})
    assert stop["step"] > 0
    slowest = max(line["step_seconds"] for line in lines if line["event"] == "step")
    saving = max(line["seconds"] for line in lines if line["event"] == "checkpoint")
    assert 22 - 3 * (slowest + saving) < stop["usd"] <= 22 + slowest + saving, "one step over"
    assert (folder / "checkpoints" / f"step-{stop['step']:06d}" / "state.json").exists()
    wall = datetime.fromisoformat(stop["time"]).timestamp() - began
    assert sum(stop["phases"].values()) == pytest.approx(wall, rel=0.01)
    assert stop["phases"]["idle"] < 0.1 * wall
    for name in ("startup", "data", "forward", "backward", "optimizer", "checkpoint"):
        assert stop["phases"][name] > 0, name

    verified = run("ledger", "verify", "runs/capped", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout

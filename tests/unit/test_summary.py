"""The end of a run: summary.json and the results table."""

import io
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from tiny_run import make_run

import kalmagrove
from kalmagrove.config import KalmaGroveError
from kalmagrove.parallel import Groups
from kalmagrove.track import StepRecord, build_meters, results_table, write_summary
from kalmagrove.track.summary import bits_per_byte, code_version, throughput

pytestmark = pytest.mark.unit

PROMISED = {
    "status",
    "steps",
    "tokens",
    "val_loss_nats",
    "val_bits_per_byte",
    "unigram_nats",
    "bigram_nats",
    "tokens_per_s",
    "device_seconds",
    "usd",
    "params_total",
    "params_active",
    "world_size",
    "commit",
    "versions",
    "machine",
}


def train(run_dir: Path, **track: Any) -> dict[str, Any]:
    """Two steps and an evaluation through real meters; the summary they leave."""
    meters = build_meters(
        make_run(track=track),
        run_dir,
        Groups.single(),
        params_total=100,
        params_active=60,
        flops_per_token=1e9,
        val_bytes_per_token=4.0,
        val_split_tokens=1000,
        baselines={"unigram_nats": 6.0, "bigram_nats": 4.5},
        screen=RichConsole(file=io.StringIO()),
    )
    meters.start(0, 0)
    for step in (1, 2):
        meters.step(StepRecord(step, 16 * step, torch.tensor(3.0), 0.5, 1e-3))
    meters.evaluated(2, 32, 3.25, 700)
    meters.stop("done", step=2)
    return json.loads((run_dir / "summary.json").read_text())


def test_summary_holds_what_is_promised(tmp_path: Path) -> None:
    summary = train(tmp_path)
    assert set(summary) >= PROMISED
    expected = {
        "status": "done", "steps": 2, "tokens": 32, "val_loss_nats": 3.25, "unigram_nats": 6.0,
        "bigram_nats": 4.5, "params_total": 100, "params_active": 60, "world_size": 1,
        "val_tokens": 700, "val_split_tokens": 1000, "joules": None,
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert math.isclose(summary["val_bits_per_byte"], 3.25 / math.log(2) / 4)
    assert summary["device_seconds"] > 0
    assert math.isclose(summary["usd"], summary["device_seconds"] / 100, abs_tol=1e-5)
    assert summary["tokens_per_s"] > 0
    assert summary["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert summary["machine"]["gpu"] is None
    table = (tmp_path / "console.log").read_text()
    title = "Held-out loss (the model: first 700 of 1,000 tokens; the baselines: all)"
    assert title in " ".join(table.split())
    for row in ("tiny", "bigram", "unigram", "3.2500", "4.5000", "6.0000", "nats/token"):
        assert row in table


def test_a_run_without_evaluation_has_null_losses(tmp_path: Path) -> None:
    meters = build_meters(
        make_run(), tmp_path, Groups.single(), params_total=1, params_active=1, flops_per_token=1.0
    )
    meters.stop("failed", reason="no data")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["steps"]) == ("failed", "no data", 0)
    assert summary["val_loss_nats"] is summary["tokens_per_s"] is summary["bigram_nats"] is None


def test_summary_is_whole_or_absent(tmp_path: Path) -> None:
    write_summary(tmp_path, {"status": "done"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(tmp_path, {"status": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "done"}
    with pytest.raises(KalmaGroveError, match=r"summary\.json cannot be written \(No such file"):
        write_summary(tmp_path / "absent", {})


def test_the_table_shows_unknown_as_a_dash() -> None:
    out = io.StringIO()
    keys = ("val_loss_nats", "bigram_nats", "unigram_nats", "val_bytes_per_token")
    row = dict.fromkeys(keys) | {"run": "tiny", "val_loss_nats": 2.0}
    RichConsole(file=out, width=80).print(results_table(row))
    (line,) = [line for line in out.getvalue().splitlines() if "tiny" in line]
    assert "2.0000" in line
    assert "-" in line


def test_the_table_of_a_whole_split_says_nothing_of_parts() -> None:
    keys = ("val_loss_nats", "bigram_nats", "unigram_nats", "val_bytes_per_token")
    row = dict.fromkeys(keys) | {"run": "tiny", "val_tokens": 9, "val_split_tokens": 9}
    assert results_table(row).title == "Held-out loss"


def test_units() -> None:
    assert bits_per_byte(math.log(2) * 3, 3.0) == pytest.approx(1.0)
    assert bits_per_byte(None, 3.0) is bits_per_byte(1.0, None) is None
    lines = [
        {"tokens_per_s": 10.0, "train_seconds": 1.0},
        {"tokens_per_s": 40.0, "train_seconds": 3.0},
    ]
    assert throughput(lines) == 32.5


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *command], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_is_that_of_the_tree_the_package_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "kalmagrove"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(kalmagrove, "__file__", str(package / "__init__.py"))
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    assert code_version() == kalmagrove.__version__, "no git"
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of another project")
    assert code_version() == kalmagrove.__version__, "installed below another repository"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert code_version() == head
    (package / "__init__.py").write_text("x = 1\n")
    assert code_version() == f"{head}-dirty"

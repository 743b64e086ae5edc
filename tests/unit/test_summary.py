"""The end of a run: summary.json, the results table, and W&B that never stops a training."""

import io
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
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
from kalmagrove.track.wandb_sink import WandbSink, charted, run_id

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


# Weights & Biases


class FakeRun:
    def __init__(self, broken: bool = False) -> None:
        self.logged: list[dict[str, float]] = []
        self.metrics: list[tuple[str, str]] = []
        self.summary: dict[str, Any] = {}
        self.finished: int | None = None
        self.dir, self.broken = "/runs/tiny/wandb/offline-run-1/files", broken

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


def fake(monkeypatch: pytest.MonkeyPatch, run: FakeRun) -> dict[str, Any]:
    """Put `run` behind the module name; returns what `init` will have been given."""
    given: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        given.update(arguments)
        return run

    module = SimpleNamespace(init=init, Settings=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return given


def test_wandb_gets_groups_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    given = fake(monkeypatch, run)
    train(tmp_path, wandb="offline", every=1)
    assert (given["mode"], given["dir"], given["project"]) == ("offline", tmp_path, "kalmagrove")
    assert given["config"]["model"]["d_model"] == 8
    assert "resume" not in given, "a second session must replace the first, not continue it"
    assert ("train/*", "tokens") in run.metrics
    step, _, val = run.logged
    assert (step["tokens"], step["train/loss"], step["train/lr"]) == (16, 3.0, 1e-3)
    assert {"perf/tokens_per_s", "cost/usd", "cost/device_seconds"} <= set(step)
    assert (val["tokens"], val["val/val_loss"]) == (32, 3.25)
    assert not any(name.startswith("val/") for name in step)
    assert run.summary["val_loss_nats"] == 3.25
    assert run.finished == 0


def test_wandb_is_fed_the_whole_history_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FakeRun(), FakeRun()
    ids = []
    for run, mode in ((first, "offline"), (second, "online")):
        ids.append(fake(monkeypatch, run))
        train(tmp_path, wandb=mode, every=1)
    assert ids[0]["id"] == ids[1]["id"] == run_id("tiny", tmp_path)
    assert run_id("tiny", tmp_path / "other") != ids[0]["id"]
    assert [line["tokens"] for line in second.logged] == [16, 32, 32], "starting anew lost the old"
    lines = [{"event": "step", "step": 1, "tokens": 16, "loss": 3.0}, {"event": "stop"}]
    third = FakeRun()
    fake(monkeypatch, third)
    WandbSink(
        "offline", tmp_path, "tiny", project="p", entity=None, config={}, history=lines
    ).close({})
    assert third.logged == [{"tokens": 16, "train/loss": 3.0, "train/step": 1}]


def test_charts_hold_numbers_only() -> None:
    line = {
        "event": "step", "step": 2, "loss": None, "mfu": None, "lr": 0.1, "val_loss": 2.0,
        "model": {"load_cv": 0.5}, "seconds_split": {"data": 1.0}, "comm": {"alltoall_bytes": 8.0},
    }  # fmt: skip
    assert charted(line) == {
        "train/step": 2, "train/lr": 0.1, "model/load_cv": 0.5, "perf/data": 1.0,
        "comm/alltoall_bytes": 8.0,
    }  # fmt: skip
    assert charted({"event": "checkpoint", "step": 2}) == {}


def test_training_goes_on_without_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, wandb="offline", every=1)["status"] == "done"
    assert len(caplog.records) == 1
    assert "W&B stopped recording" in caplog.text


def test_a_wandb_that_breaks_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(monkeypatch, FakeRun(broken=True))
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, wandb="online", every=1)["steps"] == 2
    assert [r.message for r in caplog.records] == [
        "W&B stopped recording (ConnectionError: gone); training goes on and the ledger holds "
        "everything. Use track.wandb=offline to record without a server"
    ]


def test_the_real_wandb_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing listens on the discard port: init fails within its timeout, training does not."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with caplog.at_level(logging.WARNING):
        sink = WandbSink("online", tmp_path, "tiny", project="p", entity=None, config={}, timeout=2)
        sink.log({"event": "step", "tokens": 1, "loss": 1.0})
        sink.close({})
    assert "W&B stopped recording" in caplog.text


def test_the_real_wandb_offline(tmp_path: Path) -> None:
    train(tmp_path, wandb="offline", every=1)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert f"wandb sync {folder}" in (tmp_path / "console.log").read_text()

"""W&B, TensorBoard and trackio: what they get, and that none of them stops a training."""

import io
import json
import logging
import shutil
import struct
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from tiny_run import make_run

from kalmagrove.config import ConfigError, KalmaGroveError, Track
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups
from kalmagrove.track import Energy, StepRecord, build_meters, read_history
from kalmagrove.track.charts import AXES, GROUPS, NAMES, charted
from kalmagrove.track.phases import TRAINING
from kalmagrove.track.redact import HIDDEN, is_secret, scrub, without_secrets
from kalmagrove.track.sinks import Guarded, open_sinks
from kalmagrove.track.wandb_sink import SUPERSEDED, WandbSink, group_of, run_id, send_run

pytestmark = pytest.mark.unit
LOGGED = ("step", "eval")
OFFLINE = Track(wandb="offline", project="p")
LINES = [
    {"event": "step", "step": 1, "tokens": 16, "loss": 3.0, "time": "2026-11-01T10:00:00+00:00"},
    {"event": "checkpoint", "step": 1, "tokens": 16, "path": "checkpoints/step-000001"},
    {"event": "stop", "step": 1, "tokens": 16},
]


def train(
    run_dir: Path,
    model_metrics: dict[str, Any] | None = None,
    name: str = "tiny",
    ends: bool = True,
    **track: Any,
) -> Any:
    """Two steps and an evaluation through real meters; the summary they leave if it `ends`."""
    meters = build_meters(
        make_run(name=name, dir=str(run_dir.parent), track=track),
        run_dir,
        Groups.single(),
        params_total=100,
        params_active=60,
        flops_per_token=1e9,
        val_bytes_per_token=4.0,
        energy=Energy(lambda: 1000.0),
        screen=RichConsole(file=io.StringIO()),
    )
    meters.start(0, 0)
    for step in (1, 2):
        loss, metrics = torch.tensor(3.0), model_metrics or {}
        seconds = dict.fromkeys(TRAINING, 1.0 * step).copy
        record = StepRecord(step, 16 * step, loss, 0.5, 1e-3, False, seconds, metrics.copy)
        meters.step(record)
    meters.evaluated(2, 32, 3.25, 700)
    if not ends:
        return None
    meters.stop("done", step=2)
    return json.loads((run_dir / "summary.json").read_text())


class FakeRun:
    """W&B's run, and trackio's."""

    def __init__(self, broken: bool = False) -> None:
        self.logged: list[dict[str, float]] = []
        self.metrics: dict[str, str | None] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[tuple[str, list[str]]] = []
        self.finished: int | None = None
        self.dir, self.broken = "/runs/tiny/wandb/offline-run-1/files", broken

    def define_metric(self, name: str, step_metric: str | None = None, hidden: Any = None) -> None:
        self.metrics[name] = step_metric

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("gone")
        self.logged.append(values)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((artifact.folder, aliases))

    def finish(self, exit_code: int = 0) -> None:
        self.finished = exit_code


class FakeArtifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type

    def add_dir(self, folder: str) -> None:
        self.folder = Path(folder).name


def fake(monkeypatch: pytest.MonkeyPatch, run: FakeRun, name: str = "wandb") -> dict[str, Any]:
    """Put `run` behind the module `name`; returns what `init` will have been given."""
    given: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        given.update(arguments)
        return run

    module = SimpleNamespace(
        init=init,
        Settings=lambda **settings: settings,
        Artifact=FakeArtifact,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, name, module)
    return given


# Names


def test_charts_hold_numbers_only() -> None:
    line = {
        "event": "step", "step": 2, "tokens": 32, "usd": 0.5, "wall_seconds": 1800.0,
        "loss": None, "mfu": None, "lr": 0.1, "val_loss": 2.0, "joules": 64.0,
        "model": {"load_cv": 0.5, "3.load_cv": 0.25, "new": 1.0}, "seconds_split": {"data": 1.0},
        "comm": {"alltoall_bytes": 8.0},
    }  # fmt: skip
    assert charted(line) == {
        "tokens": 32, "usd": 0.5, "hours": 0.5, "optim/step": 2, "optim/lr": 0.1,
        "groves/load_cv": 0.5, "groves/3.load_cv": 0.25, "model/new": 1.0, "phases/data": 1.0,
        "comm/alltoall_bytes": 8.0, "cost/usd": 0.5, "cost/joules": 64.0,
        "cost/usd_per_million_tokens": 0.5e6 / 32, "cost/joules_per_token": 2.0,
    }  # fmt: skip
    assert charted({"event": "checkpoint", "step": 2, "tokens": 32}) == {}


def test_every_listed_name_is_one_that_meters_and_models_write(tmp_path: Path) -> None:
    """So a dashboard of listed names shows something. Figures of GPUs are null here."""
    torch.manual_seed(0)
    layers = {"layers": 2, "ffn": {"pattern": ["grove"]}, "attention": {"pattern": ["ada"]}}
    tree = make_run().model.model_dump(mode="json")
    for key, change in layers.items():
        tree[key] = tree[key] | change if isinstance(change, dict) else change
    model = build_model(make_run(model=tree).model, Groups.single())
    tokens = torch.randint(0, 32, (1, 8))
    model(tokens=tokens, targets=tokens, normalizer=1.0)
    metrics = {**model.metrics(), "aux_loss": torch.tensor(0.1)}
    train(tmp_path, metrics, wandb="disabled", every=1)
    found: set[str] = set()
    for line in read_history(tmp_path / "ledger.jsonl").lines:
        known = {key: 1.0 if value is None else value for key, value in line.items()}
        found |= set(charted(known))
    assert not any(name.startswith("model/") for name in found), "a metric without a group"
    elsewhere = {name for name in NAMES if name.startswith("comm/")}  # the engine's traffic
    assert found >= NAMES - elsewhere
    assert {name for name in found if "/" in name and "." not in name} <= NAMES


# Weights & Biases


def test_wandb_gets_groups_over_tokens_and_dollars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    given = fake(monkeypatch, run)
    place = tmp_path / "ablation" / "tiny"
    train(place, wandb="offline", every=1, tags=["a", "b"])
    assert (given["mode"], given["dir"], given["project"]) == ("offline", place, "kalmagrove")
    assert (given["group"], given["tags"]) == ("ablation", ("a", "b"))
    assert given["config"]["model"]["d_model"] == 8
    assert "resume" not in given, "a second session must replace the first, not continue it"
    assert run.metrics["loss/*"] == run.metrics["cost/*"] == "tokens"
    assert run.metrics["by_usd/*"] == "usd"
    assert {f"{group}/*" for group in GROUPS} | set(AXES) == set(run.metrics)
    step, _, val = run.logged
    assert (step["tokens"], step["loss/train"], step["optim/lr"]) == (16, 3.0, 1e-3)
    assert {"throughput/tokens_per_s", "cost/usd", "memory/peak", "usd", "hours"} <= set(step)
    assert (val["tokens"], val["eval/loss"], val["by_usd/eval_loss"]) == (32, 3.25, 3.25)
    assert not any(name.startswith("eval/") for name in step), "only the evaluation is drawn"
    assert run.summary["val_loss_nats"] == 3.25
    assert run.finished == 0


def test_a_group_is_the_folder_of_a_study() -> None:
    arm = Path("runs/study/arm-seed1")
    assert group_of(Track(), Path("runs/tiny"), {}) is None
    assert group_of(Track(), arm, {}) == "study"
    assert group_of(Track(group="mine"), arm, {}) == "mine"
    assert group_of(Track(), Path("moved/arm-seed1"), {"dir": "/x/runs/study"}) == "study"


def test_wandb_is_fed_the_whole_history_under_one_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = FakeRun(), FakeRun()
    ids = []
    for run, mode in ((first, "offline"), (second, "online")):
        ids.append(fake(monkeypatch, run))
        train(tmp_path, wandb=mode, every=1)
    told = [line["run_id"] for line in read_history(tmp_path / "ledger.jsonl").series("start")]
    assert [told[-1]] * 2 == [given["id"] for given in ids]
    assert [line["tokens"] for line in second.logged] == [16, 32, 32], "starting anew lost the old"


def test_a_run_keeps_its_id_wherever_its_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_id(folder: Path, name: str) -> str:
        given = fake(monkeypatch, FakeRun())
        train(folder, name=name, wandb="offline")
        return str(given["id"])

    first = tmp_path / "runs" / "tiny"
    own = train_id(first, "tiny")
    moved = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(first, moved)
    assert train_id(moved, "tiny") == own
    fork = tmp_path / "runs" / "fork"
    shutil.copytree(first, fork)
    new = train_id(fork, "fork")
    assert new != own, "what goes on under another name is a run of its own"
    assert train_id(fork, "fork") == new
    shutil.rmtree(first)
    assert train_id(first, "tiny") not in (own, new), "another run at the place of an old one"


def test_the_id_of_older_ledgers_is_by_name_and_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, wandb="disabled")
    ledger = tmp_path / "ledger.jsonl"
    lines = [json.loads(text) for text in ledger.read_text().splitlines()]
    new = ("run_id", "folder", "digest")
    old = [{key: line[key] for key in line if key not in new} for line in lines]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in old))
    given = fake(monkeypatch, FakeRun())
    train(tmp_path, wandb="offline")
    assert given["id"] == run_id([], "tiny", tmp_path)
    assert read_history(ledger).series("start")[-1]["run_id"] == given["id"]


def test_every_point_has_the_time_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    fake(monkeypatch, run)
    train(tmp_path, wandb="offline", every=1)
    lines = [x for x in read_history(tmp_path / "ledger.jsonl").lines if x["event"] in LOGGED]
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    assert [values["_timestamp"] for values in run.logged] == times


@pytest.mark.parametrize("status", ["done", "open"])
def test_superseded_folders_are_set_aside(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"offline-run-2026110{day}_100000-an-id" for day in (1, 2, 3)]
    for name in (*names, "offline-run-20261101_100000-other"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    run = FakeRun()
    run.dir = str(tmp_path / "wandb" / names[2] / "files")
    fake(monkeypatch, run)
    sink = WandbSink(OFFLINE, tmp_path, "tiny", "an-id", config={})
    assert sink.close({"status": status}) == f"W&B, offline: wandb sync {tmp_path}/wandb/{names[2]}"
    moved = sorted(path.name for path in tmp_path.glob(f"wandb/{SUPERSEDED}/*"))
    assert moved == (names[:2] if status == "done" else []), "what goes on may write to one"
    left = {path.name for path in (tmp_path / "wandb").iterdir()}
    assert {names[2], "offline-run-20261101_100000-other"} <= left


def test_the_real_wandb_keeps_times(tmp_path: Path) -> None:
    import wandb

    sink = WandbSink(OFFLINE, tmp_path, "tiny", "an-id", config={})
    sink.log(LINES[0])
    newest = Path(str(sink.close({"status": "done"})).rpartition(" ")[2])
    wandb.teardown()  # its process may still write after the end of the run
    (file,) = newest.glob("*.wandb")
    assert newest.name.endswith("-an-id")
    (point,) = [record.history for record in records(file) if record.HasField("history")]
    values = {item.key or item.nested_key[0]: float(item.value_json) for item in point.item}
    assert values["_timestamp"] == datetime.fromisoformat(LINES[0]["time"]).timestamp()
    assert values["loss/train"] == 3.0


def records(path: Path) -> Iterator[Any]:
    """Of W&B's file: its format is LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        ("none", []),
        ("last", [("step-000002", ["latest", "step-000002"])]),
        ("all", [(f"step-00000{n}", ["latest", f"step-00000{n}"]) for n in (1, 2)]),
    ],
)
def test_checkpoints_become_artifacts(
    wanted: Any, sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun()
    fake(monkeypatch, run)
    track = OFFLINE.model_copy(update={"artifacts": wanted})
    sink = WandbSink(track, tmp_path, "tiny", "an-id", config={})
    for step in (1, 2, 3):
        path = f"checkpoints/step-00000{step}"
        if step < 3:  # the third was deleted since
            (tmp_path / path).mkdir(parents=True)
        sink.log({"event": "checkpoint", "step": step, "tokens": 16, "path": path})
    sink.close({})
    assert run.artifacts == sent


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
    import wandb

    wandb.teardown()  # it knows another server since its first run
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    online = OFFLINE.model_copy(update={"wandb": "online"})
    with caplog.at_level(logging.WARNING):
        make = lambda: WandbSink(online, tmp_path, "tiny", "x", config={}, timeout=1)  # noqa: E731
        sink = Guarded("W&B", make, LINES)
        assert sink.close({}) is None
    assert "W&B stopped recording" in caplog.text
    with pytest.raises(KalmaGroveError, match=r"W&B could not be reached \(Timed out .* refused\)"):
        send_run(online, tmp_path, "tiny", LINES, {}, {}, timeout=1)


def test_secrets_reach_neither_ledger_nor_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes that the real W&B, the ledger and the summary leave, searched."""
    hidden = {name: f"{name.lower()}-value-1234567890" for name in ("MY_API_KEY", "HF_TOKEN")}
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["kalmagrove", "train", "x.password=on-the-command-line"])
    track = OFFLINE.model_copy(update={"tensorboard": True})
    config = {"model": {"name": "visible"}, "scratch": {"hub_token": "in-the-config", "eos": 2}}
    meters = build_meters(
        make_run(track={"wandb": "disabled"}), tmp_path, Groups.single(), params_total=1,
        params_active=1, flops_per_token=1.0, screen=RichConsole(file=io.StringIO()),
    )  # fmt: skip
    meters.start(0, 0)
    reason = f"HTTPError: https://host/?token={hidden['HF_TOKEN']}"
    meters.stop("failed", step=0, reason=reason)
    history = read_history(tmp_path / "ledger.jsonl").lines
    assert history[-1]["reason"] == f"HTTPError: https://host/?token={HIDDEN}"
    for sink in open_sinks(track, tmp_path, "tiny", config, history):
        sink.close({})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert any(path.suffix == ".wandb" for path in files)
    assert b"visible" in content, "what is sent can be found"
    for value in (*hidden.values(), "on-the-command-line", "in-the-config"):
        assert value.encode() not in content


def test_what_is_a_secret() -> None:
    for name in ("WANDB_API_KEY", "hf_token", "clientSecret", "AWS_SECRET_ACCESS_KEY", "password"):
        assert is_secret(name), name
    for name in ("max_tokens", "tokenizer", "TOKENIZERS_PARALLELISM", "monkey", "keys", "usd"):
        assert not is_secret(name), name
    tree = {"a": [{"api_key": "x", "tokens": 3}], "eos_token_id": 2, "source": {"path": "p"}}
    kept = {"a": [{"api_key": HIDDEN, "tokens": 3}], "eos_token_id": 2, "source": {"path": "p"}}
    assert without_secrets(tree) == kept
    environment = {"A_KEY": "12345678", "B_KEY": "short", "HOME": "/home/somebody"}
    assert scrub("12345678 short /home/somebody", environment) == f"{HIDDEN} short /home/somebody"


# The others


def test_tensorboard_gets_the_charts_over_tokens(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second session replaces what the first one wrote
        train(tmp_path, wandb="disabled", every=1, tensorboard=True)
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in (tmp_path / "console.log").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(16, 3.0), (32, 3.0)]
    assert events.Scalars("eval/loss")[-1].value == 3.25
    assert not set(AXES) & set(events.Tags()["scalars"])


def test_trackio_gets_the_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    given = fake(monkeypatch, run, "trackio")
    train(tmp_path, wandb="disabled", every=1, trackio=True, group="g")
    assert (given["project"], given["name"], given["group"]) == ("kalmagrove", "tiny", "g")
    assert [values["tokens"] for values in run.logged] == [16, 32, 32]
    assert run.finished == 0
    assert "trackio show --project kalmagrove" in (tmp_path / "console.log").read_text()


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_sink_that_is_asked_for_and_missing_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalmagrove.track.sinks.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf'{name}=True needs.*pip install "kalmagrove\[{name}\]'):
        train(tmp_path, wandb="disabled", **{name: True})
    assert not list(tmp_path.iterdir())

"""The ledger's books: phases that add up, faults that are found, tables and files of it."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from rich.console import Console as RichConsole
from test_meters import Clock, Session
from tiny_run import make_run

from kalmagrove import cli
from kalmagrove.config import KalmaGroveError
from kalmagrove.engine.timer import Timer
from kalmagrove.parallel import Groups
from kalmagrove.track import StepRecord, build_meters, read_history
from kalmagrove.track.accounts import ROWS, WITHIN, parts, sessions
from kalmagrove.track.audit import faults
from kalmagrove.track.ledger import History
from kalmagrove.track.phases import STAGES
from kalmagrove.track.report.page import render
from kalmagrove.track.report.source import read_run

pytestmark = pytest.mark.unit


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1..4 saved at 2, killed; continued at 2 to the end."""
    first = Session(tmp_path)
    first.clock.add(5.0)
    first.meters.start(0, 0)
    first.step(1)
    first.step(2)
    saved = json.loads(json.dumps(first.meters.state_dict()))
    first.clock.add(1.0)
    first.meters.checkpointed(2, 32, tmp_path / "c", 1.0)
    first.step(3)
    first.step(4)
    second = Session(tmp_path, clock=Clock())
    second.meters.load_state_dict(saved)
    second.clock.add(3.0)
    second.meters.start(2, 32)
    for number in range(3, 9):
        second.step(number)
    second.clock.add(2.5)
    second.meters.evaluated(8, 128, 3.0, 700)
    second.meters.stop("done", step=8)
    return tmp_path


def test_phases_begin_anew_with_a_session_and_add_up(run_dir: Path) -> None:
    one, two = sessions(read_history(run_dir / "ledger.jsonl"))
    assert one.phases == {
        "startup": 5.0, "data": 1.0, "forward": 6.0, "backward": 0.0, "alltoall": 0.0,
        "optimizer": 0.0, "evaluation": 0.0, "checkpoint": 1.0, "idle": 1.0,
    }  # fmt: skip
    assert (two.phases["startup"], two.phases["evaluation"]) == (3.0, 2.5)
    assert (sum(one.phases.values()), sum(two.phases.values())) == (14.0, 17.5)
    assert (one.spent.wall_seconds, two.spent.wall_seconds) == (14.0, 17.5)
    assert (one.ended, two.ended) == ("killed", "done")
    assert float(one.spent.usd or 0) == pytest.approx(0.14)
    assert float(two.spent.usd or 0) == pytest.approx(0.175)


def test_dollars_tokens_and_flops_of_phases(run_dir: Path) -> None:
    found = parts(read_history(run_dir / "ledger.jsonl"))
    assert tuple(found) == ROWS
    assert (found["startup"].seconds, found["startup"].device_seconds) == (8.0, 8.0)
    assert found["startup"].usd == pytest.approx(0.08)
    assert sum(found[stage].seconds for stage in STAGES) == 31.5
    assert sum(found[phase].seconds for phase in WITHIN) == found["training"].seconds == 20.0
    assert all(part.joules is None for part in found.values()), "nothing measures"
    assert found["training"].tokens == 16 * (4 + 6), "steps 3 and 4 were done twice"
    assert found["evaluation"].tokens == 700
    told = {name: part.flops for name, part in found.items() if part.flops is not None}
    assert told == {
        "training": 160e9, "forward": 40e9, "backward": 120e9, "evaluation": 175e9,
    }  # fmt: skip


def test_goodput_is_the_training_that_lasted(run_dir: Path) -> None:
    history = read_history(run_dir / "ledger.jsonl")
    assert history.goodput == pytest.approx(8 * 2.0 / 31.5), "steps 3 and 4 were done twice"
    assert json.loads((run_dir / "summary.json").read_text())["goodput"] == history.goodput
    assert History(()).goodput is None


def test_lines_of_older_versions_are_read(run_dir: Path, tmp_path_factory: Any) -> None:
    """Without wall clock, phases and digests."""
    old = tmp_path_factory.mktemp("old") / "ledger.jsonl"
    with old.open("w") as file:
        for text in (run_dir / "ledger.jsonl").read_text().splitlines():
            line = json.loads(text)
            for key in ("wall_seconds", "phases", "digest"):
                del line[key]
            file.write(json.dumps(line | {"device_seconds": 4 * line["device_seconds"]}) + "\n")
    text = old.read_text().replace('"devices": 1', '"devices": 4')
    old.write_text(text.replace('"usd_per_device_hour": 36.0', '"usd_per_device_hour": 9.0'))
    history = read_history(old)
    assert history.wall_seconds == 31.5
    assert [session.spent.wall_seconds for session in sessions(history)] == [14.0, 17.5]
    assert parts(history) == {}
    assert faults(old) == []
    assert cli.main(["ledger", "show", str(old)]) == 0


def test_all_to_alls_of_older_versions_stay_in_the_passes(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that have phases, but neither joules by stage nor all-to-alls apart."""
    path = run_dir / "ledger.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    for line in lines:
        del line["phases"]["alltoall"], line["digest"]
        for key in ("phase_joules", "forward_flops_per_token", "val_tokens"):
            line.pop(key, None)
        if line["event"] == "step":
            line["alltoall_seconds"] = 0.5
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert faults(path) == []
    found = parts(read_history(path))
    assert set(ROWS) - set(found) == {"alltoall"}
    assert sum(found[stage].seconds for stage in STAGES) == 31.5
    assert (found["forward"].flops, found["training"].flops) == (None, 160e9)
    assert found["evaluation"].tokens is None
    assert cli.main(["ledger", "show", str(run_dir)]) == 0
    assert "all-to-all" not in capsys.readouterr().out
    assert cli.main(["ledger", "export", str(run_dir), "--out", str(run_dir / "x.csv")]) == 0
    render([read_run(run_dir)])


def edit(path: Path, number: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    path.write_text("".join(lines))


def undigested(path: Path) -> None:
    """Nothing but the figures is left to find faults by."""
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**x, "digest": None}) + "\n" for x in lines))


@pytest.mark.parametrize(
    ("number", "old", "new", "wrong"),
    [
        (3, '"step": 2', '"step": 9', "line 4 goes back in step: 4 after 9"),
        (4, '"tokens": 64', '"tokens": 5', "line 4 goes back in tokens: 5 after 32"),
        (2, '"startup": 5.0', '"startup": 6.0', "has phases of 5.000 s where clock gives 4.000 s"),
        (2, '"idle": 0.5', '"idle": -9.0', "line 2 has phases longer than the"),
        (2, '"usd": 0.09', '"usd": 0.07', "line 2 has $0.020000 for 4.000 device-seconds that c"),
        (2, '"device_seconds": 9.0', '"device_seconds": 8.0', "has 3.000 device-seconds for 4.000"),
        (5, '"lost_steps": 2', '"lost_steps": 0', "line 5 tells of 0 lost steps, but 2 were lost"),
        (4, '"usd": 0.14', '"usd": null', "line 5 has dollars, but earlier ones are unknown"),
        (1, '"event": "start"', '"event": "step"', "line 1 begins no session"),
    ],
)
def test_what_does_not_add_up_is_found(
    run_dir: Path, number: int, old: str, new: str, wrong: str
) -> None:
    path = run_dir / "ledger.jsonl"
    undigested(path)
    assert faults(path) == []
    edit(path, number, old, new)
    assert any(wrong in fault for fault in faults(path)), faults(path)


def test_changed_and_missing_lines_are_found_by_their_digests(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "ledger.jsonl"
    whole = path.read_text()
    assert faults(path) == []
    assert cli.main(["ledger", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{path} is whole and adds up\n"
    edit(path, 2, '"loss": 3.0', '"loss": 2.0')
    changed = "was changed, or lines before it were taken out or put in"
    assert faults(path) == [f"line 2 {changed}"]
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    assert faults(path) == [f"line 3 {changed}"]
    path.write_text("".join([lines[0], lines[1][:-28] + "}\n", *lines[2:]]))
    assert "line 2 has no digest, but the one before it has" in faults(path)
    path.write_text(whole + '{"event": "st')
    assert faults(path) == [f"line {len(lines) + 1} is torn: a kill came while it was written"]
    path.write_text("".join([lines[0], "oops\n", *lines[1:]]))
    assert cli.main(["ledger", "verify", str(path)]) == 1
    assert capsys.readouterr().out == f"{path}: line 2 is no ledger line\n"
    path.write_text("")
    with pytest.raises(KalmaGroveError, match="holds no line"):
        faults(path)


def test_a_short_run_in_real_time_adds_up(tmp_path: Path) -> None:
    """The engine's timer and the meters' clock are read independently."""
    timer, begun = Timer(torch.device("cpu")), time.monotonic()
    meters = build_meters(
        make_run(), tmp_path, Groups.single(), params_total=1, params_active=1,
        flops_per_token=1.0, started=begun, screen=RichConsole(quiet=True),
    )  # fmt: skip
    meters.start(0, 0)
    for step in range(1, 9):
        timer.begin()
        for phase, seconds in (("data", 0.005), ("forward", 0.02), ("backward", 0.03)):
            time.sleep(seconds)
            timer.lap(phase)
        record = StepRecord(step, 16 * step, torch.tensor(1.0), 0.1, 1e-3, seconds=timer.seconds)
        meters.step(record)
    time.sleep(0.1)
    meters.evaluated(8, 128, 1.0, 700)
    before = time.monotonic() - begun
    meters.stop("done", step=8)
    after = time.monotonic() - begun
    (session,) = sessions(read_history(tmp_path / "ledger.jsonl"))
    phases = session.phases
    assert 0.99 * before < sum(phases.values()) < 1.01 * after
    assert phases["data"] >= 8 * 0.005
    assert phases["forward"] >= 8 * 0.02
    assert phases["backward"] >= 8 * 0.03
    assert phases["evaluation"] >= 0.1
    assert phases["optimizer"] == 0
    assert 0 <= phases["idle"] < 0.5 * after
    assert faults(tmp_path / "ledger.jsonl") == []


def test_after_a_failure_the_device_is_not_asked(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(2)

    def hang() -> dict[str, float]:
        raise AssertionError("the device may never answer")

    session.step(3, seconds=hang)
    session.meters.stop("failed", reason="CUDA error")
    (line,) = session.lines("stop")
    assert (line["phases"]["forward"], line["phases"]["idle"]) == (1.5, 2.25)


def test_show_and_export(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ledger", "show", str(run_dir)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("0 to 4", "2 to 8", "killed", "$0.14", "$0.18", "startup 8.00 25.4% 8.00 $0.08 -",
                 "training 20.00 63.5% 20.00 $0.20 - 160 1.6e+11", "all-to-all 0.00 0.0%",
                 "evaluation 2.50 7.9% 2.50 $0.03 - 700 1.75e+11"):  # fmt: skip
        assert part in shown, shown
    assert "goodput 50.8%" in shown
    assert "lost 2 steps" in shown
    for name in ("out.csv", "out.parquet"):
        assert cli.main(["ledger", "export", str(run_dir), "--out", str(run_dir / name)]) == 0
    lines = read_history(run_dir / "ledger.jsonl").lines
    table = parquet.read_table(run_dir / "out.parquet").to_pylist()
    assert len(table) == len(lines)
    assert [row["session"] for row in table] == [1] * 4 + [2] * 6
    assert [row["lasted"] for row in table][:5] == [True, True, True, False, True]
    assert table[1]["phases.startup"] == 5.0
    assert table[1]["phases.alltoall"] == 0.0
    assert table[1]["phase_usd.startup"] == pytest.approx(0.05)
    assert table[1]["phase_device_seconds.training"] == 4.0
    assert table[1]["phase_joules.training"] is None
    assert [row["phase_tokens.training"] for row in table] == [
        0, 32, 32, 64, 0, 32, 64, 96, 96, 96,
    ]  # fmt: skip
    assert table[-1]["phase_flops.evaluation"] == 175e9
    assert "phase_tokens.checkpoint" not in table[1], "it has none"
    assert table[-1]["flops"] == 128 * 1e9
    with (run_dir / "out.csv").open() as file:
        text = list(csv.DictReader(file))
    assert [float(row["usd"]) for row in text] == [line["usd"] for line in lines]
    assert text[0]["loss"] == ""


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["show", "{}/none"], "holds no ledger.jsonl; name a run's folder"),
        (["export", "{}", "--out", "{}/x.xlsx"], "must end in .csv or .parquet"),
        (["export", "{}", "--out", "{}/no/x.csv"], "cannot be written (No such file"),
        (["look", "{}"], "invalid choice: 'look'"),
    ],
)
def test_mistakes_are_one_line(
    run_dir: Path, words: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ledger", *(word.format(run_dir) for word in words)]) == 2
    said = capsys.readouterr().err
    assert wrong in said
    assert said.count("\n") == 1

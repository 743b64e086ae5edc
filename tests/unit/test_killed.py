"""What no line tells of: starts that died, ledgers that are gone or another's, lines cut off."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_meters import Clock, Session
from tiny_run import make_run

from kalmagrove import cli
from kalmagrove.config.attempts import FOLDER, beats
from kalmagrove.track import read_history
from kalmagrove.track.accounts import KILLED, parts, sessions
from kalmagrove.track.audit import faults, unfinished
from kalmagrove.track.bill import Bill
from kalmagrove.track.cost import Cost
from kalmagrove.track.report.page import render
from kalmagrove.track.report.source import read_run

pytestmark = pytest.mark.unit


def beat(folder: Path, attempt: str, seconds: float, processes: int = 1) -> None:
    """As a start that died has left it."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    told = {"seconds": seconds, "processes": processes}
    (folder / FOLDER / attempt).write_text(json.dumps(told))


def train(session: Session, first: int, last: int) -> dict[str, Any]:
    """Steps of 2 s each and a save that takes no time; what it holds."""
    for number in range(first, last + 1):
        session.step(number)
    saved = json.loads(json.dumps(session.meters.state_dict()))
    session.meters.checkpointed(last, 16 * last, session.path / "c", 0.0)
    return dict(saved)


def begin(
    folder: Path, attempt: str, saved: dict[str, Any] | None = None, step: int = 0, **run: Any
) -> Session:
    session = Session(folder, make_run(**run), Clock(), attempt=attempt)
    if saved is not None:
        session.meters.load_state_dict(saved)
    session.clock.add(3.0)
    session.meters.start(step, 16 * step)
    return session


def table(folder: Path) -> list[tuple[float, float, str]]:
    """Wall clock and dollars of the sessions, and their ends."""
    found = sessions(read_history(folder / "ledger.jsonl"))
    return [(one.spent.wall_seconds, float(one.spent.usd or 0), one.ended) for one in found]


@pytest.fixture
def killed(tmp_path: Path) -> dict[str, Any]:
    """Steps 1 to 4, saved at 2, last line at 11 s, killed at 50 s: what the checkpoint holds."""
    session = begin(tmp_path, "one")
    saved = train(session, 1, 2)
    session.step(3)
    session.step(4)
    beat(tmp_path, "one", 50.0)
    return saved


def test_what_comes_after_the_last_line_is_booked_once(
    tmp_path: Path, killed: dict[str, Any]
) -> None:
    path = tmp_path / "ledger.jsonl"
    assert unfinished(path) == (
        "the last session has no end: it goes on, or was killed 39.0 s after its last line, which "
        "the next start books"
    )
    second = begin(tmp_path, "two", killed, 2)
    (line,) = second.lines("resume")
    assert line["killed"] == [
        {"attempt": "one", "device_seconds": 39.0, "wall_seconds": 39.0, "usd": 0.39}
    ]
    assert (line["wall_seconds"], line["device_seconds"], line["usd"]) == (53.0, 53.0, 0.53)
    assert line["lost_device_seconds"] == 43.0, "all since the save at 7 s"
    assert second.meters.state_dict()["lost_device_seconds"] == 43.0
    assert beats(tmp_path) == []
    beat(tmp_path, "one", 50.0)  # as if killed before it was removed
    beat(tmp_path, "two", 3.0)  # its own start
    second.meters.stop("stopped")
    third = begin(tmp_path, "three", killed, 2)
    assert "killed" not in third.lines("resume")[-1]
    assert third.meters.spent.device_seconds == 56.0
    third.meters.stop("done")
    assert table(tmp_path) == [(50.0, 0.5, "killed"), (3.0, 0.03, "stopped"), (3.0, 0.03, "done")]
    assert (faults(path), unfinished(path), beats(tmp_path)) == ([], None, [])
    history = read_history(path)
    assert history.goodput == pytest.approx(4.0 / 56.0)
    assert parts(history)[KILLED].seconds == 39.0
    page = render([read_run(tmp_path)])
    assert "killed" in page


def test_starts_without_a_line_are_booked_with_their_processes(tmp_path: Path) -> None:
    beat(tmp_path, "a", 4.0)
    beat(tmp_path, "b", 5.0, processes=2)
    session = begin(tmp_path, "c")
    (line,) = session.lines("start")
    assert [part["device_seconds"] for part in line["killed"]] == [4.0, 10.0]
    assert (line["lost_device_seconds"], line["wall_seconds"]) == (14.0, 12.0)
    assert line["usd"] == 0.17
    session.meters.stop("done")
    assert faults(tmp_path / "ledger.jsonl") == []
    (one,) = sessions(read_history(tmp_path / "ledger.jsonl"))
    assert [(other.what, other.starts, other.spent.wall_seconds) for other in one.before] == [
        ("killed", 2, 9.0)
    ]
    assert one.spent.wall_seconds == 3.0


@pytest.mark.parametrize(
    ("status", "booked"), [("done", 0.0), ("stopped", 0.0), ("budget", 0.0), ("failed", 7.0)]
)
def test_an_end_that_is_written_says_all_unless_it_failed(
    status: str, booked: float, tmp_path: Path
) -> None:
    first = begin(tmp_path, "one")
    first.meters.stop(status)
    beat(tmp_path, "one", 10.0)
    second = begin(tmp_path, "two")
    killed = second.lines("start")[-1].get("killed", [])
    assert sum(part["wall_seconds"] for part in killed) == booked
    assert beats(tmp_path) == []
    assert faults(tmp_path / "ledger.jsonl") == []


def test_a_budget_counts_what_a_kill_took(tmp_path: Path, killed: dict[str, Any]) -> None:
    second = begin(tmp_path, "two", killed, 2, budget={"hours": 54 / 3600})
    assert second.meters.over_budget() is not None, "53 s are used, and a step takes 2"


def test_a_checkpoint_may_know_more_than_lines_and_heartbeat(tmp_path: Path) -> None:
    """Killed right behind a save, before its line; the last beat is older."""
    session = begin(tmp_path, "one")
    for number in range(1, 4):
        session.step(number)
    saved = session.meters.state_dict()
    beat(tmp_path, "one", 8.0)
    second = begin(tmp_path, "two", saved, 3)
    (line,) = second.lines("resume")
    assert [(part["attempt"], part["wall_seconds"]) for part in line["killed"]] == [
        ("one", 1.0), ("one", 1.0),
    ]  # fmt: skip
    assert (line["lost_device_seconds"], line["wall_seconds"]) == (0.0, 12.0)
    second.meters.stop("done")
    assert faults(tmp_path / "ledger.jsonl") == []
    assert [wall for wall, *_ in table(tmp_path)] == [9.0, 3.0]


def test_energy_and_storage_of_a_kill_are_at_the_means(tmp_path: Path) -> None:
    price = {"usd_per_kwh": 3600.0, "usd_per_gb_month": 0.0}
    session = begin(tmp_path, "one")
    session.meters.stop("failed")
    history = read_history(tmp_path / "ledger.jsonl")
    line = {**history.lines[-1], "joules": 6.0}
    history = type(history)((history.lines[0] | price, *history.lines[1:-1], line))
    beat(tmp_path, "one", 5.0)
    bill = Bill(Cost(1, "core", 36.0), tmp_path, history, 0.0, lambda: 0.0, 1)
    lost, told = bill.resume(None, 0, beats(tmp_path), "")
    assert lost == 5.0
    (part,) = told["killed"]
    assert part["usd"] == pytest.approx(0.02 + 4.0 * 3600 / 3.6e6), "2 s of 2 W"
    bill.use({"training": 1.0})
    assert bill.joules == 11.0


def test_a_fork_names_what_it_inherits(
    tmp_path: Path, killed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fork"
    fork = begin(folder, "f1", killed, 2)
    (line,) = fork.lines("resume")
    assert line["inherited"] == {
        "device_seconds": 7.0, "wall_seconds": 7.0, "usd": 0.07,
        "lost_device_seconds": 0.0, "joules": None,
    }  # fmt: skip
    assert (line["wall_seconds"], line["lost_steps"]) == (10.0, 0)
    fork.step(3)
    fork.step(4)
    beat(folder, "f1", 9.0)
    again = begin(folder, "f2", killed, 2)
    last = again.lines("resume")[-1]
    assert "inherited" not in last, "the ledger says so already"
    assert (last["wall_seconds"], last["lost_device_seconds"]) == (7.0 + 9.0 + 3.0, 9.0)
    train(again, 3, 8)
    again.meters.stop("done")
    assert table(folder) == [(9.0, 0.09, "killed"), (15.0, 0.15, "done")]
    history = read_history(folder / "ledger.jsonl")
    assert history.goodput == pytest.approx(12.0 / 24.0), "of its own time"
    assert history.spent.device_seconds == 31.0
    assert faults(folder / "ledger.jsonl") == []
    assert cli.main(["ledger", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    (row,) = [text.split() for text in out.splitlines() if "inherited" in text]
    assert row == ["0", "to", "2", "0:07", "0.0019", "$0.07", "inherited"]


def test_a_fork_of_a_run_that_has_got_on(tmp_path: Path, killed: dict[str, Any]) -> None:
    """Its own time is not taken for a part of the other's."""
    fork = begin(tmp_path / "fork", "f1", killed, 2)
    fork.meters.stop("failed")
    other = {**killed, "device_seconds": 27.0, "wall_seconds": 27.0, "usd": 0.27}
    again = begin(tmp_path / "fork", "f2", {**other, "lost_device_seconds": 5.0}, 8)
    line = again.lines("resume")[-1]
    assert line["inherited"]["device_seconds"] == 20.0
    assert line["device_seconds"] == 27.0 + 3.0 + 3.0
    assert line["lost_device_seconds"] == 3.0, "the fork's first session"
    again.meters.stop("done")
    assert faults(tmp_path / "fork" / "ledger.jsonl") == []


def test_a_ledger_that_is_gone(tmp_path: Path, killed: dict[str, Any]) -> None:
    path = tmp_path / "ledger.jsonl"
    path.unlink()
    (tmp_path / FOLDER / "one").unlink()
    second = begin(tmp_path, "two", killed, 2)
    assert second.lines("resume")[0]["inherited"]["wall_seconds"] == 7.0
    second.meters.stop("done")
    assert table(tmp_path) == [(3.0, 0.03, "done")]
    assert faults(path) == []
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    del lines[0]["inherited"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").unlink()
    assert "line 1 begins at step 2, and of what that had cost the ledger has nothing" in faults(
        path
    )
    assert "line 1 adds 10.000 to wall_seconds, and names 3.000 of it" in faults(path)


def test_a_session_whose_heartbeat_is_gone(tmp_path: Path, killed: dict[str, Any]) -> None:
    path = tmp_path / "ledger.jsonl"
    (tmp_path / FOLDER / "one").unlink()
    assert unfinished(path) == (
        "the last session has no end: it goes on, or was killed, and nothing tells how long after "
        "its last line"
    )
    begin(tmp_path, "two", killed, 2)
    assert faults(path) == [
        "line 5 begins a session, but the one before has no end, and what it cost then is not "
        "booked"
    ]


def test_lines_that_were_cut_off(
    tmp_path: Path, killed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    second = begin(tmp_path, "two", killed, 2)
    saved = train(second, 3, 8)
    folder = tmp_path / "checkpoints" / "step-000008"
    folder.mkdir(parents=True)
    shutil.copytree(folder, folder.with_name("step-000009.tmp"))
    (folder / "state.json").write_text(json.dumps({"meters": saved}))
    second.meters.stop("done", step=8)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    assert faults(path) == []
    missing = "lines, the last of which is not here: the ledger's last lines are missing"
    path.write_text("".join(whole[:-1]))
    assert faults(path) == [f"summary.json knows of {len(whole)} {missing}"]
    path.write_text("".join(whole[:-3]))
    (tmp_path / "summary.json").unlink()
    assert cli.main(["ledger", "verify", str(tmp_path)]) == 1
    assert f"checkpoint step-000008 knows of {saved['lines']} {missing}" in capsys.readouterr().out
    third = begin(tmp_path, "three", saved, 8)
    (told,) = third.lines("resume")[-1]["killed"]
    assert told["attempt"] == "two", "the checkpoint knows what was paid for"
    assert third.meters.spent.device_seconds == saved["device_seconds"] + 3.0


@pytest.mark.parametrize("keep", ["device_seconds", "bytes"])
def test_lines_of_older_versions_that_were_cut_off(
    keep: str, tmp_path: Path, killed: dict[str, Any]
) -> None:
    path = tmp_path / "ledger.jsonl"
    if keep == "bytes":
        folder = tmp_path / "checkpoints" / "step-000002"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"meters": {"bytes": 10**6}}))
    else:
        (tmp_path / "summary.json").write_text(json.dumps({"device_seconds": 1000.0}))
    (fault,) = faults(path)
    assert "knows of 1,000" in fault
    assert fault.endswith("the ledger's last lines are missing")


def test_readers_go_on_behind_a_damaged_beginning(
    tmp_path: Path, killed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.jsonl"
    second = begin(tmp_path, "two", killed, 2)
    second.meters.stop("done")
    path.write_text(path.read_text().replace('{"event"', '{"evnet"', 1))
    assert [wall for wall, *_ in table(tmp_path)] == [50.0 - 39.0, 3.0]
    assert cli.main(["ledger", "show", str(path)]) == 0
    assert "2 to 4  1 device " in capsys.readouterr().out
    assert cli.main(["ledger", "export", str(path), "--out", str(tmp_path / "x.csv")]) == 0
    render([read_run(tmp_path)])
    begin(tmp_path, "three", killed, 2).meters.stop("done")
    assert [wall for wall, *_ in table(tmp_path)] == [11.0, 3.0, 3.0], "and the run goes on"
    path.write_text("oops\n\n")
    assert cli.main(["ledger", "show", str(path)]) == 2
    assert "holds no line that can be read; see kalmagrove ledger verify" in capsys.readouterr().err
    path.write_text("")
    assert cli.main(["ledger", "show", str(path)]) == 2
    assert "is empty: the run has not begun" in capsys.readouterr().err


def test_the_tables_fit_eighty_columns(
    tmp_path: Path, killed: dict[str, Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    begin(tmp_path, "two", killed, 2).meters.stop("done")
    assert cli.main(["ledger", "show", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines() if "ledger.jsonl" not in line)
    assert "1 core " in out
    assert "dev-hours" in out
    assert "…" not in out
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["ledger", "show", str(tmp_path)]) == 0
    assert "…" not in capsys.readouterr().out, "a terminal may wrap a row, no figure is cut"

"""Heartbeats: what a start leaves that dies, and since when one counts."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kalmagrove.config import BudgetReached, ConfigError, Interrupted, NonFiniteError
from kalmagrove.config import attempts as module
from kalmagrove.config.attempts import (
    FOLDER,
    VARIABLE,
    Attempt,
    Beat,
    Heartbeat,
    beats,
    forget,
    heartbeat,
    heartbeat_of_rank,
    process_age,
)

pytestmark = pytest.mark.unit


def test_it_beats_from_the_beginning_and_while_the_main_thread_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.002)
    attempt = Attempt.now(ago=7.0)
    with Heartbeat(tmp_path / "run", attempt, 2):
        (first,) = beats(tmp_path / "run")
        until = time.monotonic() + 20
        while beats(tmp_path / "run")[0].seconds == first.seconds:
            assert time.monotonic() < until
    assert (first.attempt, first.processes) == (attempt.name, 2)
    assert 7.0 <= first.seconds < 20


REFUSED = ConfigError("name", "one", "is being trained by another process", "give another name")


def end(beating: Heartbeat, error: BaseException | None) -> None:
    beating.__exit__(error and type(error), error, None)


@pytest.mark.parametrize("error", [None, Interrupted("a"), BudgetReached("b"), REFUSED])
def test_a_clean_end_leaves_nothing(tmp_path: Path, error: Exception | None) -> None:
    end(Heartbeat(tmp_path / "runs" / "one", Attempt.now(), 1).__enter__(), error)
    assert list(tmp_path.iterdir()) == [], "nor the folders that it made"


def test_what_another_one_made_or_left_stays(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, Attempt.now(), 1) as dead:
        dead.died = True
    with Heartbeat(tmp_path, Attempt.now(), 1):
        (tmp_path / "ledger.jsonl").touch()
    assert [beat.attempt for beat in beats(tmp_path)] == [dead.attempt.name]
    assert (tmp_path / "ledger.jsonl").exists()


@pytest.mark.parametrize("error", [NonFiniteError("a"), RuntimeError(), KeyboardInterrupt()])
def test_what_dies_leaves_how_long_it_went_on(tmp_path: Path, error: BaseException) -> None:
    dead = Heartbeat(tmp_path, Attempt.now(ago=3.0), 4).__enter__()
    time.sleep(0.02)
    end(dead, error)
    (beat,) = beats(tmp_path)
    assert beat == Beat(dead.attempt.name, beat.seconds, 4)
    assert beat.seconds >= 3.02
    (tmp_path / FOLDER / f".{beat.attempt}.123").touch()
    forget(tmp_path, [beat.attempt, "unknown"])
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_another_try_begins_where_the_one_before_has_ended(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, Attempt.now(ago=5.0), 1) as beating:
        first, name = beating.attempt.age, beating.attempt.name
        beating.again()
        assert beating.attempt.age < 5.0
        left = {beat.attempt: beat.seconds for beat in beats(tmp_path)}
    assert left[name] >= first - 0.001
    assert len(left) == 2
    assert [beat.attempt for beat in beats(tmp_path)] == [name]


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Heartbeat(tmp_path / "file" / "run", Attempt.now(), 1) as beating:
        beating.died = True
    assert beats(tmp_path / "file" / "run") == []


def test_a_damaged_beat_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "abc").write_text("")
    assert beats(tmp_path) == []
    assert f"{FOLDER}/abc cannot be read: for how long that start went on" in caplog.text


def test_processes_of_one_machine_share_a_start(tmp_path: Path) -> None:
    attempt = Attempt.now(ago=100.0)
    code = (
        "import os; from kalmagrove.config.attempts import Attempt; "
        "print(Attempt.given(os.environ).age)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **attempt.environment},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert 100.0 < float(told) <= attempt.age + 0.001


@pytest.mark.parametrize("told", ["", "name", "name:other-machine:12.5", "name:{}:soon"])
def test_another_machines_start_is_none_of_this_one(told: str) -> None:
    assert Attempt.given({VARIABLE: told.format(Attempt.now().machine)}) is None


def test_who_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run's processes one: a launcher's parent, else rank 0."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def left(rank: int, finished: bool = False) -> tuple[int, Attempt]:
        with heartbeat_of_rank(tmp_path / "run", rank, 2, finished=finished) as beating:
            return len(beats(tmp_path / "run")), beating.attempt

    assert [left(rank)[0] for rank in (0, 1)] == [1, 0], "started by torchrun"
    assert left(0, finished=True)[0] == 0
    assert left(0)[1].age >= process_age() - 0.1
    parent = Attempt.now(ago=40.0)
    monkeypatch.setenv(VARIABLE, parent.environment[VARIABLE])
    count, attempt = left(0)
    assert (count, attempt.name) == (0, parent.name), "started by kalmagrove train"
    assert attempt.began == pytest.approx(parent.began, abs=0.001)
    monkeypatch.setenv(VARIABLE, f":{parent.machine}:{parent.began}")
    count, attempt = left(0)
    assert (count, attempt.began) == (1, parent.began), "started by a batch script"
    assert attempt.name
    assert heartbeat(tmp_path, 1).attempt.began == parent.began, "one process in a job"
    assert heartbeat(tmp_path, 1, since=0.0).attempt.age < 10, "one run of a sweep"


def test_the_age_of_this_process_is_plausible() -> None:
    before = process_age()
    time.sleep(0.05)
    if before == 0.0:
        pytest.skip("no /proc on this system")
    assert 0.02 < process_age() - before < 5
    assert before < 24 * 3600

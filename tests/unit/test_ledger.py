"""The ledger: whole lines only, resume arithmetic, lost work."""

import json
import resource
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.config import KalmaGroveError
from kalmagrove.track import Ledger, Spent, read_history
from kalmagrove.track.audit import faults

pytestmark = pytest.mark.unit

NOTHING_LOST = {"lost_steps": 0, "lost_tokens": 0, "lost_device_seconds": 0.0}


def spent(seconds: float) -> Spent:
    return Spent(seconds, Decimal(str(seconds)) / 100)


def open_ledger(path: Path) -> Ledger:
    return Ledger(path, clock=lambda: 12.0, now=lambda: datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


def write_run(path: Path) -> Ledger:
    """Steps 1..4 with a checkpoint at 2, as if killed after step 4."""
    ledger = open_ledger(path)
    ledger.write("start", 0, 0, spent(1), **NOTHING_LOST)
    for step in range(1, 5):
        ledger.write("step", step, step * 10, spent(step * 10), loss=9.0 - step)
        if step == 2:
            ledger.write("checkpoint", 2, 20, spent(25), path="c")
    return ledger


def test_a_line_holds_time_place_and_cost(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "ledger.jsonl")
    ledger.write("step", 3, 30, Spent(1.5, None, 0.75), loss=float("nan"))
    assert json.loads((tmp_path / "ledger.jsonl").read_text()) == {
        "event": "step",
        "time": "2026-01-02T03:04:05.000+00:00",
        "mono": 12.0,
        "step": 3,
        "tokens": 30,
        "device_seconds": 1.5,
        "wall_seconds": 0.75,
        "usd": None,
        "loss": None,
        "digest": "3a16ee833d9a",
    }


@pytest.mark.parametrize("torn", [b'{"event": "st', b"\0\0\0", b"7\n", b'{"event": "step"\n'])
def test_a_torn_last_line_is_ignored_and_then_repaired(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    write_run(path).close()
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_history(path).lines) == 6
    ledger = open_ledger(path)
    assert (ledger.lines, ledger.bytes) == (6, len(whole))
    ledger.write("stop", 4, 40, spent(50), status="done")
    assert path.read_bytes().startswith(whole)
    assert [line["event"] for line in read_history(path).lines][-2:] == ["step", "stop"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_run(path).close()
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    ledger = open_ledger(path)
    ledger.write("step", 5, 50, spent(50), loss=4.0)
    assert [line["step"] for line in ledger.series("step")] == [1, 2, 3, 4, 5]


def changed(lines: list[bytes], number: int, old: bytes, new: bytes) -> list[bytes]:
    assert lines[number - 1].count(old) == 1
    return [*lines[: number - 1], lines[number - 1].replace(old, new), *lines[number:]]


@pytest.mark.parametrize(
    ("damage", "left_out"),
    [
        (lambda lines: [lines[0], b"oops\n", *lines[1:]], [2]),
        (lambda lines: changed(lines, 2, b'"loss": 8', b'"loss": 0'), [2]),
        (lambda lines: changed(lines, 3, b'"usd": 0.2', b'"usd": 9.2'), [3]),
        (lambda lines: changed(lines, 3, b'"step": 2', b'"stex": 2'), [3]),
        (lambda lines: changed(lines, 3, b'{"event', b"{ event"), [3]),
        (lambda lines: changed(lines, 4, b'"path": "c"', b'"path": "\xff"'), [4]),
        (lambda lines: changed(lines, 1, b'"start"', b'"strrt"'), [1]),
        (lambda lines: [*lines[:1], lines[1][:-5] + b"0" + lines[1][-4:], *lines[2:]], [2]),
        (lambda lines: [*lines[:2], *lines[3:]], [3]),
        (lambda lines: [*lines[:1], lines[1].rstrip() + lines[2], *lines[3:]], [2]),
    ],
)
def test_damage_is_left_out_named_and_kept_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, left_out: list[int]
) -> None:
    path = tmp_path / "ledger.jsonl"
    write_run(path).close()
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damage(whole)))
    spoilt = path.read_bytes()
    numbered = enumerate(spoilt.splitlines(keepends=True), start=1)
    kept = [json.loads(text) for number, text in numbered if number not in left_out]
    read = list(read_history(path).lines)
    assert read[int(1 in left_out) :] == kept
    assert read[0]["event"] == "start", "a session has a beginning, if the file has none"
    said = f"{path}: 1 damaged or changed lines are left out ({left_out[0]}), the file is as it was"
    assert said in caplog.text
    ledger = open_ledger(path)
    ledger.write("resume", 2, 20, spent(41), **NOTHING_LOST)
    ledger.close()
    assert path.read_bytes().startswith(spoilt)
    assert read_history(path).lines[-1]["event"] == "resume"
    named = [fault for fault in faults(path) if "no ledger line" in fault or "changed" in fault]
    assert named[0].startswith(f"line {left_out[0]} ")
    assert not any(f"line {len(kept) + 2} " in fault for fault in named), "the new line is whole"


def test_half_a_line_is_taken_back(tmp_path: Path) -> None:
    """A disk that takes the first bytes of a line, and then none."""
    ledger = write_run(tmp_path / "ledger.jsonl")
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), ledger.bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        with pytest.raises(KalmaGroveError, match="the ledger cannot be written"):
            ledger.write("step", 5, 50, spent(50), loss=4.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ledger.path.stat().st_size == size
    ledger.write("stop", 5, 50, spent(51), status="failed")
    assert faults(ledger.path) == []
    assert [line["event"] for line in ledger.history().lines[-2:]] == ["step", "stop"]


def test_resume_replaces_history_but_not_cost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_run(path).close()
    before = path.read_bytes()
    ledger = open_ledger(path)
    lost = {"lost_steps": 2, "lost_tokens": 20, "lost_device_seconds": 15.0}
    ledger.write("resume", 2, 20, spent(41), **lost)
    assert [line["loss"] for line in ledger.series("step")] == [8.0, 7.0]
    ledger.write("step", 3, 30, spent(51), loss=1.0)
    history = ledger.history()
    assert [(line["step"], line["loss"]) for line in history.series("step")] == [
        (1, 8.0),
        (2, 7.0),
        (3, 1.0),
    ]
    assert path.read_bytes().startswith(before), "lines are never removed"
    assert history.spent == spent(51)
    assert (history.lost.steps, history.lost.tokens, history.lost.device_seconds) == (2, 20, 15.0)
    assert history.sessions == 2
    assert history.reached == (3, 30)


def test_starting_again_at_step_0_makes_all_of_it_lost_history(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "ledger.jsonl")
    ledger.write("start", 0, 0, spent(41), **NOTHING_LOST)
    assert ledger.series("step") == []


def test_of_two_lines_for_a_step_the_later_counts(tmp_path: Path) -> None:
    ledger = write_run(tmp_path / "ledger.jsonl")
    ledger.write("step", 4, 40, spent(41), loss=0.5)
    assert [line["loss"] for line in ledger.series("step")] == [8.0, 7.0, 6.0, 0.5]


def test_a_full_disk_is_a_clear_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    ledger = Ledger.__new__(Ledger)
    ledger.path, ledger._file = full, full.open("ab", buffering=0)
    ledger._digest, ledger.bytes = "", 0
    ledger._clock, ledger._now = (lambda: 0.0), (lambda: datetime.now(UTC))
    with pytest.raises(KalmaGroveError, match=r"cannot be written \(No space left on device\)"):
        ledger.write("step", 1, 1, spent(1))

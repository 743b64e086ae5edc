"""A rank that no longer gets on writes down where it stands and ends; others do not."""

import time
from pathlib import Path

import pytest

from kalmagrove.config import Launch
from kalmagrove.engine import watchdog
from kalmagrove.engine.watchdog import Progress, Watchdog, told
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit


def test_who_stands_where() -> None:
    places = dict.fromkeys((0, 2, 3, 4, 6), (7, "forward")) | {1: (7, "data"), 5: (6, "report")}
    assert told(places, 9, 600) == (
        "hung: no progress in 600 s; ranks 7, 8 do not answer; rank 5 in report of step 6; "
        "rank 1 in data of step 7; ranks 0, 2 to 4, 6 in forward of step 7"
    )


def test_progress() -> None:
    progress = Progress()
    seen = []
    for phase, step in (("data", 1), ("forward", None), ("forward", None), ("data", 2)):
        progress.at(phase, step)
        seen.append((progress.place.phase, progress.place.step, progress.place.first))
    assert seen == [
        ("data", 1, True), ("forward", 1, True), ("forward", 1, True), ("data", 2, False),
    ]  # fmt: skip


class Guarded(Watchdog):
    """Whose process does not end: the codes are kept, and what rank 0 would write down."""

    def __init__(self, folder: Path, limit: float | None) -> None:
        self.codes: list[int] = []
        self.said: list[str] = []
        launch = Launch(hang_timeout=None if limit is None else 1, timeout=3600)
        super().__init__(Progress(), launch, Groups.single(), folder, self.said.append)
        self._limit = limit  # type: ignore[assignment]

    def end(self, code: int) -> None:
        self.codes.append(code)
        self._stop.set()


def test_a_phase_that_takes_too_long_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dog = Guarded(tmp_path, limit=0.05)
    monkeypatch.setattr(watchdog.os, "_exit", dog.end)
    with dog:
        for phase in ("forward", "data", "forward"):
            dog._progress.at(phase, 3)
        while not dog.codes:
            time.sleep(0.01)
    assert dog.codes == [77]
    (folder,) = (tmp_path / "stacks").iterdir()
    text = (folder / "rank-0.txt").read_text()
    assert text.startswith("rank 0: step 3, forward, for 0 s (")
    assert "in test_a_phase_that_takes_too_long_ends_the_process" in text, "the main thread's stack"
    (said,) = dog.said
    assert said == f"hung: no progress in 0.05 s; rank 0 in forward of step 3; stacks: {folder}"
    assert (folder / "report.txt").read_text() == said + "\n"
    assert capsys.readouterr().err == f"kalmagrove: {said}\n"


@pytest.mark.parametrize("phase", ["start", "forward", "checkpoint"])
def test_first_times_and_saves_have_as_long_as_collectives(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dog = Guarded(tmp_path, limit=0.02)
    monkeypatch.setattr(watchdog.os, "_exit", dog.end)
    with dog:
        if phase == "checkpoint":
            for other in ("checkpoint", "data"):
                dog._progress.at(other)
        dog._progress.at(phase)
        time.sleep(0.1)
    assert dog.codes == []
    assert not (tmp_path / "stacks").exists()


def test_none_is_no_limit(tmp_path: Path) -> None:
    with Guarded(tmp_path, limit=None) as dog:
        assert not dog._thread.is_alive()

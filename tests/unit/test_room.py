"""Room for checkpoints: what a disk must hold, and what is said if it does not."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import make_run

from kalmagrove.config import CheckpointError, ConfigError
from kalmagrove.engine import room
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit


def look(monkeypatch: pytest.MonkeyPatch, folder: Path, free: int | None, step: int = 0) -> None:
    """Before a run of 8 steps with checkpoints of 1 kB every two, of which two are kept."""
    run = make_run(checkpoint={"every": 2, "keep": 2})
    engine: Any = SimpleNamespace(run=run, groups=Groups.single())
    monkeypatch.setattr(room, "checkpoint_bytes", lambda _: 1000)
    monkeypatch.setattr(room, "free_bytes", lambda _: free)
    room.check_room(engine, folder, step)


@pytest.mark.parametrize(
    ("free", "step", "there", "more"),
    [
        (3000, 0, 0, None),
        (2999, 0, 0, 3),
        (1999, 0, 1, 2),
        (1000, 4, 2, None),
        (1000, 6, 0, None),
        (1999, 4, 0, 2),
        (0, 8, 2, None),
        (None, 0, 0, None),
    ],
)
def test_what_will_lie_there_at_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    free: int | None,
    step: int,
    there: int,
    more: int | None,
) -> None:
    for number in range(there):
        (tmp_path / f"step-{number:06d}").mkdir()
    with caplog.at_level(logging.WARNING):
        look(monkeypatch, tmp_path, free, step)
    said = [record.getMessage() for record in caplog.records]
    if more is None:
        assert said == []
    else:
        assert f"are free, but {more} more checkpoints of 1.0 kB will lie there at once" in said[0]


def test_no_room_for_one_is_an_error_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = "dir=runs has no room for a checkpoint: one takes 1.0 kB, 999 bytes are free; free"
    with pytest.raises(ConfigError, match=expected):
        look(monkeypatch, tmp_path, 999)


def test_a_save_looks_at_the_disk_itself(tmp_path: Path) -> None:
    free = room.free_bytes(tmp_path)
    assert free is not None
    room.need_room(tmp_path, 0)
    with pytest.raises(CheckpointError, match=r"it takes .* TB, and .* are free"):
        room.need_room(tmp_path, 10**18)

"""The end of a training: written down whatever happens, without hiding why it ended."""

import contextlib
import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import make_run

from kalmagrove.config import BudgetReached, Interrupted, NonFiniteError
from kalmagrove.engine import loop
from kalmagrove.engine.checkpoint import State
from kalmagrove.engine.watchdog import Progress
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit


class Meters:
    def __init__(self, broken: bool = False) -> None:
        self.broken, self.ends = broken, []

    def start(self, step: int, tokens: int) -> None:
        """Nothing to open."""

    def stop(self, status: str, **facts: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, for another rank has left
        if self.broken:
            raise OSError("No space left on device")
        self.ends.append((status, facts.get("reason")))


def ended(
    monkeypatch: pytest.MonkeyPatch, meters: Meters, result: float | BaseException
) -> list[str]:
    """Fit with a `_train` that gives `result`; returns the barriers passed."""
    barriers: list[str] = []

    def train(*_: Any) -> float:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(loop, "_train", train)
    monkeypatch.setattr(loop, "barrier", lambda _: barriers.append(f"{len(meters.ends)} ends"))
    engine = SimpleNamespace(groups=Groups.single(), nonfinite_total=0, progress=Progress())
    state = State(Path("checkpoints"), step=3, saved=3)
    raises = isinstance(result, BaseException)
    with pytest.raises(type(result)) if raises else contextlib.nullcontext() as raised:
        loop.fit(engine, None, [], meters, state, make_run())  # type: ignore[arg-type]
    assert not raises or raised.value is result
    return barriers


@pytest.mark.parametrize(
    ("result", "end", "barriers"),
    [
        (2.5, ("done", None), 1),
        (Interrupted("asked"), ("stopped", None), 1),
        (BudgetReached("spent"), ("budget", "spent"), 1),
        (NonFiniteError("bad"), ("failed", "NonFiniteError: bad"), 1),
        (RuntimeError("one rank's"), ("failed", "RuntimeError: one rank's"), 0),
    ],
)
def test_what_all_ranks_know_is_closed_before_any_of_them_leaves(
    monkeypatch: pytest.MonkeyPatch, result: Any, end: tuple[str, str | None], barriers: int
) -> None:
    meters = Meters()
    assert ended(monkeypatch, meters, result) == ["1 ends"] * barriers
    assert meters.ends == [end]


def test_a_full_disk_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert len(ended(monkeypatch, Meters(broken=True), NonFiniteError("bad"))) == 1
    assert "could not be written down: No space left on device" in caplog.text


def test_a_run_that_no_cap_can_keep_is_not_told_to_raise_it(tmp_path: Path) -> None:
    engine = SimpleNamespace(groups=Groups.single())
    meters = SimpleNamespace(over_budget=lambda: ("what it has cost is unknown", "budget.usd=null"))
    said = "unknown, at step 3 of 8; nothing to save; the same command with budget.usd=null cont"
    with pytest.raises(BudgetReached, match=said):
        loop._train(engine, None, [], meters, State(tmp_path, step=3), make_run(), None, None)  # type: ignore[arg-type]


def test_how_a_stopped_run_is_continued() -> None:
    state = State(Path("runs/a-2/checkpoints"))
    assert loop._continued_by(state, make_run()) == "the same command"
    again = loop._continued_by(state, make_run(checkpoint={"resume": "never"}))
    assert again == "the same command with name=a-2 checkpoint.resume=auto"

"""Meters with a clock of their own: averages, cost, resume, and who is told what."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from tiny_run import make_run
from torch import Tensor

from kalmagrove.config import Run
from kalmagrove.config.attempts import Attempt
from kalmagrove.parallel import Groups
from kalmagrove.track import GridRefit, Meters, StepRecord, build_meters, read_history
from kalmagrove.track.audit import faults
from kalmagrove.track.energy import Energy
from kalmagrove.track.model_metrics import split_metrics, to_scalars

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def add(self, seconds: float) -> None:
        self.time += seconds


class Session:
    """One process's part of a run: 2 s a step, one core."""

    def __init__(
        self,
        run_dir: Path,
        run: Run | None = None,
        clock: Clock | None = None,
        energy: Energy | None = None,
        attempt: str | None = None,
    ) -> None:
        self.run, self.clock, self.out = run or make_run(), clock or Clock(), io.StringIO()
        self.path, self.done = run_dir, 0
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.meters: Meters = build_meters(
            self.run,
            run_dir,
            Groups.single(),
            params_total=100,
            params_active=60,
            flops_per_token=1e9,
            forward_flops_per_token=2.5e8,
            val_bytes_per_token=4.0,
            baselines={"unigram_nats": 6.0, "bigram_nats": 4.5},
            energy=energy,
            attempt=Attempt(attempt, "", 0.0) if attempt else None,
            started=self.clock(),
            clock=self.clock,
            now=lambda: self.now(),
            screen=RichConsole(file=self.out, width=200),
        )

    def step(self, number: int, loss: float = 3.0, **more: Any) -> None:
        self.clock.add(2.0)
        self.done += 1
        done = self.done
        record = StepRecord(
            step=number,
            tokens=16 * number,
            loss=torch.tensor(loss),
            grad_norm=torch.tensor(0.5),
            lr=1e-3,
            seconds=lambda: {"data": 0.25 * done, "forward": 1.5 * done},
        )
        self.meters.step(replace(record, **more))

    def lines(self, event: str) -> list[dict[str, Any]]:
        lines = read_history(self.path / "ledger.jsonl").lines
        return [line for line in lines if line["event"] == event]


@pytest.fixture(autouse=True)
def _one_core() -> None:
    assert torch.get_num_threads() == 1, "these tests reckon with one core"


def test_a_line_averages_the_steps_since_the_last(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.clock.add(5.0)  # building the model
    session.meters.start(0, 0)
    for number, loss in enumerate([5.0, 4.0, 3.0], start=1):
        session.step(number, loss)
    (line,) = session.lines("step")
    assert (line["step"], line["tokens"], line["loss"], line["averaged"]) == (2, 32, 4.5, 2)
    assert (line["lr"], line["grad_norm"]) == (1e-3, 0.5)
    assert line["tokens_per_s"] == 8.0
    assert line["step_seconds"] == 2.0
    assert line["seconds_split"] == {"data": 0.5, "forward": 3.0}
    assert line["peak_memory"] > 2**20
    assert line["mfu"] is line["hfu"] is None, "no peak is known for a CPU"
    assert line["tokens_per_s_device"] * session.lines("start")[0]["devices"] == pytest.approx(8.0)
    session.step(4, 2.0)
    assert session.lines("step")[-1]["loss"] == 2.5


def test_opening_the_sinks_is_part_of_starting_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("kalmagrove.track.meters.open_sinks", lambda *_: clock.add(3.0) or [])
    session = Session(tmp_path, clock=clock, energy=Energy(lambda: 10 * clock.time))
    session.clock.add(5.0)
    session.meters.start(0, 0)
    session.step(1)
    session.step(2)
    session.meters.stop("done")
    (start,), (stop,) = session.lines("start"), session.lines("stop")
    assert (start["phases"]["startup"], start["phases"]["idle"]) == (5.0, 0.0)
    assert (stop["phases"]["startup"], sum(stop["phases"].values())) == (8.0, 12.0)
    assert (stop["phase_joules"]["startup"], stop["phase_joules"]["training"]) == (80.0, 40.0)
    assert session.lines("step")[0]["tokens_per_s"] == 8.0
    assert faults(tmp_path / "ledger.jsonl") == []


def test_cost_counts_from_the_start_and_projects_to_the_end(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.clock.add(5.0)
    session.meters.start(0, 0)
    for number in range(1, 5):
        session.step(number)
    line = session.lines("step")[-1]
    assert line["device_seconds"] == 13.0
    assert line["usd"] == 0.13
    assert line["seconds_left"] == 8.0
    assert line["usd_projected"] == 0.21
    assert "$0.13 (of $0.21)" in session.out.getvalue()


def test_without_a_price_dollars_are_null(tmp_path: Path) -> None:
    session = Session(tmp_path, make_run(price={"usd_per_core_hour": None}))
    session.meters.start(0, 0)
    for number in range(1, 5):
        session.step(number)
    session.meters.stop("done")
    assert all(line["usd"] is None for line in read_history(tmp_path / "ledger.jsonl").lines)
    assert session.lines("step")[-1]["usd_projected"] is None
    assert session.lines("step")[-1]["device_seconds"] == 8.0
    assert "unknown price" in session.out.getvalue()
    assert "$" not in session.out.getvalue()
    assert json.loads((tmp_path / "summary.json").read_text())["usd"] is None


def test_pauses_are_paid_but_not_counted_as_training(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1)
    session.clock.add(10.0)
    session.meters.evaluated(1, 16, 3.5, 700)
    session.clock.add(7.0)
    session.meters.checkpointed(1, 16, tmp_path / "checkpoints" / "step-1", 6.9)
    session.step(2)
    assert [line["tokens_per_s"] for line in session.lines("step")] == [8.0, 8.0]
    (val,) = session.lines("eval")
    assert (val["seconds"], val["val_loss"]) == (10.0, 3.5)
    assert math.isclose(val["val_bits_per_byte"], 3.5 / math.log(2) / 4)
    (saved,) = session.lines("checkpoint")
    assert (saved["seconds"], saved["path"]) == (6.9, "checkpoints/step-1")
    assert session.lines("step")[-1]["device_seconds"] == 21.0


def test_a_pause_that_nothing_explains_is_idle(tmp_path: Path) -> None:
    """As between two calls of `pause`, while a profile is written."""
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1)
    session.meters.pause()
    session.clock.add(10.0)
    session.meters.pause()
    session.step(2)
    (line,) = session.lines("step")
    assert (line["tokens_per_s"], line["train_seconds"]) == (8.0, 4.0)
    assert (sum(line["phases"].values()), line["phases"]["idle"]) == (14.0, 10.5), "0.5 are steps'"


def test_a_refit_is_one_line_that_names_its_grids(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1)
    session.meters.refitted(1, 16, {"0.shared": GridRefit(0.25, 0.001, 1e-4)})
    (line,) = session.lines("refit")
    assert (line["step"], line["tokens"]) == (1, 16)
    assert line["grids"] == {"0.shared": {"before": 0.25, "after": 0.001, "error": 1e-4}}
    assert "refitted grid of layer 0.shared: out of range 25.0% -> 0.1%" in session.out.getvalue()


def test_a_skipped_step_does_not_poison_the_average(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1, 4.0)
    session.step(2, math.nan, skipped=True, grad_norm=math.inf)
    session.meters.skipped(2, "loss is nan")
    (line,) = session.lines("step")
    assert (line["loss"], line["skipped"], line["averaged"], line["grad_norm"]) == (4.0, 1, 1, 0.5)
    assert session.lines("skip")[0]["reason"] == "loss is nan"
    for number in (3, 4):
        session.step(number, math.nan, skipped=True)
    assert session.lines("step")[-1]["loss"] is None


def test_nothing_is_fetched_between_lines(tmp_path: Path) -> None:
    asked = []

    def metrics() -> dict[str, Tensor]:
        asked.append(1)
        return {"load": torch.tensor([1.0, 3.0]), "out_of_range": torch.tensor(0.25)}

    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1, model_metrics=metrics)
    assert not asked
    session.step(2, model_metrics=metrics)
    assert len(asked) == 1
    (line,) = session.lines("step")
    assert (line["load_cv"], line["out_of_range"]) == (0.5, 0.25)
    assert line["model"] == {"load_cv": 0.5, "load_max": 1.5, "out_of_range": 0.25}


def test_an_auxiliary_loss_is_named_where_there_is_one(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    for step, aux_loss in ((2, 0.0), (4, 0.25)):
        session.step(step, model_metrics={"aux_loss": torch.tensor(aux_loss)}.copy)
    assert [line["model"] for line in session.lines("step")] == [{}, {"aux_loss": 0.25}]


def test_a_held_out_loss_that_is_not_finite_is_shown_and_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(2)
    session.meters.evaluated(2, 32, math.nan, 700)
    session.meters.stop("done")
    assert [r.message for r in caplog.records] == ["the held-out loss at step 2 is nan"]
    assert "val - nats  (0.0 s)" in session.out.getvalue()
    assert json.loads((tmp_path / "summary.json").read_text())["val_loss_nats"] is None


def test_metrics_become_scalars() -> None:
    means, largest = split_metrics(
        {
            "0.load": torch.tensor([2.0, 2.0]),
            "1.load": torch.tensor([0.0, 4.0]),
            "0.time_constant": torch.tensor([4.0, 8.0]),
            "1.time_constant": torch.tensor([16.0]),  # a rank with one head
            "1.dropped": torch.tensor(0.25),
        }
    )
    assert largest == {"0.time_constant_max": 8.0, "1.time_constant_max": 16.0}
    assert to_scalars(means | largest) == {
        "0.load_cv": 0.0, "0.load_max": 1.0, "1.load_cv": 1.0, "1.load_max": 2.0,
        "load_cv": 0.5, "load_max": 1.5,
        "0.time_constant_mean": 6.0, "0.time_constant_max": 8.0,
        "1.time_constant_mean": 16.0, "1.time_constant_max": 16.0,
        "time_constant_mean": 11.0, "time_constant_max": 12.0,
        "1.dropped": 0.25, "dropped": 0.25,
    }  # fmt: skip
    own = {"load": torch.tensor([0.0, 4.0]), "load_cv": torch.tensor(0.25)}
    assert to_scalars(own) == {"load_cv": 1.0, "load_max": 2.0}, "a rank's is of its own tokens"
    assert to_scalars({"load": torch.zeros(4)}) == {}, "nothing was routed"


def test_communication_is_told_apart_from_the_model(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    sent = {"alltoall_bytes": torch.tensor(1e6)}
    for number in range(1, 5):
        seconds = {"forward": 1.0 * number, "alltoall": 0.25 * number + (number > 2)}
        metrics = {**sent, "0.dropped": torch.tensor(0.125)}
        session.step(number, model_metrics=metrics.copy, seconds=seconds.copy)
    session.step(6)
    first, second, third = session.lines("step")
    assert first["comm"] == {"alltoall_bytes": 1e6, "alltoall_seconds": 0.25}, "a step"
    assert second["comm"]["alltoall_seconds"] == 0.75
    assert second["seconds_split"] == {"forward": 2.0, "alltoall": 1.5}, "all of them"
    assert second["phases"]["alltoall"] == 2.0
    assert first["model"] == {"0.dropped": 0.125, "dropped": 0.125}
    assert (third["comm"], third["model"]) == ({}, {})


def kill_and_resume(tmp_path: Path) -> Session:
    """Steps 1..4, saved at 2, killed in step 5; an hour later continued to the end."""
    first = Session(tmp_path)
    first.meters.start(0, 0)
    first.step(1)
    first.step(2, 2.5)
    saved = json.loads(json.dumps(first.meters.state_dict()))
    first.clock.add(1.0)
    first.meters.checkpointed(2, 32, tmp_path / "c", 1.0)
    first.step(3, 9.0)
    first.step(4, 9.0)
    clock = Clock()
    clock.add(3600)
    second = Session(tmp_path, clock=clock)
    second.meters.load_state_dict(saved)
    second.clock.add(3.0)
    second.meters.start(2, 32)
    return second


def test_resume_names_the_lost_work_and_keeps_paying_for_it(tmp_path: Path) -> None:
    session = kill_and_resume(tmp_path)
    (line,) = session.lines("resume")
    assert (line["step"], line["lost_steps"], line["lost_tokens"]) == (2, 2, 32)
    assert line["lost_device_seconds"] == 5.0, "from the save at 4 s to the last line at 9 s"
    assert line["device_seconds"] == 12.0, "9 of the first session, 3 of this"
    for number in range(3, 9):
        session.step(number, 1.0)
    session.meters.stop("done", step=8)
    history = read_history(tmp_path / "ledger.jsonl")
    assert [(x["step"], x["loss"]) for x in history.series("step")] == [
        (2, 2.75), (4, 1.0), (6, 1.0), (8, 1.0),
    ]  # fmt: skip
    assert history.spent.device_seconds == 24.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["device_seconds"], summary["usd"]) == (24.0, 0.24)
    assert (summary["lost_steps"], summary["lost_device_seconds"]) == (2, 5.0)
    assert summary["sessions"] == 2


def test_the_same_checkpoint_lost_twice_is_not_charged_twice(tmp_path: Path) -> None:
    session = kill_and_resume(tmp_path)
    session.step(3)
    session.step(4)  # 3 + 4 s of work after the checkpoint, and killed again
    third = Session(tmp_path, clock=session.clock)
    third.meters.load_state_dict({**session.meters.state_dict(), **FIRST_SAVE})
    third.meters.start(2, 32)
    assert [line["lost_device_seconds"] for line in third.lines("resume")] == [5.0, 7.0]
    assert read_history(tmp_path / "ledger.jsonl").lost.steps == 4


FIRST_SAVE = {"device_seconds": 4.0, "lost_device_seconds": 0.0}


def test_a_checkpoint_remembers_what_was_lost_before_it(tmp_path: Path) -> None:
    session = kill_and_resume(tmp_path)
    session.step(3)
    session.step(4)
    saved = session.meters.state_dict()
    assert (saved["device_seconds"], saved["lost_device_seconds"]) == (16.0, 5.0)
    session.step(5)
    session.step(6)
    third = Session(tmp_path, clock=session.clock)
    third.meters.load_state_dict(saved)
    third.meters.start(4, 64)
    assert [line["lost_device_seconds"] for line in third.lines("resume")] == [5.0, 4.0]


def test_killed_before_any_checkpoint_all_is_lost(tmp_path: Path) -> None:
    first = Session(tmp_path)
    first.meters.start(0, 0)
    first.step(1)
    first.step(2)
    second = Session(tmp_path)
    second.meters.start(0, 0)
    line = second.lines("start")[-1]
    assert (line["lost_steps"], line["lost_device_seconds"]) == (2, 4.0)
    assert line["device_seconds"] == 4.0


def test_a_checkpoint_of_another_folder_brings_its_cost(tmp_path: Path) -> None:
    first = Session(tmp_path / "a")
    first.meters.start(0, 0)
    first.step(1)
    first.step(2)
    second = Session(tmp_path / "b")
    second.meters.load_state_dict(first.meters.state_dict())
    second.meters.start(2, 32)
    (line,) = second.lines("resume")
    assert (line["device_seconds"], line["usd"], line["lost_steps"]) == (4.0, 0.04, 0)


def test_lines_after_a_resume_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """The checkpoint at step 3 falls between two lines."""

    def train(session: Session, first: int) -> None:
        for number in range(first, 9):
            session.step(number, loss=1.0 / number)
            if number == 3:
                session.meters.checkpointed(3, 48, tmp_path, 0.0)

    whole = Session(tmp_path / "whole")
    whole.meters.start(0, 0)
    train(whole, 1)
    cut = Session(tmp_path / "cut")
    cut.meters.start(0, 0)
    for number in range(1, 4):
        cut.step(number, loss=1.0 / number)
    state = cut.meters.state_dict()
    cut.meters.checkpointed(3, 48, tmp_path, 0.0)
    cut.step(4, loss=99.0)
    again = Session(tmp_path / "cut")
    again.meters.load_state_dict(state)
    again.meters.start(3, 48)
    train(again, 4)

    def series(name: str) -> list[tuple[int, float]]:
        history = read_history(tmp_path / name / "ledger.jsonl")
        return [(line["step"], line["loss"]) for line in history.series("step")]

    assert series("cut") == series("whole")
    assert [step for step, _ in series("whole")] == [2, 3, 4, 6, 8]


def test_stop_closes_the_averages_once(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1, 4.0)
    session.meters.stop("stopped", step=1)
    session.meters.stop("failed")
    assert session.lines("step")[-1]["loss"] == 4.0
    assert [line["status"] for line in session.lines("stop")] == ["stopped"]
    log = (tmp_path / "console.log").read_text()
    assert log == session.out.getvalue()
    assert "stopped  $0.02" in log


@pytest.mark.parametrize("status", ["failed", "hung"])
def test_a_failure_waits_for_no_other_rank(status: str, tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(1, 4.0)
    session.meters.stop(status, reason="too many non-finite steps")
    assert session.lines("step") == [], "averaging is a collective"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["reason"][:8]) == (status, "too many")


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    single = Groups.single()
    other = replace(single, world=replace(single.world, rank=1, size=2))
    meters = build_meters(
        make_run(), tmp_path, other, params_total=1, params_active=1, flops_per_token=1.0
    )
    meters.start(0, 0)
    meters.step(StepRecord(2, 32, torch.tensor(1.0), 0.1, 1e-3))
    meters.evaluated(2, 32, 1.0, 700)
    meters.checkpointed(2, 32, tmp_path, 0.1)
    meters.stop("done")
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_set_moves_neither_cost_nor_order(tmp_path: Path) -> None:
    """An hour back in the first session; a day ahead, after a reboot, in the second."""
    session, wall = Session(tmp_path), [datetime(2026, 1, 1, 12, tzinfo=UTC)]
    session.now = lambda: wall[0]
    for hours, steps in ((-1, range(1, 5)), (24, range(5, 9))):
        session.meters.start(steps[0] - 1, 16 * (steps[0] - 1))
        for step in steps:
            session.step(step)
            if step == steps[2]:
                wall[0] += timedelta(hours=hours)
        session.meters.checkpointed(step, 16 * step, tmp_path / "step", 0.0)
        kept = session.meters.state_dict()
        session.meters.stop("stopped")
        rebooted = Clock()
        rebooted.time = 5.0  # it counts from the machine's start
        session = Session(tmp_path, clock=rebooted)
        session.now = lambda: wall[0]
        session.meters.load_state_dict(kept)
    history = read_history(tmp_path / "ledger.jsonl")
    assert history.spent.wall_seconds == pytest.approx(8 * 2.0)
    times = [line["time"] for line in history.lines]
    assert times != sorted(times), "the clock was set back"
    assert faults(tmp_path / "ledger.jsonl") == []


def test_the_clock_starts_with_the_process(tmp_path: Path) -> None:
    meters = build_meters(
        make_run(), tmp_path, Groups.single(), params_total=1, params_active=1, flops_per_token=1.0
    )
    if not Path("/proc/self/stat").exists():
        pytest.skip("the process's age is read from /proc")
    assert meters.spent.device_seconds > 0.2, "python and torch were imported before"

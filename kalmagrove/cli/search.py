"""The loop of a sweep: ask for trials, begin their runs, follow their ledgers, tell what came of
them. Whatever ends this process, the same command goes on: the study and the runs are on disk.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from kalmagrove.cli.runners import End, Runner
from kalmagrove.cli.study import Study, Trial, counted
from kalmagrove.config import BudgetReached, ConfigError, Interrupted, Search, Training
from kalmagrove.track import History, read_history

HOPELESS = 5  # trials that fail before any is done
METRIC = {"loss": "val_loss", "bits": "val_bits_per_byte"}  # of the ledger's evaluations


@dataclass
class Point:
    """A run, and the trials that are this run."""

    name: str
    folder: Path
    run: Training
    trials: list[int]


@dataclass
class Ledgers:
    """Of runs that go on: each is read again only when it has grown."""

    _read: dict[Path, tuple[int, History]] = field(default_factory=dict)

    def of(self, folder: Path) -> History:
        """Empty if there is no ledger yet."""
        path = folder / "ledger.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if size == 0:
            return History(())
        if folder not in self._read or self._read[folder][0] != size:
            self._read[folder] = size, read_history(path)
        return self._read[folder][1]


class Loop:
    """A sweep that goes on."""

    def __init__(
        self,
        search: Search,
        study: Study,
        runner: Runner,
        folder: Path,
        make: Callable[[Trial], Training],
        total: int,
        changed: Callable[[], None],
    ) -> None:
        """
        Args:
            folder: of the study, in which the runs are.
            make: the run of a trial; raises ConfigError if it cannot be.
            total: trials.
            changed: called when a trial has ended.
        """
        self._search, self._study, self._runner = search, study, runner
        self._folder, self._make, self._total, self._changed = folder, make, total, changed
        self._points: dict[str, Point] = {}
        self._waiting: list[str] = []
        self._going: set[str] = set()
        self._ledgers = Ledgers()
        self._metric = METRIC[search.measures[0]]
        self._failures = 0  # of this process
        self._codes: set[int] = set()  # of what ended without an end of its trial
        self._full = False  # a cap is reached
        self._asked = False  # to stop
        self._stopping = False  # no other run begins

    def run(self) -> int:
        """Until all trials have ended or none may begin; returns the exit code."""
        before = {n: signal.signal(n, self._heard) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._take_up()
            self._begin()
            while self._going and (self._runner.here or not self._asked):
                time.sleep(self._search.poll or self._runner.every)
                if self._asked and self._runner.here:
                    self._stop(before)
                for end in self._runner.ended():
                    self._settle(end)
                for name in sorted(self._going):
                    self._follow(self._points[name])
                self._begin()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._going:
            say("the jobs go on, and the same command finds them again; `kalmagrove jobs` too")
        return self._code()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._stopping = True

    def _stop(self, before: Mapping[signal.Signals, Any]) -> None:
        """Have all runs of this machine save and end; another signal then ends this process."""
        if signal.getsignal(signal.SIGINT) != self._heard:
            return
        say("stopping: the runs finish their step and save")
        for number, handler in before.items():
            signal.signal(number, handler)
        for name in sorted(self._going):
            self._runner.stop(self._points[name].folder)

    def _take_up(self) -> None:
        """What an earlier process left."""
        for trial in self._study.open():
            self._enter(trial)
        for name in list(self._waiting):
            point = self._points[name]
            if self._runner.goes_on(point.folder):
                self._start(name)
                if self._study.is_pruned(point.trials[0]):
                    self._runner.stop(point.folder)
            elif self._study.is_pruned(point.trials[0]):
                self._waiting.remove(name)
                self._tell(point, "pruned")
        if self._search.retry:
            self._study.retry()

    def _begin(self) -> None:
        """As many runs as there is room for; a new trial is asked for as late as possible."""
        while self._may_begin():
            if not self._waiting:
                if not self._study.left(self._total):
                    return
                if self._going and not self._room():
                    return
                self._enter(self._study.ask())
            elif self._runner.room(self._points[self._waiting[0]].run):
                self._start(self._waiting[0])
            else:
                return

    def _room(self) -> bool:
        """For a run like one of those that go on."""
        return self._runner.room(self._points[min(self._going)].run)

    def _may_begin(self) -> bool:
        return not (self._stopping or self._hopeless() or self._capped())

    def _hopeless(self) -> bool:
        if self._failures < HOPELESS or self._stopping:
            return False
        self._stopping = all(trial.state in ("failed", "open") for trial in self._study.trials)
        if self._stopping:
            say(f"{self._failures} trials have failed and none is done: no other begins")
        return self._stopping

    def _capped(self) -> bool:
        """Whether a cap of all trials is reached."""
        cap = self._search.cap
        if self._full or (cap.usd is None and cap.hours is None):
            return self._full
        folders = {self._folder / trial.name for trial in self._study.trials}
        spent = [self._ledgers.of(folder).spent for folder in folders]
        hours = sum(one.wall_seconds for one in spent) / 3600
        known = [float(one.usd) for one in spent if one.usd is not None]
        if cap.hours is not None and hours >= cap.hours:
            why = f"cap.hours={cap.hours:g} is reached: {hours:.2f} hours are used"
        elif cap.usd is not None and len(known) < len(spent):
            why = f"cap.usd={cap.usd:g} cannot be kept: what a trial has cost is unknown"
        elif cap.usd is not None and sum(known) >= cap.usd:
            why = f"cap.usd={cap.usd:g} is reached: ${sum(known):,.4g} are spent"
        else:
            return False
        self._full = True
        if self._waiting or self._study.left(self._total):
            self._codes.add(BudgetReached.exit_code)
            say(f"{why}; no other trial begins")
        return True

    def _enter(self, trial: Trial) -> None:
        """Have the trial wait for its run; or tell at once what is known of it."""
        known = self._study.known(trial)
        if known is not None:
            say(f"trial {trial.number} is {known.name} again, which is {known.state}")
            self._study.tell(trial.number, known.state, known.values)
            return
        if trial.name in self._points:
            self._points[trial.name].trials.append(trial.number)
            return
        try:
            run = self._make(trial)
        except ConfigError as error:
            self._fail([trial.number], str(error))
            return
        folder = self._folder / trial.name
        self._points[trial.name] = Point(trial.name, folder, run, [trial.number])
        self._waiting.append(trial.name)

    def _start(self, name: str) -> None:
        point = self._points[name]
        say(f"trial {point.trials[0]}: {self._study.shown(point.trials[0])}")
        self._waiting.remove(name)
        self._going.add(name)
        self._runner.begin(point.folder, point.run)

    def _follow(self, point: Point) -> None:
        """Report new held-out losses; stop a run that the pruner gives up."""
        number, evals = point.trials[0], self._ledgers.of(point.folder).series("eval")
        losses = [(line["step"], number_of(line.get(self._metric))) for line in evals]
        news = self._study.report(number, losses)
        for step, loss in news:
            say(f"trial {number}: step {step:,}, {loss:.4f} held out")
        if not news or news[-1][0] >= point.run.steps or self._study.is_pruned(number):
            return
        if self._study.should_prune(number):
            say(f"trial {number} is pruned at step {news[-1][0]:,}")
            self._study.prune(number)
            self._runner.stop(point.folder)

    def _settle(self, end: End) -> None:
        """Tell the study how a run ended."""
        point = next(p for p in self._points.values() if p.folder == end.folder)
        self._going.discard(point.name)
        if end.status == "done":
            self._done(point)
        elif self._study.is_pruned(point.trials[0]):
            self._tell(point, "pruned")
        elif end.status == "lost":
            self._waiting.insert(0, point.name)
        elif end.status == "failed":
            del self._points[point.name]
            self._fail(point.trials, end.text)
        else:  # the trial stays open: the same command takes it up
            stopped = end.status == "stopped"
            self._codes.add(Interrupted.exit_code if stopped else BudgetReached.exit_code)
            if not (stopped and self._asked):
                say(f"trial {point.trials[0]}: {end.text}")
            if stopped and self._runner.here:
                self._stopping = True  # whoever stopped it means this machine
        self._changed()

    def _done(self, point: Point) -> None:
        self._follow(point)
        history = self._ledgers.of(point.folder)
        loss = number_of((history.series("eval") or [{}])[-1].get(self._metric))
        usd = history.spent.usd
        del self._points[point.name]
        if not math.isfinite(loss):
            self._fail(point.trials, f"it is done, but its {self._metric} is no number")
        elif len(self._search.measures) == 1:
            self._tell(point, "done", loss)
        elif usd is None:
            self._fail(point.trials, "it is done, but what it cost is unknown")
        else:
            self._tell(point, "done", loss, float(usd))

    def _tell(self, point: Point, state: str, *values: float) -> None:
        for number in point.trials:
            self._study.tell(number, state, values)
        self._points.pop(point.name, None)
        told = "".join(f", {value:.4g}" for value in values)
        say(f"trial {point.trials[0]} is {state}{told}")

    def _fail(self, trials: list[int], why: str) -> None:
        self._failures += 1
        for number in trials:
            self._study.tell(number, "failed", why=why)
        say(f"trial {trials[0]} FAILED: {why}")

    def _code(self) -> int:
        if any(trial.state == "failed" for trial in counted(self._study.trials)):
            return 1
        if not self._full and (self._waiting or self._going or self._study.left(self._total)):
            self._codes.add(Interrupted.exit_code)
        return min(self._codes, default=0)


def number_of(value: float | None) -> float:
    """A ledger's number; what it does not know, or was not finite, is NaN."""
    return math.nan if value is None else value


def say(text: str) -> None:
    print(text, flush=True)

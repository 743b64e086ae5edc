"""Ends the processes of a run that no longer gets on, once every rank has written down its stacks.

`fit` has a `Watchdog` beside the loop on every rank; loop, engine and checkpoints tell `Progress`
where they are.
"""

import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from kalmagrove.config import Hung, Launch
from kalmagrove.parallel import Groups, broadcast_object

ORDER = ("start", "data", "forward", "backward", "optimizer", "report", "evaluation", "checkpoint")
WAIT = 60.0  # seconds for the stacks of other ranks, at most
REPORT = "report.txt"
STDERR = 2


class Place(NamedTuple):
    """Where a rank is. step: of a run, from 1. since: by the monotonic clock. first: the phase was
    not entered before.
    """

    phase: str
    step: int
    since: float
    first: bool


class Progress:
    """Where this rank is, told by the main thread and read by its `Watchdog`."""

    def __init__(self) -> None:
        self._entered: set[str] = set()
        self.place = Place("start", 0, time.monotonic(), True)

    def at(self, phase: str, step: int | None = None) -> None:
        """A phase of `ORDER` begins, or gets on. step: the one that is being done; None: as before.

        It costs a microsecond.
        """
        before = self.place
        if before.phase != phase:
            self._entered.add(before.phase)
        number = before.step if step is None else step
        self.place = Place(phase, number, time.monotonic(), phase not in self._entered)


class Watchdog:
    """While entered, a phase that takes longer than `launch.hang_timeout` seconds ends the process.

    A phase's first time, when code is compiled, and saves have `launch.timeout` seconds if that is
    more, as collectives have. Then every rank, as all wait for the one that hangs, writes the
    stacks of its threads to RUN/stacks/TIME/rank-N.txt, the first that can says who stands where,
    and all end with exit code 77.

    Where the interpreter's lock is held for that long, no thread of Python can do that. Then
    faulthandler, which needs no lock, writes the stacks to stderr and ends the process with exit
    code 1; so it does with a process that goes on after it was suspended for that long.
    """

    def __init__(
        self,
        progress: Progress,
        launch: Launch,
        groups: Groups,
        run_dir: Path,
        write_down: Callable[[str], None],
    ) -> None:
        """A collective call. write_down: is told on rank 0 what happened, in another thread."""
        began = broadcast_object(f"{datetime.now():%Y-%m-%dT%H-%M-%S}", groups.world)
        self._folder = run_dir / "stacks" / began
        self._rank, self._ranks = groups.world.rank, groups.world.size
        self._progress, self._write_down = progress, write_down
        self._limit = launch.hang_timeout
        self._timeout = launch.timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit is not None:
            self._progress.at("start")
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._limit is not None:
            self._stop.set()
            self._thread.join()  # without end if it has found a hang: then it ends the process

    def _watch(self) -> None:
        assert self._limit is not None
        try:
            while not self._stop.wait(min(1.0, self._limit / 10)):
                place = self._progress.place
                patient = place.first or place.phase == "checkpoint"
                limit = max(self._limit, self._timeout) if patient else self._limit
                # Comes true only if this thread does not come round again.
                faulthandler.dump_traceback_later(limit, exit=True, file=STDERR)
                if time.monotonic() - place.since > limit:
                    self._end(place, limit)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, place: Place, limit: float) -> None:
        """Write down what can be known, with the other ranks, and end the process."""
        wait = min(WAIT, limit)
        faulthandler.dump_traceback_later(2 * wait + 10, exit=True, file=STDERR)
        try:
            self._write_stacks(place)
            _until(lambda: len(self._heads()) == self._ranks, wait)
            if self._rank == min(self._heads()):
                text = told(self._heads(), self._ranks, limit) + f"; stacks: {self._folder}"
                print(f"kalmagrove: {text}", file=sys.stderr, flush=True)
                if self._rank == 0:
                    self._write_down(text)
                (self._folder / REPORT).write_text(text + "\n")
            # Launchers end all ranks when one has ended: not before it is told.
            _until((self._folder / REPORT).exists, wait)
        except OSError as error:
            print(f"kalmagrove: no stacks of rank {self._rank} ({error})", file=sys.stderr)
        finally:
            os._exit(Hung.exit_code)

    def _write_stacks(self, place: Place) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{self._rank}.txt"
        seconds = time.monotonic() - place.since
        partial = path.with_suffix(".tmp")
        with partial.open("w") as file:
            file.write(f"rank {self._rank}: step {place.step}, {place.phase}, for {seconds:.0f} s ")
            file.write(f"({socket.gethostname()}, process {os.getpid()})\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        partial.rename(path)

    def _heads(self) -> dict[int, tuple[int, str]]:
        """Step and phase of the ranks that have written their stacks."""
        found = {}
        for path in self._folder.glob("rank-*.txt"):
            with path.open() as file:
                match = re.match(r"rank (\d+): step (\d+), (\w+)", file.readline())
            if match:
                found[int(match[1])] = (int(match[2]), match[3])
        return found


def told(places: dict[int, tuple[int, str]], ranks: int, limit: float) -> str:
    """Who stands where, those first that are furthest behind.

    Args:
        places: step and phase by rank; of the others nothing is known.

    >>> told({0: (7, "forward"), 1: (7, "data")}, 2, 600)
    'hung: no progress in 600 s; rank 1 in data of step 7; rank 0 in forward of step 7'
    """
    silent = sorted(set(range(ranks)) - set(places))
    parts = [f"hung: no progress in {limit:g} s"]
    if silent:
        parts.append(f"{_names(silent)} {'does' if len(silent) == 1 else 'do'} not answer")

    def behind(rank: int) -> tuple[int, int]:
        step, phase = places[rank]
        return step, ORDER.index(phase)

    for _, group in groupby(sorted(places, key=behind), key=behind):
        at = list(group)
        step, phase = places[at[0]]
        parts.append(f"{_names(at)} in {phase} of step {step}")
    return "; ".join(parts)


def _names(ranks: Iterable[int]) -> str:
    """`ranks 0, 2 to 5`"""
    listed = sorted(ranks)
    runs: list[list[int]] = []
    for rank in listed:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{'rank' if len(listed) == 1 else 'ranks'} {', '.join(words)}"


def _until(true: Callable[[], bool], seconds: float) -> None:
    """Wait for something, no longer than so many seconds."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)

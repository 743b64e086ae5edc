"""Starts of a run's processes: since when they cost, and for how long those that died went on.

The process that a user or a launcher starts has a `Heartbeat`. The ledger's writer books what it
left of starts that died (`kalmagrove.track.bill`). Needs no torch, so that it begins early.
"""

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from kalmagrove.config.errors import BudgetReached, ConfigError, Interrupted
from kalmagrove.config.files import replace_text

log = logging.getLogger(__name__)
FOLDER = ".alive"  # in the run's folder
VARIABLE = "KALMAGROVE_STARTED"  # NAME:MACHINE:BEGAN, for the processes that this one starts
BEAT = 2.0  # seconds
# What has said all in the ledger, or was refused before it cost anything.
CLEAN = (Interrupted, BudgetReached, ConfigError)


@dataclass(frozen=True)
class Attempt:
    """One start. name: in the ledger; "": a launcher gave none. began: by the clock of `machine`
    that all its processes share; the devices are paid for since then.
    """

    name: str
    machine: str
    began: float

    @classmethod
    def now(cls, ago: float = 0.0) -> Self:
        """One that began so many seconds ago."""
        return cls(secrets.token_hex(6), _machine(), _clock() - ago)

    @classmethod
    def given(cls, environment: Mapping[str, str]) -> Self | None:
        """That of the process that started this one on this machine; None: none has said so."""
        name, _, rest = environment.get(VARIABLE, "").partition(":")
        machine, _, began = rest.partition(":")
        try:
            return cls(name, machine, float(began)) if machine == _machine() else None
        except ValueError:
            return None

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return max(0.0, _clock() - self.began)

    @property
    def environment(self) -> dict[str, str]:
        """For processes that belong to it."""
        return {VARIABLE: f"{self.name}:{self.machine}:{self.began:.3f}"}


@dataclass(frozen=True)
class Beat:
    """What an attempt left: how long it went on, on how many processes."""

    attempt: str
    seconds: float
    processes: int


class Heartbeat:
    """While entered, RUN/.alive/NAME tells every two seconds how long the attempt has gone on.

    It is removed at an end that the ledger tells of, or when the start was refused. What died
    leaves it, for the next start to book. A thread beats: no step waits for it. A beat that cannot
    be written is left out: who writes what counts says that the disk is full.
    """

    def __init__(
        self, folder: Path, attempt: Attempt, processes: int, *, beats: bool = True
    ) -> None:
        """beats: whether this process is the one of the run that does."""
        self.attempt, self.died = attempt, False
        self._folder, self._processes, self._beats = folder, processes, beats
        self._made: list[Path] = []  # folders that were not there
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._beats:
            place = self._folder / FOLDER
            self._made = [path for path in (place, *place.parents) if not path.exists()]
            with suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._beats:
            return
        self._stop.set()
        self._thread.join()
        if self.died or not (error is None or isinstance(error, CLEAN)):
            self._write()
        else:
            self._remove()

    def again(self) -> None:
        """The attempt has died, and the next one begins at this moment."""
        self._write()
        self.attempt = Attempt.now()
        self._write()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self._write()

    def _write(self) -> None:
        attempt = self.attempt
        beat = {"seconds": round(attempt.age, 3), "processes": self._processes}
        with suppress(OSError):
            replace_text(self._folder / FOLDER / attempt.name, json.dumps(beat) + "\n")

    def _remove(self) -> None:
        forget(self._folder, [self.attempt.name])
        for path in dict.fromkeys([self._folder / FOLDER, *self._made]):  # where nothing else came
            with suppress(OSError):
                path.rmdir()


def heartbeat(folder: Path, processes: int, *, since: float | None = None) -> Heartbeat:
    """Of this process, which begins the run's others or is its only one.

    Args:
        since: seconds ago that it began to cost; None: this process's age, or what a launcher says.
    """
    given = Attempt.given(os.environ) if since is None else None
    attempt = Attempt.now(process_age() if since is None else since)
    if given is not None:
        attempt = replace(given, name=attempt.name)
    return Heartbeat(folder, attempt, processes)


def heartbeat_of_rank(folder: Path, rank: int, processes: int, *, finished: bool) -> Heartbeat:
    """Of a rank that a launcher started: rank 0 beats, unless the launcher's parent does.

    finished: there is nothing to do.
    """
    given = Attempt.given(os.environ) or Attempt("", "", _clock() - process_age())
    if given.name:
        return Heartbeat(folder, given, processes, beats=False)
    attempt = replace(given, name=secrets.token_hex(6))
    return Heartbeat(folder, attempt, processes, beats=rank == 0 and not finished)


def beats(folder: Path) -> list[Beat]:
    """What attempts have left in a run's folder, those that go on too."""
    found = []
    for path in sorted(folder.glob(f"{FOLDER}/*")):
        if path.name.startswith("."):  # being written
            continue
        try:
            told = json.loads(path.read_text())
            found.append(Beat(path.name, float(told["seconds"]), int(told["processes"])))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            log.warning("%s cannot be read: for how long that start went on is not known", path)
    return found


def forget(folder: Path, attempts: list[str]) -> None:
    """They are booked, or there is nothing to book."""
    for name in attempts:
        half = (folder / FOLDER).glob(f".{name}.*")  # as a kill in the middle of a beat leaves it
        for path in (folder / FOLDER / name, *half):
            with suppress(OSError):
                path.unlink()


def process_age() -> float:
    """Seconds since this process started (imports and data preparation cost money too).

    Read from /proc; 0.0 where there is none.
    """
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            after_name = file.read().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22: ticks since boot
        return max(0.0, _clock() - started)
    except (OSError, ValueError, IndexError):
        return 0.0


def _clock() -> float:
    """Seconds by a clock that nobody sets and all processes of this machine share."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)  # Linux alone has it
    return time.monotonic() if boot is None else time.clock_gettime(boot)


def _machine() -> str:
    """Since its last start: its clocks begin anew with it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()

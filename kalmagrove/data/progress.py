"""Progress of long work: a bar on a terminal, a line now and then elsewhere.

Used by `prepare` only.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY = 15.0  # seconds


class Reporter:
    """Tells the user on stderr what is going on, unless `enabled` is false."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        console = Console(stderr=True)
        self._bar = _bar(console) if enabled and console.is_terminal else None
        self._task: TaskID | None = None
        self._stage, self._last = "", time.monotonic()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        elif self._enabled:
            print(line, file=sys.stderr, flush=True)

    def stage(self, name: str, total: int | None = None) -> None:
        """Begin a piece of work of `total` units, None if unknown."""
        self._stage, self._last = name, time.monotonic()
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(name, total=total, note="")

    def update(self, done: int, note: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self._enabled and time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            self.say(f"{self._stage}: {note}")


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
    )

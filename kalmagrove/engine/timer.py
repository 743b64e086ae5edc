"""Where the time of training steps goes, without waiting for the device.

The loop and `Engine.train_step` say where a phase ends; `Meters` reads the sums when it writes a
line.
"""

import time
from collections import deque
from collections.abc import Callable

import torch

from kalmagrove.track.phases import ALLTOALL


class Timer:
    """Seconds by phase, on the clock of the device that computes.

    On a GPU every lap is an event in its stream, looked at once it has passed: laps wait for
    nothing. A phase then includes the time in which the GPU had nothing to do because the host was
    late.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._mark = time.perf_counter()
        self._event: torch.cuda.Event | None = None  # the last one that was read
        self._ahead: deque[tuple[str | None, torch.cuda.Event, Callable[[], float] | None]] = (
            deque()
        )

    def begin(self) -> None:
        """A step begins: the time since the last lap belongs to no phase."""
        self._end(None, None)
        self._read(wait=False)

    def lap(self, phase: str, exchanging: Callable[[], float] | None = None) -> None:
        """The time since the last call belongs to `phase`.

        Args:
            exchanging: the seconds of it that all-to-alls took, which are a phase of their own; on
                a GPU asked when the lap's end has passed. None: there were none.
        """
        self._end(phase, exchanging)

    def seconds(self) -> dict[str, float]:
        """All so far, by phase. On a GPU, waits for the last lap."""
        self._read(wait=True)
        return dict(self._seconds)

    def _end(self, phase: str | None, exchanging: Callable[[], float] | None) -> None:
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ahead.append((phase, event, exchanging))
            return
        now = time.perf_counter()
        self._add(phase, now - self._mark, exchanging)
        self._mark = now

    def _read(self, wait: bool) -> None:
        while self._ahead and (wait or self._ahead[0][1].query()):
            phase, event, exchanging = self._ahead.popleft()
            event.synchronize()
            if self._event is not None:
                self._add(phase, self._event.elapsed_time(event) / 1000, exchanging)
            self._event = event

    def _add(
        self, phase: str | None, seconds: float, exchanging: Callable[[], float] | None
    ) -> None:
        if phase is None:
            return
        if exchanging is not None:
            apart = exchanging()
            self._seconds[ALLTOALL] = self._seconds.get(ALLTOALL, 0.0) + apart
            seconds -= apart
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

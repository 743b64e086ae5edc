"""Requests to stop: SIGINT, SIGTERM, a file, the launcher's death, or the end of a job's time.

`fit` asks after every step and all ranks agree.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch

from kalmagrove.parallel import Groups, all_reduce_max

STOP_FILE_VARIABLE = "KALMAGROVE_STOP_FILE"
LAUNCHER_VARIABLE = "KALMAGROVE_LAUNCHER"  # process id; set by `engine.launcher` for its ranks
END_VARIABLE = "SLURM_JOB_END_TIME"  # seconds since 1970; our batch script sets it for old Slurms


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered instead of killing the process.

    A second SIGINT acts as usual: the process dies at once. Rank 0 also looks for the file named by
    the environment variable KALMAGROVE_STOP_FILE, for schedulers that cannot send signals,
    and stops `reserve` seconds before a Slurm job ends.
    """

    def __init__(self, reserve: float = 0.0) -> None:
        self.reason: str | None = None
        end = os.environ.get(END_VARIABLE, "")
        # From here on by a clock that nobody sets.
        left = float(end) - reserve - time.time() if end.isdigit() else float("inf")
        self._until = time.monotonic() + left
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.reason = signal.Signals(number).name

    def agreed(
        self, groups: Groups, over_budget: bool = False
    ) -> Literal["go on", "stop", "over budget"]:
        """What is to be done, if any rank was asked to stop or is told that no money is left.

        All ranks call it and get the same answer.
        """
        stop_file = os.environ.get(STOP_FILE_VARIABLE)
        if self.reason is None and stop_file and groups.is_main and Path(stop_file).exists():
            self.reason = f"the file {stop_file}"
        if self.reason is None and groups.is_main and time.monotonic() > self._until:
            self.reason = "the end of the job's time"
        heard = 2 if over_budget else int(self.reason is not None)
        if groups.world.size > 1:
            told = torch.tensor(heard, device=groups.device)
            heard = int(all_reduce_max(told, groups.world).item())
        return ("go on", "stop", "over budget")[heard]


def stop_with_launcher() -> None:
    """In a rank that `engine.launcher` started: see `stop_with`."""
    if LAUNCHER_VARIABLE in os.environ:
        stop_with(int(os.environ[LAUNCHER_VARIABLE]))


def stop_with(parent: int) -> None:
    """From now on this process gets SIGTERM when its `parent` dies; on Linux alone."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGTERM))
    if os.getppid() != parent:  # it has died before that
        os.kill(os.getpid(), signal.SIGTERM)

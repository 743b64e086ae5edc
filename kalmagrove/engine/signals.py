"""Requests to stop: SIGINT, SIGTERM, or a file. `fit` asks after every step and all ranks agree."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from kalmagrove.parallel import Groups, any_rank

STOP_FILE_VARIABLE = "KALMAGROVE_STOP_FILE"


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered instead of killing the process.

    A second SIGINT acts as usual: the process dies at once. Rank 0 also looks for the file named by
    the environment variable KALMAGROVE_STOP_FILE, for schedulers that cannot send signals.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
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

    def agreed(self, groups: Groups) -> bool:
        """Whether any rank was asked to stop. All ranks call it and get the same answer."""
        stop_file = os.environ.get(STOP_FILE_VARIABLE)
        if self.reason is None and stop_file and groups.is_main and Path(stop_file).exists():
            self.reason = f"the file {stop_file}"
        return any_rank(self.reason is not None, groups.world, groups.device)

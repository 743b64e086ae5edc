"""What a layer's all-to-alls cost: bytes to other ranks, and seconds, counted until they are read.

Filled by `kalmagrove.parallel.differentiable.all_to_all`, in forward and in backward passes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Traffic:
    """Counts the all-to-alls of one layer.

    bytes: sent to other ranks since the last `drain`. The seconds are those that the device (on the
    CPU: the process) spent in the calls, waiting for slower ranks included. On a GPU they come from
    pairs of events, which are looked at in `drain` only: counting waits for nothing.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def count(self, sent: int, device: torch.device) -> Iterator[None]:
        """Around one call that sends `sent` bytes to other ranks."""
        self.bytes += sent
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def drain(self) -> tuple[int, float]:
        """Bytes and seconds since the last call. On a GPU, waits for the last counted call."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        found = self.bytes, self._seconds
        self.bytes, self._seconds = 0, 0.0
        self._events.clear()
        return found

"""What a layer's all-to-alls cost: bytes to other ranks, and seconds, counted until they are read.

Filled by `kalmagrove.parallel.differentiable.all_to_all`, in forward and in backward passes; read
by `kalmagrove.engine` after each of them, so that it knows which pass they were part of.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch


class Exchanged(NamedTuple):
    """What some all-to-alls cost.

    bytes: sent to other ranks. seconds: those that the device (on the CPU: the process) spent in
    the calls, waiting for slower ranks included; asking waits for the last of the calls.
    """

    bytes: int
    seconds: Callable[[], float]

    @classmethod
    def sum(cls, parts: Iterable[Self]) -> Self:
        found = list(parts)
        return cls(sum(part.bytes for part in found), lambda: sum(part.seconds() for part in found))


class Traffic:
    """Counts the all-to-alls of one layer, since the last `drain`.

    On a GPU the seconds come from pairs of events in the stream that the calls are made from:
    counting waits for nothing. What runs in other streams meanwhile, a shared part or the reduction
    of gradients, does not make them less.
    """

    def __init__(self) -> None:
        self._bytes, self._seconds = 0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def count(self, sent: int, device: torch.device) -> Iterator[None]:
        """Around one call that sends `sent` bytes to other ranks."""
        self._bytes += sent
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

    def drain(self) -> Exchanged:
        """All since the last call. Waits for nothing; asking for the seconds does."""
        events, seconds = self._events, self._seconds

        def told() -> float:
            for _, end in events:
                end.synchronize()
            return seconds + sum(begin.elapsed_time(end) for begin, end in events) / 1000

        found = Exchanged(self._bytes, told)
        self._bytes, self._seconds, self._events = 0, 0.0, []
        return found

"""Looks at some steps of a training with torch's profiler; without `profile.steps` does nothing.

`fit` opens it around its steps. Into RUN/profile go a Chrome trace of each rank that writes one
(for chrome://tracing or ui.perfetto.dev) and, on GPU, what was allocated in these steps, by line of
code (for pytorch.org/memory_viz).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from kalmagrove.config import Profile
from kalmagrove.parallel import Groups

log = logging.getLogger(__name__)
MEMORY_EVENTS = 200_000  # allocations that a snapshot keeps, at most


class StepProfiler:
    """Of one rank. Evaluations and saves between the steps are in the trace too."""

    def __init__(self, wanted: Profile, folder: Path, groups: Groups, done: int = 0) -> None:
        """done: steps of earlier sessions, which cannot be looked at any more."""
        self._folder, self._device = folder, groups.device
        self._rank = groups.world.rank
        mine = wanted.ranks == "all" or groups.is_main
        self._steps = wanted.steps if mine else None
        self.last = wanted.steps[1] if wanted.steps else None  # step, after which to `close`
        self._profiler: Any = None
        if wanted.steps and wanted.steps[0] <= done and groups.is_main:
            first, last = wanted.steps
            left = "nothing is profiled" if last <= done else f"steps {done + 1} to {last} are left"
            log.warning(
                "profile.steps=[%s, %s]: the run has %s steps behind it; %s",
                first,
                last,
                done,
                left,
            )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step that will be the `number`-th of the run. After `last`, `close`."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            yield
            return
        if self._profiler is None:
            self._steps = number, self._steps[1]
            self._start()
        with record_function(f"step {number}"):
            yield

    def close(self) -> None:
        """Write what was recorded, if anything was. A full disk does not end the training."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        assert self._steps is not None
        name = f"steps-{self._steps[0]}-{self._steps[1]}-rank-{self._rank}"
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the steps' last kernels
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"trace-{name}.json.gz"))
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-{name}.pickle"))
        except (OSError, RuntimeError) as error:
            log.error("the profile of rank %s is not written (%s)", self._rank, error)
            return
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
        log.info("a trace of steps %s to %s is in %s", *self._steps, self._folder)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

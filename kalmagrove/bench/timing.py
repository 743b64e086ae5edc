"""Times and memory: CUDA events around bursts of calls, implementations taking turns.

A burst is one call on each of several input sets, together larger than the cache, from an idle
device; its time over the number of calls is one sample, which includes what the host adds. A graph
replays the same burst without the host. On a CPU the clock is the host's and there are no graphs.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

COPY_BYTES = 2**31  # of the buffer whose copy measures the memory's bandwidth
MATMUL = 8192  # rows and columns of the product that measures the arithmetic
CACHE_BYTES = 160 * 2**20  # input sets together exceed twice the cache of the GPUs in view
MIN_SETS, MAX_SETS = 4, 64
LARGE_BYTES = 512 * 2**20  # two input sets of this size suffice, and save memory
LAUNCHES = 64  # empty kernels in a graph
WARMUP = 2  # bursts


class Ceilings(NamedTuple):
    """What the device reached in this run: bytes read plus written, and operations, a second."""

    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, flops: float, moved: float) -> float:
        """No implementation is faster: `flops` operations, and `moved` bytes through memory."""
        return 1e3 * max(flops / self.flops_per_s, moved / self.bytes_per_s)


@dataclass
class Task:
    """Something to time: `prepare` is not timed, what it returns goes to `timed`."""

    timed: Callable[[Any], object]
    calls: int
    prepare: Callable[[], Any] = lambda: None
    samples: list[float] = field(default_factory=list)  # ms a call

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def measure(tasks: Sequence[Task], rounds: int, device: torch.device) -> None:
    """Fill the tasks' samples: every round runs a burst of each, in turns."""
    warmup = WARMUP if device.type == "cuda" else 0
    for turn in range(warmup + rounds):
        for task in tasks:
            prepared = task.prepare()
            taken = _timed(task.timed, prepared, device)
            if turn >= warmup:
                task.samples.append(taken / task.calls)


def _timed(call: Callable[[Any], object], argument: Any, device: torch.device) -> float:
    """Milliseconds of call(argument), begun on an idle device."""
    if device.type != "cuda":
        begun = time.perf_counter()
        call(argument)
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call(argument)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def sets_for(tensors: Sequence[Tensor], device: torch.device) -> int:
    """How many input sets like this one do not fit into the cache together; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    size = sum(t.numel() * t.element_size() for t in tensors)
    least = MIN_SETS if size < LARGE_BYTES else 2
    return min(max(-(-CACHE_BYTES // max(size, 1)), least), MAX_SETS)


def ceilings(device: torch.device, rounds: int = 10) -> Ceilings:
    """Measure a device copy and a square matrix product of random numbers (bf16 on a GPU)."""
    cuda = device.type == "cuda"
    count, side = (COPY_BYTES // 2, MATMUL) if cuda else (2**20, 256)
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.randn(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    product = torch.empty_like(a)
    copy = Task(lambda _: target.copy_(source), calls=1)
    matmul = Task(lambda _: torch.matmul(a, b, out=product), calls=1)
    measure([copy, matmul], rounds, device)
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / copy.median * 1e3, 2 * side**3 / matmul.median * 1e3)


def launch_ms(device: torch.device, rounds: int = 10) -> dict[str, float] | None:
    """What launching costs where nothing is computed; None on a CPU.

    graph: one replay of a graph of one empty kernel. kernel: each kernel of a graph of many.
    """
    if device.type != "cuda":
        return None
    number, recorder = torch.zeros(1, device=device), Recorder()

    def add(times: int) -> Task:
        def burst(_: Any) -> None:
            for _ in range(times):
                number.add_(0)

        return recorder.capture(Task(burst, times))

    one, many = add(1), add(LAUNCHES)
    measure([one, many], rounds, device)
    return {"graph": round(one.median, 6), "kernel": round(many.median, 6)}


def peak_extra_bytes(task: Task, device: torch.device) -> int | None:
    """The most that one burst's timed part allocates beyond what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    prepared = task.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = task.timed(prepared)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raises RuntimeError where PyTorch would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Recorder:
    """Captures bursts as CUDA graphs, on one stream and into one pool of memory.

    So its graphs must never run at once, and nobody may read their results.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, task: Task) -> Task:
        """The task as replays of a graph. Raises RuntimeError where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            task.timed(task.prepare())  # allocations and handles of this stream
            torch.cuda.synchronize()
            graph.capture_begin(pool=self.pool)
            try:
                task.timed(task.prepare())
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return Task(lambda _: graph.replay(), task.calls)

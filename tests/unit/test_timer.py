"""Laps and all-to-alls on the clock of a device that is behind the host."""

import time
from typing import Any

import pytest
import torch

from kalmagrove.engine.timer import Timer
from kalmagrove.parallel.traffic import Exchanged, Traffic

pytestmark = pytest.mark.unit


class Gpu:
    """A stand-in for a stream: what is queued lasts as long as `queue` says, and passes when it is
    waited for.
    """

    def __init__(self) -> None:
        self.end = self.passed = 0.0  # of what is queued; of what is done
        self.waits = 0

    def queue(self, seconds: float) -> None:
        self.end += seconds

    def event(self, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.end

    def query(self) -> bool:
        return self.at <= self.gpu.passed

    def synchronize(self) -> None:
        self.gpu.waits += not self.query()
        self.gpu.passed = max(self.gpu.passed, self.at)

    def elapsed_time(self, end: "Event") -> float:
        assert end.query(), "the device has not come so far"
        return 1000 * (end.at - self.at)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu()
    monkeypatch.setattr("torch.cuda.Event", found.event)
    return found


def exchange(traffic: Traffic, device: Any, seconds: float, wait: Any) -> None:
    with traffic.count(100, device):
        wait(seconds)


def test_all_to_alls_are_taken_out_of_the_pass_they_are_in(gpu: Gpu) -> None:
    device, traffic = torch.device("cuda"), [Traffic(), Traffic()]
    timer, sent = Timer(device), 0
    for step in range(2):
        timer.begin()
        gpu.queue(0.5)
        timer.lap("data")
        for phase, alone, exchanging in (("forward", 2.0, 0.25), ("backward", 4.0, 0.75)):
            for layer in traffic:
                gpu.queue(alone / 2)
                exchange(layer, device, exchanging, gpu.queue)
            found = Exchanged.sum(layer.drain() for layer in traffic)
            sent += found.bytes
            timer.lap(phase, found.seconds)
        gpu.queue(1.0)
        timer.lap("optimizer")
        exchange(traffic[0], device, 8.0, gpu.queue)  # of an evaluation, which no lap holds
        traffic[0].drain()
        assert gpu.waits == 0, f"step {step} waits for nothing"
    one = {"data": 0.5, "forward": 2.0, "alltoall": 2.0, "backward": 4.0, "optimizer": 1.0}
    assert timer.seconds() == pytest.approx({phase: 2 * seconds for phase, seconds in one.items()})
    assert sent == 2 * 4 * 100


def test_on_a_cpu_the_same_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    device, traffic = torch.device("cpu"), Traffic()
    timer = Timer(device)
    timer.begin()
    wait(2.0)
    exchange(traffic, device, 0.5, wait)
    timer.lap("forward", traffic.drain().seconds)
    wait(3.0)
    timer.lap("backward", traffic.drain().seconds)
    timer.lap("optimizer")
    assert timer.seconds() == {"alltoall": 0.5, "forward": 2.0, "backward": 3.0, "optimizer": 0.0}

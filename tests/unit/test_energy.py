"""Joules: of a counter, over sessions, and never 0 where nothing measures."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_meters import Session

from kalmagrove.track import read_history
from kalmagrove.track.energy import Energy, counter_of, cpu_counter, gpu_counter

pytestmark = pytest.mark.unit


class Gpu:
    """A counter that stands at 1000 J when the session begins."""

    joules: float | None = 1000.0

    def __call__(self) -> float | None:
        return self.joules


def measured(run_dir: Path, gpu: Gpu) -> Session:
    session = Session(run_dir)
    session.meters._energy = Energy(gpu)
    session.meters.start(0, 0)
    return session


def test_energy_counts_from_when_it_was_made() -> None:
    gpu = Gpu()
    energy = Energy(gpu)
    gpu.joules = 1012.5
    assert energy.used() == 12.5
    gpu.joules = None
    assert math.isnan(energy.used())
    assert math.isnan(Energy(None).used())
    assert gpu_counter(torch.device("cpu")) is None


def test_joules_add_up_over_sessions(tmp_path: Path) -> None:
    gpu = Gpu()
    first = measured(tmp_path, gpu)
    gpu.joules = 1010.0
    first.step(2)
    gpu.joules = 9000.0  # the other session's GPU has a counter of its own
    second = measured(tmp_path, gpu)
    gpu.joules = 9005.0
    second.step(4)
    gpu.joules = 9007.0  # the last evaluation
    second.meters.stop("done")
    assert [line["joules"] for line in second.lines("step")] == [10.0, 15.0]
    assert json.loads((tmp_path / "summary.json").read_text())["joules"] == 17.0


def test_an_unknown_part_makes_the_sum_unknown(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(2)
    session.meters.stop("failed", reason="no GPU")
    assert [line["joules"] for line in session.lines("step")] == [None]
    assert json.loads((tmp_path / "summary.json").read_text())["joules"] is None
    assert read_history(tmp_path / "ledger.jsonl").joules is None
    gpu = Gpu()
    again = measured(tmp_path, gpu)
    again.step(4)
    assert again.lines("step")[-1]["joules"] is None


def test_a_checkpoint_of_another_folder_brings_its_joules(tmp_path: Path) -> None:
    gpu = Gpu()
    first = measured(tmp_path / "a", gpu)
    gpu.joules = 1010.0
    first.step(2)
    second = Session(tmp_path / "b")
    second.meters._energy = Energy(gpu)
    second.meters.load_state_dict(first.meters.state_dict())
    second.meters.start(2, 32)
    gpu.joules = 1011.0
    second.step(4)
    assert second.lines("step")[-1]["joules"] == 11.0


def test_processors_are_counted_by_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(package: int, energy: int) -> None:
        folder = tmp_path / f"intel-rapl:{package}"
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")

    assert cpu_counter(tmp_path) is None, "no counter"
    write(0, 9_000_000)
    write(1, 1_000_000)
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the first package
    counter = cpu_counter(tmp_path)
    assert counter is not None
    write(0, 2_000_000)  # it has begun anew
    write(1, 1_500_000)
    assert (counter(), counter()) == (3.5, 3.5)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert counter() is None
    monkeypatch.setattr("kalmagrove.track.energy.POWERCAP", tmp_path / "none")
    assert counter_of(torch.device("cpu")) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = counter_of(torch.device("cpu"))
    assert other is not None
    assert other() == 0.0, "the machine's first process counts for all"

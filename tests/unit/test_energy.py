"""Joules: of a counter, over sessions, and never 0 where nothing measures."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_meters import Session

from kalmagrove.track import read_history
from kalmagrove.track.accounts import parts
from kalmagrove.track.audit import faults
from kalmagrove.track.energy import Energy, counter_of, cpu_counter, gpu_counter
from kalmagrove.track.phases import STAGES

pytestmark = pytest.mark.unit


class Gpu:
    """A counter that stands at 1000 J when the session begins."""

    joules: float | None = 1000.0

    def __call__(self) -> float | None:
        return self.joules


def measured(run_dir: Path, gpu: Gpu) -> Session:
    session = Session(run_dir, energy=Energy(gpu))
    session.meters.start(0, 0)
    return session


def test_energy_counts_from_when_it_was_made() -> None:
    gpu = Gpu()
    energy = Energy(gpu)
    assert sum(energy.used().values()) == 0
    gpu.joules = 1012.5
    energy.book("training")
    gpu.joules = None
    energy.book("evaluation")
    assert all(math.isnan(joules) for joules in energy.used().values())
    gpu.joules = 1015.0
    energy.book("checkpoint")
    told = {"startup": 0.0, "training": 12.5, "evaluation": 0.0, "checkpoint": 2.5}
    assert energy.used() == told, "what nobody saw is the next one's"
    nothing = Energy(None)
    nothing.book("training")
    assert all(math.isnan(joules) for joules in nothing.used().values())
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


def test_joules_go_to_what_was_done_and_add_up(tmp_path: Path) -> None:
    """The counter is read at the ends of stages and at lines: never between two steps of a line."""
    asked = []

    class Asked(Gpu):
        def __call__(self) -> float | None:
            asked.append(1)
            return self.joules

    gpu = Asked()
    session = Session(tmp_path, energy=Energy(gpu))

    def use(joules: float) -> None:
        assert gpu.joules is not None
        gpu.joules += joules

    use(40.0)  # a model is built
    session.meters.start(0, 0)
    before = len(asked)
    use(5.0)
    session.step(1)
    assert len(asked) == before
    use(5.0)
    session.step(2)
    use(1.0)  # a refit
    session.meters.pause()
    use(20.0)
    session.meters.evaluated(2, 32, 3.0, 700)
    session.meters.pause()
    use(7.0)
    session.meters.checkpointed(2, 32, tmp_path / "c", 1.0)
    session.meters.pause()
    use(3.0)
    session.meters.unsaved(2, 32, "full")
    use(2.0)
    session.meters.stop("stopped", step=2)
    (line,), (stop,) = session.lines("step"), session.lines("stop")
    startup = {"startup": 40.0, "evaluation": 0.0, "checkpoint": 0.0}
    assert line["phase_joules"] == startup | {"training": 10.0}
    assert stop["phase_joules"] == {
        "startup": 40.0, "training": 13.0, "evaluation": 20.0, "checkpoint": 10.0,
    }  # fmt: skip
    assert stop["joules"] == sum(stop["phase_joules"].values()) == 83.0
    again = Session(tmp_path, energy=Energy(gpu))
    again.meters.start(2, 32)
    use(4.0)
    again.step(4)
    (_, line) = again.lines("step")
    assert (line["joules"], sum(line["phase_joules"].values())) == (87.0, 4.0)
    assert faults(tmp_path / "ledger.jsonl") == []
    found = parts(read_history(tmp_path / "ledger.jsonl"))
    told = {name: found[name].joules for name in STAGES}
    assert told == {"startup": 40.0, "training": 17.0, "evaluation": 20.0, "checkpoint": 10.0}
    assert sum(told.values()) == read_history(tmp_path / "ledger.jsonl").joules


def test_stages_that_miss_joules_are_found(tmp_path: Path) -> None:
    gpu = Gpu()
    session = measured(tmp_path, gpu)
    for joules, step in ((1010.0, 2), (1030.0, 4)):
        gpu.joules = joules
        session.step(step)
    path = tmp_path / "ledger.jsonl"
    lines = [json.loads(text) | {"digest": None} for text in path.read_text().splitlines()]
    lines[-1]["phase_joules"]["training"] = 25.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert faults(path) == ["line 3 has stages whose joules are -5.000 J off its own"]


def test_an_unknown_part_makes_the_sum_unknown(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.meters.start(0, 0)
    session.step(2)
    session.meters.stop("failed", reason="no GPU")
    assert [line["joules"] for line in session.lines("step")] == [None]
    assert session.lines("stop")[0]["phase_joules"] == dict.fromkeys(STAGES), "null, not 0"
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
    second = Session(tmp_path / "b", energy=Energy(gpu))
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

"""The profiler sees the steps that were asked for and no others."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import make_run

from kalmagrove.config import ConfigError, Profile, Training
from kalmagrove.engine import loop
from kalmagrove.engine.checkpoint import State
from kalmagrove.engine.profile import StepProfiler
from kalmagrove.engine.watchdog import Progress
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit


def steps_of(path: Path) -> set[str]:
    """Names of the steps in a trace; it must hold work beside them."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "aten::add" in names
    return {name for name in names if name.startswith("step ")}


def work(profiler: StepProfiler, numbers: range) -> None:
    for number in numbers:
        with profiler.step(number):
            torch.ones(3) + number
        if number == profiler.last:
            profiler.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("ranks", ["first", "all"])
def test_a_trace_holds_the_steps_asked_for(rank: int, ranks: Any, tmp_path: Path) -> None:
    single = Groups.single()
    groups = replace(single, world=replace(single.world, rank=rank, size=2))
    folder = tmp_path / "profile"
    work(StepProfiler(Profile(steps=(3, 4), ranks=ranks), folder, groups), range(1, 8))
    if rank and ranks == "first":
        assert not folder.exists()
        return
    (trace,) = folder.iterdir()
    assert trace.name == f"trace-steps-3-4-rank-{rank}.json.gz"
    assert steps_of(trace) == {"step 3", "step 4"}


def test_off_leaves_nothing(tmp_path: Path) -> None:
    profiler = StepProfiler(Profile(), tmp_path / "profile", Groups.single())
    work(profiler, range(1, 4))
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_run_that_ends_early_leaves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `fit`: steps 1 and 2 are done, and steps 2 to 9 were asked for."""

    def step(engine: Any, batches: Any, meters: Any, state: State, run: Training) -> None:
        if state.step == 2:
            raise RuntimeError("the third step fails")
        torch.ones(3) + state.step
        state.step += 1

    monkeypatch.setattr(loop, "_step", step)
    meters = SimpleNamespace(
        start=lambda *_: None, stop=lambda *_, **__: None, over_budget=lambda: None
    )
    engine: Any = SimpleNamespace(groups=Groups.single(), progress=Progress())
    run = make_run(profile={"steps": [2, 9]}, eval={"every": 100}, checkpoint={"every": 100})
    with pytest.raises(RuntimeError, match="the third step"):
        loop.fit(engine, None, [], meters, State(tmp_path / "checkpoints"), run)  # type: ignore[arg-type]
    (trace,) = (tmp_path / "profile").iterdir()
    assert steps_of(trace) == {"step 2", "step 3"}


def test_writing_the_trace_is_no_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `fit`: training rests before it is written, and goes on from behind it."""
    told: list[str] = []

    def step(engine: Any, batches: Any, meters: Any, state: State, run: Training) -> None:
        torch.ones(3) + state.step
        state.step += 1
        told.append(f"step {state.step}")
        if state.step == 4:
            raise RuntimeError("enough")

    monkeypatch.setattr(loop, "_step", step)
    close = StepProfiler.close
    monkeypatch.setattr(StepProfiler, "close", lambda self: told.append("close") or close(self))
    meters = SimpleNamespace(
        start=lambda *_: None,
        stop=lambda *_, **__: None,
        over_budget=lambda: None,
        pause=lambda: told.append("pause"),
    )
    engine: Any = SimpleNamespace(groups=Groups.single(), progress=Progress())
    run = make_run(profile={"steps": [2, 3]}, eval={"every": 100}, checkpoint={"every": 100})
    with pytest.raises(RuntimeError, match="enough"):
        loop.fit(engine, None, [], meters, State(tmp_path / "checkpoints"), run)  # type: ignore[arg-type]
    assert told == [
        "step 1", "step 2", "step 3", "pause", "close", "pause", "step 4", "close",
    ]  # fmt: skip
    (trace,) = (tmp_path / "profile").iterdir()
    assert steps_of(trace) == {"step 2", "step 3"}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_leaves_a_memory_snapshot_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **words: calls.append(words))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    groups = replace(Groups.single(), device=torch.device("cuda", 0))
    work(StepProfiler(Profile(steps=(2, 2)), tmp_path / "profile", groups), range(1, 4))
    begun, *rest = calls
    assert begun["max_entries"] > 0
    assert rest == ["wait", "memory-steps-2-2-rank-0.pickle", {"enabled": None}]


def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    work(StepProfiler(Profile(steps=(1, 1)), tmp_path / "file", Groups.single()), range(1, 3))
    assert "the profile of rank 0 is not written" in caplog.text


@pytest.mark.parametrize(("done", "seen"), [(1, (2, 3)), (2, (3, 3)), (3, None)])
def test_steps_of_earlier_sessions_are_warned_of(
    done: int, seen: tuple[int, int] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profiler = StepProfiler(Profile(steps=(2, 3)), tmp_path / "profile", Groups.single(), done)
    work(profiler, range(done + 1, 5))
    traces = [path.name for path in tmp_path.glob("profile/*")]
    assert traces == ([f"trace-steps-{seen[0]}-{seen[1]}-rank-0.json.gz"] if seen else [])
    said = {2: "steps 3 to 3 are left", 3: "nothing is profiled"}.get(done)
    told = [f"profile.steps=[2, 3]: the run has {done} steps behind it; {said}"]
    assert [record.message for record in caplog.records] == (told if said else [])


def test_steps_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"profile.steps=\[5, 3\] must be.*try \[3, 5\]"):
        make_run(profile={"steps": [5, 3]})
    with pytest.raises(
        ConfigError, match=r"profile.steps=\[9, 12\] must begin by .*, steps=8; try"
    ):
        make_run(profile={"steps": [9, 12]})
    assert make_run(profile={"steps": [8, 12]}).profile.steps == (8, 12)

"""What the processes of `test_faults_io` run: disks, files and numbers that fail on purpose."""

import contextlib
import errno
import json
import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kalmagrove.config import CheckpointError, KalmaGroveError, NonFiniteError, Run
from kalmagrove.engine import check_room, fit, resume, room
from kalmagrove.engine.checkpoint_tools import verify
from kalmagrove.engine.tensor_files import ChecksumFile
from kalmagrove.parallel import Groups, barrier
from kalmagrove.track import build_meters, read_history
from kalmagrove.track.audit import faults as ledger_faults
from tests.dist.toy import ROWS, Recorder, Rows, toy_run
from tests.dist.workers import _everywhere, make, serve, validation

LOUD = {"wandb": "disabled", "console": "off", "every": 1}


class Hooked(Rows):
    """Rows that do something before a step is read, given the number of steps that are done."""

    def __init__(self, run: Run, groups: Groups, before: Callable[[int], None]) -> None:
        super().__init__(run.batch.micro, groups.dp.rank, groups.dp.size)
        self.before = before

    def __next__(self) -> dict[str, Any]:
        if self.samples % ROWS == 0:
            self.before(self.samples // ROWS)
        return super().__next__()


def attempt(
    groups: Groups,
    run: Run,
    folder: Path,
    before: Callable[[int], None] = lambda step: None,
    meters: Any = None,
) -> dict[str, Any]:
    """A session of a run as a command makes it: where it began, ended and what it said."""
    engine, _ = make(run, groups)
    rows = Hooked(run, groups, before)
    if meters is None:
        meters = build_meters(
            run, folder, groups, params_total=1, params_active=1, flops_per_token=1.0,
            started=time.monotonic(),
        )  # fmt: skip
    heard = Heard()
    with heard:
        state = resume(engine, rows, meters, run, folder)
        began = state.step
        try:
            if groups.is_main:
                state.folder.mkdir(parents=True, exist_ok=True)
            barrier(groups.world)
            check_room(engine, state.folder, state.step)
            fit(engine, rows, validation(groups), meters, state, run)
            said = "done"
        except KalmaGroveError as error:
            said = f"{type(error).__name__} {error.exit_code}: {error}"
    return {"began": began, "ended": state.step, "said": said, "heard": heard.lines}


class Heard(logging.Handler):
    """The warnings and errors of this process while entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("kalmagrove").addHandler(self)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("kalmagrove").removeHandler(self)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(groups: Groups, folder: str) -> dict[str, Any]:
    """Every file of the newest checkpoint cut, flipped and taken away, one at a time."""
    run_dir, found = Path(folder), {}
    run = toy_run(steps=4, checkpoint={"every": 2, "keep": 3}, zero={"stage": 2})
    whole = Recorder(groups)
    attempt(groups, run, run_dir, meters=whole)
    victim = run_dir / "checkpoints" / "step-000004"

    def resumed() -> list[Any]:
        engine, rows = make(run, groups, seed=1)
        heard = Heard()
        with heard:
            state = resume(engine, rows, Recorder(groups), run, run_dir)
        return [state.step, heard.lines]

    for name in sorted(path.name for path in victim.iterdir()):
        for kind, spoil in DAMAGE.items():
            good, told = (victim / name).read_bytes(), []
            barrier(groups.world)
            if groups.is_main:
                spoil(victim / name)
                told = verify(victim)
            barrier(groups.world)
            found[f"{name} {kind}"] = [_everywhere(resumed(), groups), told]
            barrier(groups.world)
            if groups.is_main:  # as it was: the checkpoint was set aside
                victim.with_name("step-000004.aside").rename(victim)
                (victim / name).write_bytes(good)
            barrier(groups.world)
    assert resumed()[0] == 4, "all is as it was"
    barrier(groups.world)
    if groups.is_main:
        flip(victim / "model.safetensors")
    barrier(groups.world)
    part = Recorder(groups)
    attempt(groups, run, run_dir, meters=part)
    again = {step: part.steps[step] == whole.steps[step] for step in part.steps}
    barrier(groups.world)
    if groups.is_main:
        for path in (run_dir / "checkpoints").glob("step-*/state.json"):
            os.truncate(path, 10)
    barrier(groups.world)
    try:
        none = str(resumed())
    except CheckpointError as error:
        none = str(error)
    return {"found": found, "again": again, "none": _everywhere(none, groups)}


def flip(path: Path) -> None:
    """One bit, in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "flipped": flip,
    "missing": Path.unlink,
}


def full(groups: Groups, disk: str) -> dict[str, Any]:
    """A disk that is full for one save, then for two; after that there is room again."""
    run_dir, filler, found = Path(disk) / "run", Path(disk) / "filler", {}
    run = toy_run(steps=12, checkpoint={"every": 2}, track=LOUD)

    def during(*steps: int) -> Callable[[int], None]:
        def before(step: int) -> None:
            if groups.is_main:
                filler.unlink(missing_ok=True)
                if step in steps:
                    left = shutil.disk_usage(disk).free - 24_000
                    filler.write_bytes(b"0" * left)
            barrier(groups.world)

        return before

    found["once"] = attempt(groups, toy_run(**{**SIX, "track": LOUD}), run_dir, during(3))
    found["left"] = names(run_dir)
    found["twice"] = _everywhere(attempt(groups, run, run_dir, during(7, 8, 9)), groups)
    found["left twice"] = names(run_dir)
    barrier(groups.world)
    during(0)(0)
    found["start"] = attempt(groups, run, run_dir)
    # A quota, or a disk that another process fills meanwhile: the look before says nothing.
    during()(0)
    before, room.free_bytes = room.free_bytes, lambda folder: None
    longer = toy_run(steps=14, checkpoint={"every": 1}, track=LOUD)
    found["unseen"] = attempt(groups, longer, run_dir, during(12))
    room.free_bytes = before
    found["after"] = attempt(groups, run, run_dir)
    found["left after"] = names(run_dir)
    if groups.is_main:
        found["ledger"] = ledger_faults(run_dir / "ledger.jsonl")
        history = read_history(run_dir / "ledger.jsonl")
        found["events"] = [x["step"] for x in history.lines if x["event"] == "unsaved"]
    return found


SIX: dict[str, Any] = {"steps": 6, "checkpoint": {"every": 2}}


def ledger_full(groups: Groups, disk: str, room_again: bool) -> dict[str, Any]:
    """The disk is full after the third step, also for the ledger; then there is room again."""
    filler = Path(disk) / "filler"
    if room_again:
        filler.unlink(missing_ok=True)
        run_dir = Path(disk) / "run"
        found = attempt(groups, toy_run(**{**SIX, "track": LOUD}), run_dir)
        return {**found, "ledger": ledger_faults(run_dir / "ledger.jsonl")}

    def before(step: int) -> None:
        if step == 3 and groups.is_main:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"0" * 4096)

    found = attempt(groups, toy_run(**{**SIX, "track": LOUD}), Path(disk) / "run", before)
    print(found["said"], flush=True)
    os._exit(1)  # as the command does, whatever the other ranks are at


def read_only(groups: Groups, folder: str) -> dict[str, Any]:
    """The checkpoints' own disk becomes read-only for one save."""
    checkpoints = Path(folder) / "checkpoints"

    def before(step: int) -> None:
        if groups.is_main and step in (3, 4):
            mode = "ro" if step == 3 else "rw"
            subprocess.run(["mount", "-o", f"remount,{mode}", str(checkpoints)], check=True)
        barrier(groups.world)

    run = toy_run(**{**SIX, "track": LOUD})
    return {**attempt(groups, run, Path(folder), before), "left": names(Path(folder))}


def nan(groups: Groups, folder: str) -> dict[str, Any]:
    """The last rank's loss is NaN from the fourth step on; then it is not any more."""
    run = toy_run(steps=8, checkpoint={"every": 2}, engine={"max_nonfinite": 2}, track=LOUD)
    engine, _ = make(run, groups)
    meters = build_meters(
        run, Path(folder), groups, params_total=1, params_active=1, flops_per_token=1.0,
        started=time.monotonic(),
    )  # fmt: skip

    def before(step: int) -> None:
        engine.module.bad_loss = step >= 3 and groups.world.rank == groups.world.size - 1

    state = resume(engine, (rows := Hooked(run, groups, before)), meters, run, Path(folder))
    try:
        fit(engine, rows, validation(groups), meters, state, run)
        said = "done"
    except NonFiniteError as error:
        said = f"{error.exit_code}: {error}"
    barrier(groups.world)
    second = attempt(groups, run, Path(folder))
    return {"said": _everywhere(said, groups), "second": second}


def sizes(groups: Groups, folder: str, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Bytes of a checkpoint as reckoned before the first step, and as written after two."""
    found = {}
    for name, sections in variants.items():
        run = toy_run(**{"steps": 2, "batch": {"micro": 2}, **sections})
        engine, rows = make(run, groups)
        meters, place = Recorder(groups), Path(folder) / name
        reckoned = room.checkpoint_bytes(engine)
        state = resume(engine, rows, meters, run, place)
        path = fit(engine, rows, validation(groups), meters, state, run).checkpoint
        written = 0
        for file in path.glob("*.safetensors"):
            header = int.from_bytes(file.read_bytes()[:8], "little")
            metadata = json.loads(file.read_bytes()[8 : 8 + header]).get("__metadata__", {})
            written += file.stat().st_size - 8 - header + sum(map(len, metadata.values()))
        found[name] = [reckoned, written]
        barrier(groups.world)
    return found


def slow_disk(groups: Groups, folder: str) -> dict[str, Any]:
    """Every write of the last rank's part takes its time; the others wait for it."""
    run_dir = Path(folder)
    with slow_writes(groups.world.rank == groups.world.size - 1):
        found = attempt(groups, toy_run(**{**SIX, "track": LOUD}), run_dir)
    if groups.is_main:
        history = read_history(run_dir / "ledger.jsonl")
        found["seconds"] = history.lines[-1]["phases"]["checkpoint"]
        found["ledger"] = ledger_faults(run_dir / "ledger.jsonl")
        found["whole"] = [verify(path) for path in (run_dir / "checkpoints").iterdir()]
    return {**found, "left": names(run_dir)}


def background(groups: Groups, folder: str) -> dict[str, Any]:
    """A thread's files are not on the disk before the next step has begun, on the last rank; then
    the disk fails it once; then a kill comes while they are written.
    """
    place, late = Path(folder), groups.world.rank == groups.world.size - 1
    run = toy_run(**{**SIX, "checkpoint": {"every": 2, "keep": 3}})
    behind = {**SIX, "checkpoint": {"every": 2, "keep": 3, "background": True}}
    plain, whole, broken, again = (Recorder(groups) for _ in range(4))
    attempt(groups, run, place / "plain", meters=plain)
    with late_writes(late) as begun:
        found = attempt(groups, toy_run(**behind), place / "behind", begun, whole)
        told = attempt(groups, toy_run(**{**behind, "track": LOUD}), place / "told", begun)
    with late_writes(late, fails=True) as begun:
        failed = attempt(groups, toy_run(**behind), place / "broken", begun, broken)
    if groups.is_main:
        newest = place / "behind" / "checkpoints" / "step-000006"
        newest.rename(newest.with_suffix(".tmp"))  # where a kill leaves it
    barrier(groups.world)
    killed = attempt(groups, toy_run(**behind), place / "behind", meters=again)
    result: dict[str, Any] = {
        "found": found,
        "told": told,
        "failed": failed,
        "killed": killed,
        "same": whole.steps == plain.steps,
        "goes on": {step: again.steps[step] == plain.steps[step] for step in again.steps},
        "events": whole.events,
        "broken": broken.events,
        "left": names(place / "behind"),
        "left broken": names(place / "broken"),
        "whole": [verify(path) for path in (place / "broken" / "checkpoints").iterdir()],
    }
    if groups.is_main:
        ledger = place / "told" / "ledger.jsonl"
        lines = read_history(ledger).series("checkpoint")
        result["ledger"] = ledger_faults(ledger)
        result["lines"] = [[line["step"], line.get("saved")] for line in lines]
    return result


@contextlib.contextmanager
def late_writes(here: bool, fails: bool = False) -> Iterator[Callable[[int], None]]:
    """Threads write nothing before a step has begun since, of which what is yielded is told."""
    write, steps, failing = ChecksumFile.write, [0], [fails]

    def late(self: ChecksumFile, data: Any) -> None:
        if here and threading.current_thread().name == "checkpoint":
            end, now = time.monotonic() + 60, steps[0]
            while steps[0] == now and not self.size:
                assert time.monotonic() < end, "training does not go on"
                time.sleep(0.001)
            if failing.pop() if failing else False:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    def begun(step: int) -> None:
        steps[0] += 1

    ChecksumFile.write = late  # type: ignore[method-assign]
    yield begun
    ChecksumFile.write = write  # type: ignore[method-assign]


@contextlib.contextmanager
def slow_writes(here: bool) -> Iterator[None]:
    write = ChecksumFile.write

    def slow(self: ChecksumFile, data: Any) -> None:
        time.sleep(0.02)
        write(self, data)

    if here:
        ChecksumFile.write = slow  # type: ignore[method-assign]
    yield
    ChecksumFile.write = write  # type: ignore[method-assign]


WORKERS: dict[str, Any] = {
    "damage": damage,
    "full": full,
    "ledger_full": ledger_full,
    "read_only": read_only,
    "nan": nan,
    "sizes": sizes,
    "slow_disk": slow_disk,
    "background": background,
}

if __name__ == "__main__":
    serve(WORKERS)

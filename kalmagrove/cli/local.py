"""Several runs at once on this machine, each with processes and GPUs of its own.

Called by the Hydra launcher `deepspeed` and by `kalmagrove sweep`. Each run is a `kalmagrove train
--config FILE`, which starts its processes through the DeepSpeed launcher and writes to
`RUN/launch.log`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from kalmagrove.cli import launch, run_folder
from kalmagrove.config import ConfigError, Training

LOCK = ".launch"  # in the run's folder: locked while the run goes on; its process and GPUs


@dataclass(frozen=True)
class Going:
    """A run that goes on, and the GPUs it has. process: None: another program began it."""

    folder: Path
    process: subprocess.Popen[bytes] | None
    pid: int | None
    gpus: list[str]

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
        elif self.pid is not None and found(self.folder) is not None:
            os.kill(self.pid, number)

    def ended(self) -> bool:
        if self.process is None:
            return found(self.folder) is None
        return self.process.poll() is not None

    @property
    def code(self) -> int | None:
        """Of an ended run, as a shell gives it; None: another program has it."""
        return None if self.process is None else launch.exit_code(self.process.returncode)


class Machine:
    """The GPUs of this machine, and the runs that go on there."""

    def __init__(self, verb: str, at_once: int | None) -> None:
        """at_once: at most so many; None: any number, without GPUs one."""
        self.verb, self.gpus = verb, launch.visible_gpus()
        self.at_once = at_once or (None if self.gpus else 1)
        self.counted = bool(self.gpus)
        self.going: list[Going] = []

    def room(self, run: Training) -> bool:
        """Whether another run can begin now."""
        if self.at_once is not None and len(self.going) >= self.at_once:
            return False
        return not self.counted or launch.world_size(run) <= len(self.gpus)

    def begin(self, folder: Path, run: Training) -> None:
        """Begin a run; one that goes on already, since another program began it, is joined."""
        other = found(folder)
        if other is not None:
            its = [gpu for gpu in self.gpus if gpu in other.gpus]
            self.going.append(replace(other, gpus=its))
            self.gpus = [gpu for gpu in self.gpus if gpu not in its]
            print(f"{folder} goes on already", flush=True)
            return
        need = launch.world_size(run) if self.counted else 0
        mine, self.gpus = self.gpus[:need], self.gpus[need:]
        process = _start(folder, run, self.verb, mine)
        self.going.append(Going(folder, process, process.pid, mine))
        print(f"{folder} begins{' on GPU ' * bool(mine)}{','.join(mine)}", flush=True)

    def ended(self) -> Iterator[Going]:
        """The runs that have ended since the last call."""
        for one in [one for one in self.going if one.ended()]:
            self.going.remove(one)
            self.gpus += one.gpus
            told = "" if one.code is None else f" with code {one.code}"
            print(f"{one.folder} ends{told}", flush=True)
            yield one

    def signal(self, number: int) -> None:
        """To all runs: SIGTERM has them save and end."""
        for one in self.going:
            one.signal(number)


def run_all(
    runs: Sequence[Training], verb: str, at_once: int | None
) -> tuple[dict[Path, str], list[Path], list[Path]]:
    """Do the runs, as many at once as there are GPUs for; one that fails ends only itself.

    A signal to stop is passed on: those that go on save and end, and no other is begun.

    Args:
        at_once: at most so many; None: any number, without GPUs one.

    Returns:
        What went wrong, by folder; the folders of all runs that were to be done; and of those that
        had been done before.
    """
    todo: dict[Path, Training] = {}
    finished = []
    for run in runs:
        check(run)
        folder = run_folder.choose(run)
        if verb == "train" and run_folder.finished(folder, run) is not None:
            finished.append(folder)
        else:
            todo[folder] = run
    machine = Machine(verb, at_once)
    waiting, stopping = list(todo), False
    failed: dict[Path, str] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        machine.signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while machine.going or (waiting and not stopping):
            while waiting and not stopping and machine.room(todo[waiting[0]]):
                folder = waiting.pop(0)
                machine.begin(folder, todo[folder])
            time.sleep(0.2)
            for one in machine.ended():
                done = run_folder.done(one.folder, todo[one.folder]) is not None
                if one.code or (one.code is None and not done):
                    failed[one.folder] = failure(one)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed |= dict.fromkeys(waiting, "was not begun")
    return failed, list(todo), finished


def check(run: Training) -> None:
    """ConfigError if the run is not for this machine."""
    if run.cluster is not None:
        rule, remedy = "is for hydra/launcher=slurm", "leave it out"
        raise ConfigError("cluster", run.cluster.name, rule, remedy)


def failure(one: Going) -> str:
    """Why the ended run is not done, in one line."""
    code = "ended" if one.code is None else f"exit code {one.code}"
    return f"{code}: {_last_line(one.folder)}"


def found(folder: Path) -> Going | None:
    """The run that goes on in `folder`, whoever began it; None: none does."""
    path = folder / LOCK
    if not path.exists():
        return None
    lock = run_folder.hold(path)
    if lock is not None:
        os.close(lock)
        return None
    try:
        told = json.loads(path.read_text())
    except ValueError:  # whoever began it was killed in the moment before it told
        told = {"pid": None, "gpus": []}
    return Going(folder, None, told["pid"], told["gpus"])


def _start(folder: Path, run: Training, verb: str, gpus: list[str]) -> subprocess.Popen[bytes]:
    """Its configuration lies beside its log, and is kept. Its process inherits the lock, and so
    has it until it ends, whatever becomes of this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "launch.yaml"
    processes = run.launch.model_copy(update={"nproc": launch.world_size(run)})
    frozen = run_folder.pinned(run, folder).model_copy(update={"launch": processes})
    run_folder.write_config(config, frozen)
    env = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    command = [sys.executable, "-m", "kalmagrove", verb, "--config", str(config)]
    lock = run_folder.hold(folder / LOCK)
    if lock is None:
        raise ConfigError("name", folder.name, "is being trained by another process")
    try:
        with (folder / "launch.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=env, start_new_session=True, pass_fds=(lock,)
            )
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps({"pid": process.pid, "gpus": gpus}).encode())
    finally:
        os.close(lock)
    return process


def _last_line(folder: Path) -> str:
    log = folder / "launch.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("kalmagrove: ")] or lines or ["no output"]
    return f"{said[-1]} ({log})"

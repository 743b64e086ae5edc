"""Several runs of a sweep at once on this machine, each with processes and GPUs of its own.

Called by the Hydra launcher `deepspeed`. Each run is a `kalmagrove train --config FILE`, which
starts its processes through the DeepSpeed launcher and writes to `RUN/launch.log`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kalmagrove.cli import launch, run_folder
from kalmagrove.config import ConfigError, Training


@dataclass(frozen=True)
class Going:
    """A run that goes on, and the GPUs it has."""

    folder: Path
    process: subprocess.Popen[bytes]
    gpus: list[str]


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
    todo: list[tuple[Path, Training]] = []
    finished = []
    for run in runs:
        if run.cluster is not None:
            rule, remedy = "is for hydra/launcher=slurm", "leave it out"
            raise ConfigError("cluster", run.cluster.name, rule, remedy)
        folder = run_folder.choose(run)
        if verb == "train" and run_folder.finished(folder, run) is not None:
            finished.append(folder)
        else:
            todo.append((folder, run))
    gpus = launch.visible_gpus()
    places = at_once or (len(todo) if gpus else 1)
    waiting, going, stopping = list(todo), list[Going](), False
    failed: dict[Path, str] = {}

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        for one in going:
            one.process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while going or (waiting and not stopping):
            while waiting and not stopping and len(going) < places:
                need = launch.world_size(waiting[0][1]) if gpus else 0
                if need > len(gpus):
                    break
                folder, run = waiting.pop(0)
                mine, gpus = gpus[:need], gpus[need:]
                going.append(Going(folder, _start(folder, run, verb, mine), mine))
                print(f"{folder} begins{' on GPU ' * bool(mine)}{','.join(mine)}", flush=True)
            time.sleep(0.2)
            for one in [one for one in going if one.process.poll() is not None]:
                going.remove(one)
                gpus += one.gpus
                code = launch.exit_code(one.process.returncode)
                print(f"{one.folder} ends with code {code}", flush=True)
                if code:
                    failed[one.folder] = f"exit code {code}: {_last_line(one.folder)}"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed |= {folder: "was not begun" for folder, _ in waiting}
    return failed, [folder for folder, _ in todo], finished


def _start(folder: Path, run: Training, verb: str, gpus: list[str]) -> subprocess.Popen[bytes]:
    """Its configuration lies beside its log, and is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "launch.yaml"
    processes = run.launch.model_copy(update={"nproc": launch.world_size(run)})
    frozen = run_folder.pinned(run, folder).model_copy(update={"launch": processes})
    run_folder.write_config(config, frozen)
    env = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    command = [sys.executable, "-m", "kalmagrove", verb, "--config", str(config)]
    with (folder / "launch.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def _last_line(folder: Path) -> str:
    log = folder / "launch.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line for line in lines if line.startswith("kalmagrove: ")] or lines or ["no output"]
    return f"{said[-1]} ({log})"

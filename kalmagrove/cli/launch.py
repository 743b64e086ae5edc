"""Which processes a run has, and the command of the DeepSpeed launcher that starts them.

A launcher that is already there (deepspeed, torchrun, srun) is recognised by the variables it sets.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kalmagrove.config import ConfigError, Training

OURS = "KALMAGROVE_LAUNCHER"  # set by `kalmagrove.engine.launcher` for its ranks


def launched_world_size() -> int | None:
    """Processes of the launcher that started this one; None if none did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a task of srun
        tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
        return tasks if tasks > 1 else None  # one task may be a shell: `srun --pty bash`
    return None


def launched(in_sweep: bool) -> bool:
    """Whether a launcher started this process, which then is one rank of one run.

    Raises:
        ConfigError: it was given a sweep.
    """
    if launched_world_size() is None:
        return False
    if in_sweep:
        rule, remedy = "starts the processes of its runs itself", "leave out the launcher"
        raise ConfigError("argument", "-m", rule, remedy)
    return True


def launched_rank() -> int:
    """This process's rank, as its launcher says; 0 if none did."""
    if launched_world_size() is None:
        return 0
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size(run: Training) -> int:
    """The processes of the run: a launcher's, else those to start.

    Raises:
        ConfigError: if `launch.nproc` contradicts the launcher, or exceeds the visible GPUs; or if
            `launch.max_restarts` is given and others start the processes.
    """
    launched, wanted = launched_world_size(), run.launch.nproc
    others = run.cluster is not None or (launched is not None and OURS not in os.environ)
    if others and run.launch.max_restarts:
        raise ConfigError(
            "launch.max_restarts",
            run.launch.max_restarts,
            "is for processes that kalmagrove starts itself",
            "leave it out under deepspeed, torchrun and srun, which have their own; jobs of Slurm "
            "are queued again up to cluster.slurm.restarts times",
        )
    if launched is None:
        return _processes_to_start(run)
    if wanted not in ("auto", 1, launched):
        raise ConfigError(
            "launch.nproc",
            wanted,
            f"contradicts the launcher, which started {launched} processes",
            "leave it out under deepspeed, torchrun and srun",
        )
    return launched


def _processes_to_start(run: Training) -> int:
    """`launch.nproc`; auto is as many GPUs as layout and batch divide over, else `cpu_nproc`.

    Of a run for a cluster: auto is all its GPUs.
    """
    wanted = run.launch.nproc
    if run.cluster is not None:
        return run.cluster.gpus if wanted == "auto" else wanted
    if wanted == 1:
        return 1
    gpus = visible_gpus()
    if wanted != "auto":
        if gpus and len(gpus) < wanted:
            raise ConfigError(
                "launch.nproc", wanted, f"must be at most the {len(gpus)} visible GPUs", "use auto"
            )
        return wanted
    if not gpus:
        return run.launch.cpu_nproc
    for count in range(len(gpus), 0, -1):
        try:
            run.check_world(count)
            if count < len(gpus):
                print(
                    f"kalmagrove: using {count} of {len(gpus)} GPUs, over which the layout and "
                    f"batch.tokens={run.batch.tokens} divide; try more batch.tokens, a smaller "
                    "batch.micro or another parallel.*",
                    file=sys.stderr,
                )
            return count
        except ConfigError:
            continue
    return len(gpus)  # fewer would fit no better: let check_world explain


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs this process may use, without initialising any."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu.strip() for gpu in listed.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def check_here(run: Training) -> None:
    """ConfigError if the run is meant for a cluster, and would be started on this machine."""
    if run.cluster is not None:
        rule, remedy = "says where Slurm starts runs", "add -m hydra/launcher=slurm or leave it out"
        raise ConfigError("cluster", run.cluster.name, rule, remedy)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Afterwards this process looks as if it had not been started by a launcher again.

    `connect` sets the variables of one; the next run of a sweep in this process must not see them.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]


def exit_code(returned: int) -> int:
    """A shell's code (128 + signal) for a process killed by a signal.

    `returned` is negative if it was the launcher; if it was a rank, the launcher passes the
    negative number on to the system, which keeps its last eight bits.
    """
    if returned < 0:
        return 128 - returned
    return 128 + 256 - returned if returned > 192 else returned


def environment() -> dict[str, str]:
    """This process's, for the processes that `command` starts."""
    found = dict(os.environ)
    if not visible_gpus():
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def command(run: Training, nproc: int) -> list[str]:
    """The command of DeepSpeed's launcher on this machine.

    Not its `runner`, which looks at host files, hides the launcher's death by a signal, and takes
    no names of GPUs (GPU-..., MIG-...) but numbers.
    """
    from kalmagrove.engine.connect import free_port

    devices = visible_gpus()[:nproc] or [str(i) for i in range(nproc)]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    command = [sys.executable, "-m", "kalmagrove.engine.launcher", "--save"]
    command += [str(run.launch.reserve), "--quiet", "--no_local_rank"]
    command += [f"--world_info={world}", "--master_addr=127.0.0.1"]
    return [*command, f"--master_port={run.launch.port or free_port()}", "--module"]

"""Start the processes of a run through the DeepSpeed launcher, and pass signals on to them.

A launcher that is already there (deepspeed, torchrun, srun) is recognised by the variables it sets.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from kalmagrove.config import ConfigError, Run


def launched_world_size() -> int | None:
    """Processes of the launcher that started this one; None if none did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:  # a task of srun
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return None


def launched_rank() -> int:
    """This process's rank, as its launcher says; 0 if none did."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def processes_to_start(run: Run) -> int:
    """`launch.nproc`; auto is as many GPUs as the batch divides over, else `cpu_nproc`."""
    if run.launch.nproc != "auto":
        return run.launch.nproc
    gpus = visible_gpus()
    if not gpus:
        return run.launch.cpu_nproc
    for count in range(len(gpus), 0, -1):
        try:
            run.check_world(count)
            return count
        except ConfigError:
            continue
    return len(gpus)  # one process would fit no better: let check_world explain


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs this process may use, without initialising any."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [gpu for gpu in listed.split(",") if gpu.strip() not in ("", "-1")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def launch(run: Run, config: Path, nproc: int) -> int:
    """Train with `nproc` local processes from a frozen configuration; returns the exit code.

    The launcher runs in a session of its own: a Ctrl-C reaches this process alone, which asks the
    ranks to stop through a file, so that they finish their step and save. A second one ends them.
    """
    handle, stop_file = tempfile.mkstemp(prefix="kalmagrove-stop-")
    os.close(handle)
    os.unlink(stop_file)
    environment = os.environ | {"KALMAGROVE_STOP_FILE": stop_file}
    if not visible_gpus():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    process = subprocess.Popen(
        [*_launcher(run, nproc), "--module", "kalmagrove", "train", "--config", str(config)],
        env=environment,
        start_new_session=True,
    )

    def on_signal(signum: int, frame: FrameType | None) -> None:
        if Path(stop_file).exists() and signum == signal.SIGINT:
            os.killpg(process.pid, signal.SIGKILL)
        Path(stop_file).touch()

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        Path(stop_file).unlink(missing_ok=True)


def _launcher(run: Run, nproc: int) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
    command += ["--hostfile", os.devnull]  # this machine, whatever /job/hostfile says
    gpus = visible_gpus()
    if gpus and len(gpus) < nproc:
        raise ConfigError(
            "launch.nproc", nproc, f"must be at most the {len(gpus)} visible GPUs", "use auto"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        command += ["--include", "localhost:" + ",".join(gpus[:nproc])]
    else:
        command += ["--num_gpus", str(nproc)]
    port = run.launch.port or free_port()
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(port)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

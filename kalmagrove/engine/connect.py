"""From a started process to one that can talk to the others; the first call of a training command.

Works under `deepspeed`, `torchrun`, `srun` and as a plain process.
"""

import math
import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch

from kalmagrove.config import ConfigError, Training
from kalmagrove.engine.signals import stop_with_launcher

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def connect(run: Training) -> torch.device:
    """Initialise torch.distributed through DeepSpeed, threads and the device of this process.

    Raises:
        ConfigError: if a launcher set only some of its variables, or if there are more processes on
            this machine than GPUs.
    """
    stop_with_launcher()
    found = rendezvous(os.environ, run.launch.port)
    os.environ.update(found)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if run.engine.threads or os.environ.get("DS_ACCELERATOR") == "cpu":
        torch.set_num_threads(run.engine.threads or _default_threads(os.environ))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from kalmagrove.engine.compat import skip_shm_build

    by_srun = bool(found) and "SLURM_STEP_NUM_TASKS" in os.environ
    device = _device(int(os.environ["LOCAL_RANK"]), get_accelerator().device_name(), by_srun)
    if device.type == "cpu":
        skip_shm_build()
    else:
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses the GPU
        get_accelerator().set_device(device.index)
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name(),
            verbose=False,
            timeout=timedelta(seconds=run.launch.timeout),
        )
    return device


def disconnect() -> None:
    """Leave the process group, so that the interpreter exits without complaints. Collective."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rendezvous(env: Mapping[str, str], port: int | None = None) -> dict[str, str]:
    """The variables of torch's env:// rendezvous that are missing in `env`.

    A launcher's own variables win; then those of an `srun` step; else the process is alone. Inside
    a batch script, but outside `srun`, Slurm describes tasks that nobody started: only SLURM_STEP_*
    counts.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in REQUIRED if name not in env]
        if missing:
            raise ConfigError(
                "environment",
                f"RANK={env.get('RANK')}",
                f"must come with {', '.join(missing)}",
                "start with deepspeed, torchrun or srun, or unset RANK and WORLD_SIZE",
            )
        return {}
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        job = int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
        return {
            "RANK": env["SLURM_PROCID"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": _first_count(env.get("SLURM_STEP_TASKS_PER_NODE", "1")),
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
            "MASTER_PORT": env.get("MASTER_PORT") or str(port or 20000 + job % 20000),
        }
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
    }


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list.

    >>> first_host("gpu[007-009,12],login1")
    'gpu007'
    """
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodelist)
    assert match, f"not a Slurm node list: {nodelist}"
    return match[1] + (match[2] or "") + match[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_count(tasks_per_node: str) -> str:
    """The first number of Slurm's "4(x2),3"."""
    match = re.match(r"\d+", tasks_per_node)
    return match[0] if match else "1"


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may keep busy: by its affinity, and by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _default_threads(env: Mapping[str, str]) -> int:
    """This process's share of the machine's cores."""
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    return max(1, usable_cores() // int(local))


def _device(local_rank: int, kind: str, by_srun: bool) -> torch.device:
    """The GPU numbered `local_rank`; or the only one, where Slurm shows each task its own."""
    if kind != "cuda":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if by_srun and count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            "LOCAL_RANK",
            local_rank,
            f"must be below the number of GPUs this process sees, {count}",
            f"start {count} processes on this machine (launch.nproc={count})",
        )
    return torch.device("cuda", local_rank)

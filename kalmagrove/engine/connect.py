"""From a started process to one that can talk to the others; the first call of a training command.

Works under `deepspeed`, `torchrun`, `srun` and as a plain process.
"""

import os
import re
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch

from kalmagrove.config import ConfigError, Run

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def connect(run: Run) -> torch.device:
    """Initialise torch.distributed through DeepSpeed, threads and the device of this process.

    Raises:
        ConfigError: if a launcher set only some of its variables, or if there are more processes on
            this machine than GPUs.
    """
    os.environ.update(rendezvous(os.environ, run.launch.port))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if run.engine.threads or os.environ.get("DS_ACCELERATOR") == "cpu":
        torch.set_num_threads(run.engine.threads or _default_threads(os.environ))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from kalmagrove.engine.compat import skip_shm_build

    device = _device(int(os.environ["LOCAL_RANK"]), get_accelerator().device_name())
    if device.type == "cpu":
        skip_shm_build()
    else:
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


def _default_threads(env: Mapping[str, str]) -> int:
    """This process's share of the cores it may run on."""
    local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
    return max(1, len(os.sched_getaffinity(0)) // int(local))


def _device(local_rank: int, kind: str) -> torch.device:
    if kind != "cuda":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            "launch.nproc",
            local_rank + 1,
            f"must be at most this machine's {count} visible GPUs",
            f"try launch.nproc={count}",
        )
    return torch.device("cuda", local_rank)

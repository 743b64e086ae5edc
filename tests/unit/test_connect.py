"""Where a process finds the others, under every launcher; and requests to stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kalmagrove.config import ConfigError
from kalmagrove.engine.connect import _device, first_host, rendezvous, usable_cores
from kalmagrove.engine.signals import STOP_FILE_VARIABLE, StopRequest
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "123456",
}


def test_a_plain_process_is_alone() -> None:
    env = rendezvous({})
    assert (env["RANK"], env["WORLD_SIZE"], env["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert rendezvous({}, port=1234)["MASTER_PORT"] == "1234"


def test_a_launchers_variables_win() -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert rendezvous({**SRUN, **dict.fromkeys(names, "1")}) == {}


def test_half_a_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        rendezvous({"RANK": "0", "WORLD_SIZE": "2"})


def test_srun_steps() -> None:
    env = rendezvous(SRUN)
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("5", "1", "8")
    assert (env["MASTER_ADDR"], env["LOCAL_WORLD_SIZE"]) == ("gpu007", "4")
    assert rendezvous({**SRUN, "SLURM_PROCID": "0"})["MASTER_PORT"] == env["MASTER_PORT"]
    assert 1024 < int(env["MASTER_PORT"]) < 65536


def test_a_batch_script_outside_srun_is_alone() -> None:
    assert rendezvous({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a1,b2", "a1"), ("n[3,5-7]", "n3"), ("r[01-02]-gpu,x", "r01-gpu")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_cores_follow_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores(tmp_path / "absent") == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == 8
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    assert usable_cores(tmp_path) == 3
    (tmp_path / "cpu.max").write_text("5000 100000\n")
    assert usable_cores(tmp_path) == 1
    old = tmp_path / "v1" / "cpu"
    old.mkdir(parents=True)
    (old / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1", 8), ("200000", 2), ("9900000", 8)):
        (old / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert usable_cores(tmp_path / "v1") == cores


def test_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _device(3, "cuda", by_srun=True).index == 3
    with pytest.raises(ConfigError, match=r"LOCAL_RANK=4 .*launch\.nproc=4"):
        _device(4, "cuda", by_srun=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _device(3, "cuda", by_srun=True).index == 0, "--gpus-per-task=1 shows each task its own"
    with pytest.raises(ConfigError, match="LOCAL_RANK=3"):
        _device(3, "cuda", by_srun=False)


def test_signals_are_remembered_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    groups = Groups.single()
    with StopRequest() as stop:
        assert stop.agreed(groups) == "go on"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(groups) == "stop"
        assert stop.agreed(groups, over_budget=True) == "over budget"
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stop"
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(file))
    with StopRequest() as stop:
        assert stop.agreed(Groups.single()) == "go on"
        file.touch()
        assert stop.agreed(Groups.single()) == "stop"


def test_the_second_interrupt_kills_at_once() -> None:
    code = (
        "import os, signal\n"
        "from kalmagrove.engine.signals import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "first\n"
    assert done.returncode == -signal.SIGINT

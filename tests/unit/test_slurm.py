"""The batch script and what is told to sbatch; the real Slurm is in tests/cluster."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from kalmagrove.cli import multirun, slurm
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import ConfigError, KalmaGroveError, Run, load
from kalmagrove.config.attempts import VARIABLE, Attempt
from kalmagrove.engine.signals import StopRequest
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit
CLUSTER = {
    "partition": "gpu",
    "account": "lab",
    "gres": "gpu:h100",
    "time": "1-00:00:00",
    "modules": ["cuda/12.4"],
    "env": {"NCCL_SOCKET_IFNAME": "ib0", "ODD": "a b"},
    "extra": ["--exclusive"],
}


def run_of(*words: str, **changes: object) -> Run:
    tree = compose_tree("train", ["model=kan_tiny", "ffn=kan", "cluster=h100x64", *words])
    tree["cluster"]["slurm"] = CLUSTER | changes
    return load(tree)


def test_a_run_for_a_cluster_has_its_processes() -> None:
    assert slurm.shape(run_of("launch.nproc=auto")) == (8, 8)
    assert slurm.shape(run_of("launch.nproc=16")) == (2, 8)
    assert slurm.shape(run_of("launch.nproc=3")) == (1, 3)
    for wrong in (12, 128):
        with pytest.raises(ConfigError, match=f"launch.nproc={wrong} must be at most cluster.gpus"):
            slurm.shape(run_of(f"launch.nproc={wrong}"))
    plain = load(compose_tree("train", ["cluster=h100x8"]))
    with pytest.raises(ConfigError, match="cluster=h100x8 must be one with a section `slurm`"):
        slurm.shape(plain)
    with pytest.raises(ConfigError, match=r"cluster.slurm.time=.* should match pattern"):
        run_of(time="soon")


@pytest.mark.parametrize("start", ["srun", "deepspeed"])
def test_the_batch_script(start: str, tmp_path: Path) -> None:
    run = run_of("launch.nproc=16", start=start, restarts=7, container="apptainer exec i.sif")
    text = slurm.batch_script(run, "train", tmp_path / "a b.runs", tmp_path / "code", "0-3%2")
    options = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert options == [
        "--job-name=a b",
        "--partition=gpu",
        "--account=lab",
        "--nodes=2",
        "--ntasks-per-node=8",
        "--cpus-per-task=1",
        "--gres=gpu:h100:8",
        "--time=1-00:00:00",
        "--signal=B:USR1@120",
        "--array=0-3%2",
        f"--output={tmp_path}/a b.out",
        "--requeue",
        "--open-mode=append",
        "--exclusive",
    ]
    assert text.index("#SBATCH --exclusive") < text.index("set -uo pipefail"), "else Slurm ignores"
    for part in ("module load cuda/12.4", "export ODD='a b'", f"'{tmp_path}/a b.runs'", "-le 7 ]"):
        assert part in text
    assert "apptainer exec i.sif" in text
    assert not any(f"@{word}@" in text for word in ("OPTIONS", "RUNS", "CODE", "SETUP", "START"))
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    (line,) = [line for line in text.splitlines() if VARIABLE in line]
    told = subprocess.run(["bash", "-c", f"{line}; env"], text=True, capture_output=True).stdout
    given = Attempt.given(dict(pair.split("=", 1) for pair in told.splitlines() if "=" in pair))
    assert given is not None
    assert (given.name, given.age < 60) == ("", True), "rank 0 has a heartbeat of its own"


IN_A_JOB = """#!/bin/sh
case $0:$1 in
  *srun:*) cat HERE/srun >&2; cp HERE/summary.json "$RUN/" 2>/dev/null; exit $(cat HERE/code) ;;
  *squeue:*) echo RUNNING ;;
  *scontrol:show) echo n1 ;;
  *scontrol:requeue) exit 1 ;;
esac
"""
KILLED = "srun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 1\n"
BAD = "srun: error: n1: tasks 0-1: Exited with exit code 3\n"
HUNG = "srun: error: n1: task 1: Exited with exit code 77\nsrun: error: n1: task 0: Killed\n"
TERMINATED = "srun: error: n1: tasks 0-1: Terminated\n"


@pytest.mark.parametrize(
    ("srun", "code", "status", "why"),
    [
        ("", 143, "stopped", "stopped"),
        (KILLED, 137, None, "a rank died: Killed"),
        (KILLED, 137, "failed", "a rank died: Killed"),
        (KILLED, 137, "done", None),
        (HUNG, 137, None, "the ranks hung"),
        ("", 143, "hung", "the ranks hung"),
        (TERMINATED, 143, None, "stopped before the first step"),
        (BAD + TERMINATED, 143, None, None),
        (BAD, 3, "failed", None),
        (BAD.replace("3", "76"), 76, "budget", None),
        (BAD.replace("code 3", "code 247"), 247, None, "a rank died"),  # DeepSpeed's launcher
        ("", 1, None, None),
    ],
)
def test_which_ends_are_queued_again(
    srun: str, code: int, status: str | None, why: str | None, tmp_path: Path
) -> None:
    done = in_a_job(tmp_path, srun, code, status)
    assert done.returncode == code, done.stderr
    log = (tmp_path / "run" / "slurm" / "batch.log").read_text()
    again = [line.partition("is queued again: ")[2] for line in log.splitlines() if "again" in line]
    assert again == ([] if why is None else [why])


def in_a_job(
    place: Path, srun: str, code: int, status: str | None, number: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run the batch script of a try as Slurm does, with programs of `IN_A_JOB` that answer so."""
    here, folder = place / "bin", place / "run"
    here.mkdir(exist_ok=True)
    for name in ("srun", "squeue", "scontrol"):
        (here / name).write_text(IN_A_JOB.replace("HERE", str(place)))
        (here / name).chmod(0o755)
    (place / "srun").write_text(srun)
    (place / "code").write_text(str(code))
    if status:
        (place / "summary.json").write_text(json.dumps({"status": status}, indent=2))
    listed = place / "one.runs"
    listed.write_text(f"{folder}\n")
    run = run_of("launch.nproc=2", modules=[], restarts=8)
    text = slurm.batch_script(run, "train", listed, place)
    env = {"PATH": f"{here}:{os.environ['PATH']}", "RUN": str(folder), "SLURM_JOB_ID": "12"}
    env |= {
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_END_TIME": "0",
        "SLURM_RESTART_COUNT": f"{number}",
    }
    return subprocess.run(["bash"], input=text, text=True, env=env, capture_output=True)


def test_tries_that_get_nowhere_end(tmp_path: Path) -> None:
    """Three in a row that save nothing new; or one more than `cluster.slurm.restarts`."""
    checkpoints, log = tmp_path / "run" / "checkpoints", tmp_path / "run" / "slurm" / "batch.log"
    for number in range(6):
        done = in_a_job(tmp_path, "", 143, "stopped", number)
        assert done.returncode == (1 if number == 5 else 143), number
        if number == 1:
            (checkpoints / "step-000004").mkdir(parents=True)
    assert log.read_text().splitlines()[-1].endswith("gives up: 3 tries in a row saved nothing new")
    (checkpoints / "step-000008").mkdir()
    assert in_a_job(tmp_path, "", 143, "stopped", 8).returncode == 143
    (checkpoints / "step-000010").mkdir()
    assert in_a_job(tmp_path, "", 143, "stopped", 9).returncode == 1
    assert log.read_text().splitlines()[-1].endswith("gives up: it was queued again 8 times")


STAND_IN = """#!/bin/sh
case $0 in
  *sbatch) env >"$HERE/env"; [ ! -e "$HERE/refuse" ] || { echo no account >&2; exit 1; }; echo 12;;
  *scontrol) cat "$HERE/state" ;;
esac
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that answer like sbatch and scontrol, as the files in this folder say."""
    here = tmp_path / "bin"
    here.mkdir()
    for name in ("sbatch", "scontrol"):
        (here / name).write_text(STAND_IN)
        (here / name).chmod(0o755)
    (here / "state").write_text("JobId=12 JobState=RUNNING Reason=None\n")
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(here))
    monkeypatch.setattr(slurm, "copy_code", lambda target: target.mkdir())
    return here


def test_submitting(
    programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "KALMAGROVE_STOP_FILE", "SLURM_CONF"):
        monkeypatch.setenv(name, "outer")
    run = run_of("launch.nproc=auto", "name=one", f"dir={tmp_path}/runs")
    jobs, finished = slurm.submit([run], "train")
    assert ([job.job for job in jobs], finished) == (["12"], [])
    told = dict(line.split("=", 1) for line in (programs / "env").read_text().splitlines())
    assert told["SLURM_CONF"] == "outer"
    assert not {"SLURM_JOB_ID", "SBATCH_PARTITION", "KALMAGROVE_STOP_FILE"} & set(told)
    folder = tmp_path / "runs" / "one"
    frozen = (folder / "slurm" / "config.yaml").read_text()
    assert "nproc: 64" in frozen
    assert slurm.recorded(folder) == jobs[0]
    (programs / "env").unlink()
    assert slurm.submit([run], "train") == (jobs, []), "it goes on: not submitted again"
    assert not (programs / "env").exists()
    assert "is job 12 already" in capsys.readouterr().out
    (programs / "state").write_text("JobState=FAILED\n")
    (programs / "refuse").touch()
    with pytest.raises(KalmaGroveError, match=r"sbatch refuses .*one.sbatch: no account"):
        slurm.submit([run], "train")
    other = run_of("launch.nproc=8", "name=two", f"dir={tmp_path}/runs")
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.at_once=2 makes one array"):
        slurm.submit([run, other], "train", at_once=2)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="hydra/launcher=slurm needs Slurm's sbatch"):
        slurm.submit([run_of()], "train")
    with pytest.raises(KalmaGroveError, match="scontrol is not on the PATH"):
        slurm.Job(tmp_path, "1").state  # noqa: B018 - a property that raises


def test_waiting_tells_what_failed(programs: Path, tmp_path: Path) -> None:
    job = slurm.Job(tmp_path / "run", "12")
    (job.folder / "slurm" / "12.0").mkdir(parents=True)
    (programs / "state").write_text("JobState=COMPLETED\n")
    (job.folder / "summary.json").write_text(json.dumps({"status": "done"}))
    said: list[str] = []
    assert slurm.wait([job], 0.01, said.append) == {}
    assert said[0].endswith("job 12 run: COMPLETED")
    (programs / "state").write_text("JobState=FAILED\n")
    (job.folder / "summary.json").write_text(json.dumps({"status": "budget"}))
    (job.folder / "slurm" / "12.0" / "started").touch()
    (job.folder / "slurm" / "12.0" / "rank-1.log").write_text("kalmagrove: budget.usd=1 ...\n")
    failed = slurm.wait([job], 0.01, said.append)
    assert failed[job.folder].startswith(
        "job 12 FAILED, the run is budget: kalmagrove: budget.usd=1 ... ("
    )
    with pytest.raises(SystemExit) as end:
        multirun.tell(failed, [job.folder], [])
    assert end.value.code == 76


def test_ranks_stop_before_the_end_of_the_jobs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups.single()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert StopRequest(reserve=60).agreed(groups) == "go on"
    stop = StopRequest(reserve=110)
    assert stop.agreed(groups) == "stop"
    assert stop.reason == "the end of the job's time"
    going = StopRequest(reserve=60)
    for hour in (-3600, 3600):  # the clock is set while the run goes on
        later = time.time() + hour
        monkeypatch.setattr("time.time", lambda now=later: now)
        assert going.agreed(groups) == "go on"
        monkeypatch.undo()
    monkeypatch.setenv("SLURM_JOB_END_TIME", "")
    assert StopRequest(reserve=110).agreed(groups) == "go on"

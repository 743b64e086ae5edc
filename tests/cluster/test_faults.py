"""Machines, daemons and jobs of a real Slurm that are killed: what goes on by itself, and what when
it is submitted again.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kalmagrove.cli.slurm import recorded
from tests.cluster.conftest import SCRIPT, kalmagrove, lines, losses, run, submit, until
from tests.cluster.test_slurm import Env, begun, state, summary
from tests.dist.faults import Fault, injected

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
WORDS = ["steps=40", "launch.nproc=2", "checkpoint.every=8"]


@pytest.fixture(scope="module")
def whole(
    slurm: Env, settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, float]:
    """Losses of a run that nothing happens to."""
    place = tmp_path_factory.mktemp("whole")
    command = kalmagrove("train", *settings, *WORDS, "name=whole")
    done = run("srun", "-n2", "-t5", "--mem=6G", *command, cwd=place, env=slurm)
    assert done.returncode == 0, done.stderr
    return losses(place / "runs" / "whole")


@pytest.fixture
def up(slurm: Env) -> Iterator[Path]:
    """The Slurm's folder. Afterwards all its daemons run again."""
    place = Path(slurm["SLURM_CONF"]).parent
    yield place
    subprocess.run([SCRIPT, "start", place], check=True, timeout=300)


def start(
    name: str, step: int, settings: list[str], cwd: Path, env: Env, steps: int = 40
) -> tuple[Path, str]:
    """Submit a run and wait until it has done a step; its folder and its machine."""
    words = [*settings, *WORDS, f"steps={steps}", f"name={name}", "hydra.launcher.wait=false"]
    done = submit(settings=words, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = cwd / "runs" / name
    until(lambda: begun(folder, step), f"step {step}")
    (machine,) = re.findall("starts on (.*)", (folder / "slurm" / "batch.log").read_text())
    return folder, machine


def follow(folder: Path, env: Env) -> subprocess.CompletedProcess[str]:
    command = kalmagrove("jobs", "follow", str(folder), "--poll=1")
    return run(*command, cwd=folder.parent, env=env, timeout=400)


@contextmanager
def lost_after(seconds: int, env: Env) -> Iterator[None]:
    """Slurm takes a machine for dead whose slurmd does not answer for so long."""
    conf = Path(env["SLURM_CONF"])
    before = conf.read_text()
    conf.write_text(f"{before}SlurmdTimeout={seconds}\n")
    run("scontrol", "reconfigure", cwd=conf.parent, env=env)
    try:
        yield
    finally:
        conf.write_text(before)
        run("scontrol", "reconfigure", cwd=conf.parent, env=env)


def kill_slurmd(up: Path, machine: str) -> None:
    os.kill(int((up / "run" / f"slurmd.{machine}.pid").read_text()), signal.SIGKILL)


def of_job(folder: Path) -> list[psutil.Process]:
    """The step daemons of the run's job, and what runs below them: batch script, srun, ranks."""
    job = recorded(folder)
    assert job is not None
    mark = f"slurmstepd: [{job.job}."
    roots = [p for p in psutil.process_iter() if " ".join(p.cmdline()).startswith(mark)]
    assert roots
    return [p for root in roots for p in (root, *root.children(recursive=True))]


def ranks(folder: Path) -> list[psutil.Process]:
    """In their order."""
    found = [p for p in of_job(folder) if "kalmagrove" in p.cmdline() and p.name() != "srun"]
    return sorted(found, key=lambda process: process.environ()["SLURM_PROCID"])


def hang_in_a_step(folder: Path, step: int) -> None:
    """Suspend the second rank once it has done `step`: not in a save, which may take long."""
    until(lambda: begun(folder, step), "it trains again")
    rank = ranks(folder)[1]
    rank.suspend()
    time.sleep(1)  # the other goes on until it waits for this one
    reached = max(losses(folder))
    if reached % 8 == 0:
        rank.resume()
        hang_in_a_step(folder, reached + 1)


def lost(folder: Path) -> list[int]:
    """Steps that each session found to be lost."""
    first = [line for line in lines(folder) if line["event"] in ("start", "resume")]
    return [line["lost_steps"] for line in first]


def ended_well(folder: Path, whole: dict[int, float], env: Env) -> None:
    assert summary(folder)["status"] == "done"
    assert losses(folder) == whole
    verified = run(*kalmagrove("ledger", "verify", str(folder)), cwd=folder, env=env)
    assert verified.returncode == 0, verified.stdout


def test_slurmd_is_killed_and_comes_back(
    slurm: Env, up: Path, settings: list[str], whole: dict[int, float], tmp_path: Path
) -> None:
    folder, machine = start("daemon", 3, settings, tmp_path, slurm)
    kill_slurmd(up, machine)
    time.sleep(2)
    subprocess.run([SCRIPT, "start", up], check=True, timeout=300)
    done = follow(folder, slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "try 0: the ranks ended with code 0, the run is: done" in done.stdout
    assert lost(folder) == [0], "the job has noticed nothing"
    ended_well(folder, whole, slurm)


def test_a_machine_dies_with_its_slurmd(
    slurm: Env, up: Path, settings: list[str], whole: dict[int, float], tmp_path: Path
) -> None:
    """Slurm misses it after SlurmdTimeout, and queues the job again for another machine."""
    with lost_after(10, slurm):
        folder, machine = start("machine", 11, settings, tmp_path, slurm)
        processes = of_job(folder)
        kill_slurmd(up, machine)
        for process in processes:
            process.kill()
        reached = max(losses(folder))
        assert reached < 40, "it came in time"
        done = follow(folder, slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (folder / "slurm" / "batch.log").read_text()
    (other,) = re.findall("try 1: starts on (.*)", log)
    assert other != machine
    assert 1 <= lost(folder)[1] <= 8, "no more than since the last checkpoint"
    ended_well(folder, whole, slurm)


def test_a_machine_that_slurm_has_lost_goes_on(
    slurm: Env, up: Path, settings: list[str], tmp_path: Path
) -> None:
    """Its ranks save and leave as soon as the next try asks them to."""
    with lost_after(10, slurm):
        folder, machine = start("lost", 3, settings, tmp_path, slurm, steps=100000)
        kill_slurmd(up, machine)
        until(lambda: len(lost(folder)) == 2, "the next try")
    assert lost(folder) == [0, 0]
    assert f"try 1: starts on {machine}" not in (folder / "slurm" / "batch.log").read_text()
    job = recorded(folder)
    assert job is not None
    assert run("scancel", job.job, cwd=tmp_path, env=slurm).returncode == 0


def test_a_rank_is_killed_and_then_one_hangs(
    slurm: Env, settings: list[str], whole: dict[int, float], tmp_path: Path
) -> None:
    words = [*settings, "launch.hang_timeout=10"]
    folder, _ = start("ranks", 11, words, tmp_path, slurm)
    ranks(folder)[1].kill()
    until(lambda: len(lost(folder)) == 2, "another try")
    after = max(losses(folder))
    hang_in_a_step(folder, after + 2)
    done = follow(folder, slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (folder / "slurm" / "batch.log").read_text()
    assert "try 0: is queued again: a rank died: Killed" in log
    assert "try 1: is queued again: the ranks hung" in log
    assert "try 2: the ranks ended with code 0, the run is: done" in log
    assert all(steps <= 8 for steps in lost(folder))
    ended_well(folder, whole, slurm)


def test_out_of_time_without_a_reaction(
    slurm: Env, settings: list[str], whole: dict[int, float], tmp_path: Path
) -> None:
    """Ranks that wait for one that hangs do not stop when they are asked to: Slurm kills them."""
    # Slurm may warn a minute early: a limit of one minute would stop the run as it begins.
    words = [*settings, "cluster.slurm.time=00:02:00", "launch.reserve=1"]
    hangs = slurm | injected(tmp_path, "late", Fault("sleep", "data", step=12))
    folder, _ = start("late", 11, words, tmp_path, hangs)
    until(lambda: state(folder, slurm) == "TIMEOUT", "the job is killed", seconds=300)
    until(lambda: not any(map(_late, psutil.process_iter())), "its processes are gone")
    again = submit(settings=[*settings, *WORDS, "name=late"], cwd=tmp_path, env=slurm)
    assert again.returncode == 0, again.stdout + again.stderr
    assert lost(folder) == [0, 3], "of the eleven steps, eight were saved"
    ended_well(folder, whole, slurm)


def _late(process: psutil.Process) -> bool:
    try:
        return "runs/late/slurm" in " ".join(process.cmdline())
    except psutil.Error:
        return False

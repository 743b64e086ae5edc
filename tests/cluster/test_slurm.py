"""Runs as jobs of a real Slurm: preempted, out of time, failing, cancelled, in arrays."""

import json
import re
import shlex
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from kalmagrove.cli.slurm import recorded
from tests.cluster.conftest import SMALL, kalmagrove, lines, losses, run, submit, sweep, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
Env = dict[str, str]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def state(folder: Path, env: Env) -> str:
    job = recorded(folder)
    assert job is not None
    command = ["scontrol", "--oneliner", "show", "job", job.job]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    (found,) = re.findall(r"JobState=(\w+)", shown.stdout)
    return found


def begun(folder: Path, step: int) -> bool:
    return max(losses(folder), default=0) >= step


def tensors(folder: Path) -> dict[str, bytes]:
    """What the newest checkpoint's files hold: weights, and the optimizer's states."""
    files = sorted(max((folder / "checkpoints").iterdir()).glob("*.safetensors"))
    found = {path.name: path.read_bytes() for path in files}
    assert list(found) == ["model.safetensors", *(f"shard-0000{i}.safetensors" for i in range(2))]
    # Behind the header, which tells the states of Python's and NumPy's generators, not used here.
    return {name: raw[8 + int.from_bytes(raw[:8], "little") :] for name, raw in found.items()}


def test_preempted_saved_queued_again_and_bit_exact(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, "steps=60", "launch.nproc=2"]
    done = submit("hydra.launcher.wait=false", "name=cut", settings=words, cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "cut"
    until(lambda: begun(folder, 5), "step 5")
    job = ["--partition=high", "-N2", "--exclusive", "--wait", "-o", "/dev/null", "--wrap=sleep 3"]
    assert run("sbatch", *job, cwd=tmp_path, env=slurm).returncode == 0
    assert len(losses(folder)) < 60, "it came in time"
    # Whoever submitted is gone; another shell follows the job to its end.
    done = run(*kalmagrove("jobs", "follow", "runs", "--poll=1"), cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is warned" in done.stdout
    assert "the ranks ended with code 0, the run is: done" in done.stdout

    found = lines(folder)
    sessions = [line for line in found if line["event"] in ("start", "resume")]
    assert [line["lost_steps"] for line in sessions] == [0, 0], "nothing is done twice"
    seconds = [line["wall_seconds"] for line in found]
    assert seconds == sorted(seconds)
    log = (folder / "slurm" / "batch.log").read_text()
    (began,) = re.findall(r"(\S+) job \S+ try 0: starts on", log)
    stop = next(line for line in found if line["event"] == "stop")
    ends = [datetime.fromisoformat(told).timestamp() for told in (began, stop["time"])]
    assert stop["wall_seconds"] == pytest.approx(ends[1] - ends[0], abs=1.5), "of the job"
    verified = run(*kalmagrove("ledger", "verify", "runs/cut"), cwd=tmp_path, env=slurm)
    assert verified.returncode == 0, verified.stdout
    command = kalmagrove("train", *words, "name=whole")
    whole = run("srun", "-n2", "-t5", "--mem=6G", *command, cwd=tmp_path, env=slurm)
    assert whole.returncode == 0, whole.stderr
    assert losses(folder) == losses(tmp_path / "runs" / "whole")
    assert tensors(folder) == tensors(tmp_path / "runs" / "whole"), "to the last bit"

    # The code and the configuration are those of the submission.
    (place,) = (tmp_path / "runs" / "jobs").iterdir()
    assert (place / "code" / "kalmagrove" / "cli" / "train.py").is_file()
    assert summary(folder)["commit"] == (place / "code" / "COMMIT").read_text().strip()
    assert len(list((folder / "slurm").glob("*.[01]/rank-[01].log"))) == 4
    again = submit("name=cut", settings=words, cwd=tmp_path, env=slurm)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stdout


def test_an_array_is_preempted_while_nobody_watches(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    """Two runs of three at a time. Whoever submitted them is killed, then both are preempted."""
    words = ["hydra.launcher.at_once=2", "steps=100", "launch.nproc=2"]
    command = sweep(*words, "seed=1,2,3", "name=seed-${seed}", settings=settings)
    runs = [tmp_path / "runs" / f"seed-{seed}" for seed in (1, 2, 3)]
    with (tmp_path / "log").open("w") as log:
        shell = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=log, stderr=log)
        until(lambda: all(begun(folder, 5) for folder in runs[:2]), "step 5")
        shell.kill()
        shell.wait()
    job = ["--partition=high", "-N2", "--exclusive", "--wait", "-o", "/dev/null", "--wrap=sleep 3"]
    assert run("sbatch", *job, cwd=tmp_path, env=slurm).returncode == 0
    done = run(*kalmagrove("jobs", "follow", "runs", "--poll=1"), cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = []
    for folder in runs:
        assert summary(folder)["status"] == "done"
        assert set(losses(folder)) == set(range(1, 101))
        sessions = [line for line in lines(folder) if line["event"] in ("start", "resume")]
        assert {line["lost_steps"] for line in sessions} == {0}
        resumed.append(len(sessions) > 1)
    assert resumed[:2] == [True, True]
    again = run(*command, cwd=tmp_path, env=slurm)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 3


def test_preempted_by_sigterm_before_the_first_step(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    """As clusters do that lack `preempt_send_user_signal`: the steps get SIGTERM."""
    conf, setting = Path(slurm["SLURM_CONF"]), "SlurmctldParameters=preempt_send_user_signal\n"
    before = conf.read_text()
    conf.write_text(before.replace(setting, ""))
    run("scontrol", "reconfigure", cwd=tmp_path, env=slurm)
    try:
        words = [*settings, "steps=3", "launch.nproc=2", "name=early"]
        done = submit("hydra.launcher.wait=false", settings=words, cwd=tmp_path, env=slurm)
        assert done.returncode == 0, done.stdout + done.stderr
        folder = tmp_path / "runs" / "early"
        until(lambda: list(folder.glob("slurm/*.0/rank-1.log")), "the ranks start")
        job = ["--partition=high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=sleep 1"]
        assert run("sbatch", *job, cwd=tmp_path, env=slurm).returncode == 0
        done = run(*kalmagrove("jobs", "follow", "runs", "--poll=1"), cwd=tmp_path, env=slurm)
    finally:
        conf.write_text(before)
        run("scontrol", "reconfigure", cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "try 0: the ranks ended with code 143, the run is: none" in done.stdout
    assert "try 1: the ranks ended with code 0, the run is: done" in done.stdout


def test_out_of_time_and_submitted_by_a_job(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    """A reserve of almost all the time leaves room for a step a try."""
    words = ["-m", "hydra/launcher=slurm", "hydra.launcher.wait=false", "cluster=loopback"]
    words += [f"hydra.searchpath=[file://{Path(__file__).with_name('conf')}]", *settings]
    words += ["launch.reserve=598", "steps=3", "name=short", "cluster.slurm.restarts=1"]
    command = kalmagrove("train", *words)
    job = ["--wait", "-p", "main", "-o", "outer.log", f"--wrap={shlex.join(command)}"]
    done = run("sbatch", *job, cwd=tmp_path, env=slurm)
    assert done.returncode == 0, (tmp_path / "outer.log").read_text()
    done = run(*kalmagrove("jobs", "follow", "runs/short", "--poll=1"), cwd=tmp_path, env=slurm)
    assert done.returncode == 1
    assert "is queued again" in done.stdout
    assert "gives up: it was queued again 1 times" in done.stdout, "restarts are capped"
    assert sorted(losses(tmp_path / "runs" / "short")) == [1, 2]
    reasons = [line["status"] for line in lines(tmp_path / "runs/short") if line["event"] == "stop"]
    assert reasons == ["stopped", "stopped"]
    # Submitted again it goes on.
    more = [*settings, "steps=3", "name=short"]
    done = submit(settings=more, cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path / "runs" / "short")["sessions"] == 3


def test_a_failing_run_of_an_array_hides_no_other(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, "steps=4", "launch.nproc=2", "engine.max_nonfinite=1"]
    words += ["optim.lr=1e-3,1e30,2e-3", "name=lr-${optim.lr}"]
    done = submit("hydra.launcher.at_once=1", settings=words, cwd=tmp_path, env=slurm)
    assert done.returncode == 1
    assert "1 of 3 runs failed" in done.stdout
    assert "Traceback" not in done.stderr
    (failed,) = [line for line in done.stdout.splitlines() if "FAILED: " in line]
    assert "no finite update" in failed
    spans = []
    for folder in sorted((tmp_path / "runs").glob("lr-*")):
        fails = "1e+30" in folder.name
        assert summary(folder)["status"] == ("failed" if fails else "done")
        log = (folder / "slurm" / "batch.log").read_text()
        assert "queued again" not in log, "a failure is no preemption"
        times = re.findall(r"(?m)^(\S+) job", log)
        spans.append((times[0], times[-1]))
    assert len(spans) == 3
    spans.sort()
    ordered = [time for span in spans for time in span]
    assert ordered == sorted(ordered), "one at a time"


def test_deepspeed_on_every_machine_and_cancelled(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    words = [*settings, "steps=100000", "launch.nproc=4", "cluster.slurm.start=deepspeed"]
    words += ["name=long", "hydra.launcher.wait=false"]
    done = submit(settings=words, cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "long"
    until(lambda: begun(folder, 3), "step 3", seconds=240)
    listed = run(*kalmagrove("jobs"), cwd=tmp_path, env=slurm)
    assert re.search(r"long +\d+ +RUNNING", listed.stdout), listed.stdout
    again = submit(settings=words, cwd=tmp_path, env=slurm)
    assert "already" in again.stdout, "it is not submitted twice"
    done = run(*kalmagrove("jobs", "cancel", "runs/long"), cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stderr
    until(lambda: state(folder, slurm) == "FAILED", "the job ends", seconds=60)
    found = summary(folder)
    assert (found["status"], found["world_size"]) == ("stopped", 4)
    assert (folder / "checkpoints" / f"step-{found['steps']:06d}").is_dir()
    assert "is cancelled" in (folder / "slurm" / "batch.log").read_text()


def test_scancel_is_not_undone(slurm: Env, settings: list[str], tmp_path: Path) -> None:
    words = [*settings, "steps=100000", "name=gone"]
    done = submit("hydra.launcher.wait=false", settings=words, cwd=tmp_path, env=slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "gone"
    until(lambda: begun(folder, 2), "step 2")
    job = recorded(folder)
    assert job is not None
    assert run("scancel", job.job, cwd=tmp_path, env=slurm).returncode == 0
    done = run(*kalmagrove("jobs", "follow", "runs/gone", "--poll=1"), cwd=tmp_path, env=slurm)
    assert done.returncode == 1
    assert f"job {job.job} CANCELLED, the run is stopped" in done.stdout
    assert "queued again" not in (folder / "slurm" / "batch.log").read_text()


def test_a_cluster_without_a_launcher_is_refused(tmp_path: Path, slurm: Env) -> None:
    done = run(*kalmagrove("train", *SMALL, "cluster=h100x8"), cwd=tmp_path, env=slurm)
    assert done.returncode == 2
    assert "add -m hydra/launcher=slurm" in done.stderr

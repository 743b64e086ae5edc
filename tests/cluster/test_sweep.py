"""`kalmagrove sweep` whose trials are jobs of a real Slurm: preempted, pruned, left alone."""

import json
import subprocess
from pathlib import Path

import pytest

from kalmagrove.cli.slurm import recorded
from tests.cluster.conftest import kalmagrove, lines, losses, run, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
Env = dict[str, str]
CONF = f"hydra.searchpath=[file://{Path(__file__).with_name('conf')}]"


def test_nothing_is_lost_on_a_preemptible_partition(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    words = ["study=taken", CONF, "cluster=loopback", *settings, "launch.nproc=2", "steps=40"]
    words += ["optim.lr=tag(log, interval(1e-3, 1e-2))", "trials=3", "at_once=1", "poll=0.5"]
    place = tmp_path / "runs" / "taken"
    with (tmp_path / "first.log").open("w") as log:
        command = kalmagrove("sweep", *words)
        first = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=log, stderr=log)
        until(lambda: max(losses(place / "trial-000"), default=0) >= 3, "step 3")
        first.kill()  # the job goes on
        first.wait()
    job = ["--partition=high", "-N2", "--exclusive", "--wait", "-o", "/dev/null", "--wrap=sleep 3"]
    assert run("sbatch", *job, cwd=tmp_path, env=slurm).returncode == 0
    done = run(*kalmagrove("sweep", *words), cwd=tmp_path, env=slurm, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    told = json.loads((place / "sweep.json").read_text())
    assert sorted(one["run"] for one in told["runs"]) == [f"trial-00{i}" for i in range(3)]
    assert {(one["status"], one["steps"]) for one in told["runs"]} == {("done", 40)}
    numbers = set()
    for i in range(3):
        folder = place / f"trial-00{i}"
        begun = [line for line in lines(folder) if line["event"] in ("start", "resume")]
        assert [line["lost_steps"] for line in begun] == [0] * len(begun)
        assert set(losses(folder)) == set(range(1, 41))
        found = recorded(folder)
        assert found is not None
        numbers.add(found.job)
    assert len(numbers) == 3, "a job a trial"
    assert len([line for line in lines(place / "trial-000") if line["event"] == "resume"]) == 1


def test_jobs_that_fall_behind_are_cancelled(
    slurm: Env, settings: list[str], tmp_path: Path
) -> None:
    words = ["study=rates", CONF, "cluster=loopback", *settings, "launch.nproc=1", "steps=60"]
    words += ["optim.lr=1e-2,1e-9", "sampler=grid", "pruner=median", "startup=1", "poll=0.5"]
    words += ["eval.every=5", "at_once=1", "search_seed=1"]
    done = run(*kalmagrove("sweep", *words), cwd=tmp_path, env=slurm, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    place = tmp_path / "runs" / "rates"
    rows = json.loads((place / "sweep.json").read_text())["runs"]
    assert [(row["settings"]["optim.lr"], row["status"]) for row in rows] == [
        ("0.01", "done"),
        ("1e-09", "pruned"),
    ], done.stdout
    pruned = place / rows[1]["run"]
    assert rows[1]["steps"] < 60
    assert list((pruned / "checkpoints").glob("step-*")), "it was saved"
    assert "is cancelled" in (pruned / "slurm" / "batch.log").read_text()

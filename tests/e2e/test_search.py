"""`kalmagrove sweep` with real runs: killed in the middle, continued, pruned, shown."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from xml.dom import minidom

import pytest

from kalmagrove.cli import local
from tests.e2e.conftest import command, run

pytestmark = pytest.mark.e2e
SPACE = ["optim.lr=tag(log, interval(1e-3, 3e-2))", "seed=1,2"]


def lines(folder: Path) -> list[dict]:
    path = folder / "ledger.jsonl"
    if not path.is_file():
        return []
    whole = [text for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")]
    return [json.loads(text) for text in whole]


def step_of(folder: Path) -> int:
    return max((line["step"] for line in lines(folder)), default=0)


def begin(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command in a session of its own, so that nothing else hears what is sent to it."""
    return subprocess.Popen(
        command("sweep", *words),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(step: int, folder: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while step_of(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{folder} does not get to step {step}"
        time.sleep(0.05)


def test_killed_continued_and_nothing_twice(settings: list[str], tmp_path: Path) -> None:
    words = [*settings, *SPACE, "study=cut", "trials=4", "objective=loss_usd", "poll=0.2"]
    words += ["launch.nproc=1", "steps=12", "checkpoint.every=4", "sample.max_new_tokens=0"]
    words += ["engine.refit_every=null"]
    place = tmp_path / "runs" / "cut"
    # Once it is killed with its run, once alone: then the run outlives it.
    for number in (1, 2):
        folder = place / f"trial-{number:03d}"
        process = begin(*words, cwd=tmp_path)
        wait_for_step(5, folder, process)
        going = local.found(folder)
        assert going is not None
        assert going.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        os.killpg(going.pid, signal.SIGKILL if number == 1 else signal.SIGSTOP)
        process.communicate()
    process, out = begin(*words, cwd=tmp_path), ""
    assert process.stdout is not None
    for line in process.stdout:
        out += line
        if line == f"{folder} goes on already\n":
            os.killpg(going.pid, signal.SIGCONT)
    assert process.wait() == 0, out
    assert "goes on already" in out
    assert "Traceback" not in out

    told = json.loads((place / "sweep.json").read_text())
    assert sorted(one["run"] for one in told["runs"]) == [f"trial-{i:03d}" for i in range(4)]
    assert {(one["status"], one["steps"]) for one in told["runs"]} == {("done", 12)}
    assert told["runs"][0]["run"] == told["best"]
    assert told["usd"] > 0
    for i in range(4):
        found = lines(place / f"trial-{i:03d}")
        begun = [line["event"] for line in found if line["event"] in ("start", "resume")]
        assert begun == (["start", "resume"] if i == 1 else ["start"]), i
        ended = [line for line in found if line["event"] == "stop"]
        assert [line["status"] for line in ended] == ["done"]
    assert minidom.parse(str(place / "sweep.svg")).getElementsByTagName("circle").length == 4
    with (place / "sweep.csv").open() as file:
        assert {row["seed"] for row in csv.DictReader(file)} <= {"1", "2"}

    again = run("sweep", *words, cwd=tmp_path)
    assert again.returncode == 0
    assert "begins" not in again.stdout
    other = run("sweep", *words, "eval.max_tokens=4096", cwd=tmp_path)
    assert other.returncode == 2
    assert "study=cut was begun with other settings (eval.max_tokens was 2048" in other.stderr


def test_stopped_pruned_and_failed(settings: list[str], tmp_path: Path) -> None:
    """A grid: a good rate, one that learns nothing, one that is no number at once."""
    words = [*settings, "study=grid", "optim.lr=1e-2,1e-9,1e30", "sampler=grid", "pruner=median"]
    words += ["startup=1", "eval.every=4", "launch.nproc=1", "steps=24", "poll=0.1"]
    words += ["engine.max_nonfinite=1", "sample.max_new_tokens=0", "search_seed=1"]
    place = tmp_path / "runs" / "grid"
    process = begin(*words, cwd=tmp_path)
    wait_for_step(2, place / "trial-000", process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert "stopping: the runs finish their step and save" in out
    stopped = step_of(place / "trial-000")
    assert (place / "trial-000" / "checkpoints" / f"step-{stopped:06d}").is_dir()

    done = run("sweep", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {row["settings"]["optim.lr"]: row for row in json.loads(
        (place / "sweep.json").read_text()
    )["runs"]}  # fmt: skip
    assert {rate: row["status"] for rate, row in rows.items()} == {
        "0.01": "done",
        "1e-09": "pruned",
        "1e+30": "failed",
    }
    assert "no finite update" in rows["1e+30"]["why"]
    assert rows["0.01"]["best"]
    pruned = place / rows["1e-09"]["run"]
    assert 4 <= rows["1e-09"]["steps"] < 24
    assert list((pruned / "checkpoints").glob("step-*")), "a pruned run is saved"
    config = (place / "trial-000" / "config.yaml").read_text()
    assert "group: grid" in config, "W&B's group"
    page = run("report", str(place), "--no-edges", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert 'aria-labelledby="trade"' in (place / "report.html").read_text()

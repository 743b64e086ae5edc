"""A sweep with `hydra/launcher=deepspeed`: runs of several processes, two at a time."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import run

pytestmark = pytest.mark.e2e


def test_a_failing_run_hides_no_other(settings: list[str], tmp_path: Path) -> None:
    words = ["-m", "hydra/launcher=deepspeed", "hydra.launcher.at_once=2", *settings]
    words += ["launch.nproc=2", "steps=3", "engine.max_nonfinite=1", "sample.max_new_tokens=0"]
    words += ["optim.lr=1e30,1e-3", "name=lr-${optim.lr}"]
    done = run("train", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    first, second = (tmp_path / "runs" / name for name in ("lr-1e+30", "lr-0.001"))
    assert lines[:2] == [f"{first} begins", f"{second} begins"], "both before one ends"
    assert f"{second}: done" in lines
    (failed,) = [line for line in lines if line.startswith(f"{first}: FAILED: exit code 3: ")]
    assert "no finite update" in failed
    assert "1 of 2 runs failed" in lines
    assert "Traceback" not in done.stderr
    summary = json.loads((second / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("done", 2)
    again = run("train", *words[:-2], "optim.lr=1e-3", "name=lr-0.001", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{second}: done before" in again.stdout

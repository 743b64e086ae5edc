"""`kalmagrove train` under srun, without a launcher of ours."""

import json
from pathlib import Path

import pytest

from tests.cluster.conftest import kalmagrove, losses, run

pytestmark = pytest.mark.cluster


def test_one_node_and_two_nodes_give_the_same_losses(
    slurm: dict[str, str], settings: list[str], tmp_path: Path
) -> None:
    for name, words in (("one", ["-N1", "-n2"]), ("two", ["-N2", "-n2", "--ntasks-per-node=1"])):
        command = kalmagrove("train", *settings, "steps=6", f"name={name}")
        done = run("srun", *words, "-t5", *command, cwd=tmp_path, env=slurm)
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
        assert (summary["status"], summary["world_size"]) == ("done", 2)
    found = losses(tmp_path / "runs" / "two")
    assert set(found) == set(range(1, 7))
    assert found == losses(tmp_path / "runs" / "one")

"""Ranks are killed or hang while a run is supervised: it goes on as if nothing had happened."""

import time
from datetime import datetime

import pytest

from tests.dist.faults import HANG, Fault, Place

pytestmark = pytest.mark.dist


def test_killed_while_saving_and_hung(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = Place(tmp_path_factory.mktemp("faults"))
    faults = [Fault("kill", "save", step=4), Fault("sleep", "data", step=7)]
    began = time.time()
    done = place.train("broken", *faults, words=("launch.max_restarts=2", HANG))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "starts again" in line]
    restarts = [line.partition("; ")[2] for line in said]
    assert restarts == [
        "starts again from step 0 in 1 s (restart 1 of 2)",
        "starts again from step 4 in 2 s (restart 2 of 2)",
    ]
    assert said[1].startswith("kalmagrove: the ranks hung after step 6; ")
    assert place.lost("broken") == [4, 2], "no more than since the last checkpoint"
    assert "kalmagrove: another rank has ended or does not answer, in checkpoint of step 4 " in (
        done.stderr
    )
    assert "Traceback" not in done.stderr

    where = "rank 1 in data of step 7; rank 0 in forward of step 7"
    assert f"kalmagrove: hung: no progress in 8 s; {where}; stacks: " in done.stderr
    (stop,) = [line for line in place.lines("broken") if line.get("status") == "hung"]
    assert where in stop["reason"]
    (stacks,) = (place.run("broken") / "stacks").iterdir()
    culprit, waiting = (stacks / f"rank-{rank}.txt" for rank in (1, 0))
    assert culprit.read_text().startswith("rank 1: step 7, data, for ")
    assert "in _step" in culprit.read_text()
    assert "in all_to_all_single" in waiting.read_text()
    place.as_if_nothing_happened("broken")
    last = place.lines("broken")[-1]
    wall = datetime.fromisoformat(last["time"]).timestamp() - began
    assert last["wall_seconds"] == pytest.approx(wall, rel=0.01), "ends and pauses, each once"

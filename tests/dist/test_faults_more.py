"""More of what `test_faults` is about: every phase, launchers that die, ranks that do not react."""

import json

import pytest

from tests.dist.faults import HANG, Fault, Place

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("phase", ["data", "forward", "all-to-all", "optimizer"])
def test_a_rank_is_killed(place: Place, phase: str) -> None:
    done = place.train(phase, Fault("kill", phase, step=6), words=("launch.max_restarts=1",))
    assert done.returncode == 0, done.stderr
    assert "after step 5; starts again from step 4 in 1 s (restart 1 of 1)" in done.stderr
    assert place.lost(phase) == [1]
    place.as_if_nothing_happened(phase)


def test_a_rank_is_killed_while_it_saves_in_the_background(place: Place) -> None:
    words = ("launch.max_restarts=1", "checkpoint.background=true")
    done = place.train("behind", Fault("kill", "save", step=4), words=words)
    assert done.returncode == 0, done.stderr
    assert "starts again from step 0 in 1 s (restart 1 of 1)" in done.stderr
    place.as_if_nothing_happened("behind")


def test_without_supervision_the_same_command_continues(place: Place) -> None:
    fault = Fault("kill", "forward", step=6)
    done = place.train("alone", fault)
    assert done.returncode != 0
    assert place.processes() == []
    done = place.train("alone", fault)
    assert done.returncode == 0, done.stderr
    place.as_if_nothing_happened("alone")


def test_a_rank_that_does_not_react_is_killed(place: Place) -> None:
    """Stopped by a signal, it runs no watchdog and hears no SIGTERM."""
    fault = Fault("stop", "optimizer", step=6)
    done = place.train("stopped", fault, words=("launch.max_restarts=1", HANG))
    assert done.returncode == 0, done.stderr
    assert "hung: no progress in 8 s; rank 1 does not answer; rank 0 in " in done.stderr
    assert "the ranks hung after step 5; starts again from step 4" in done.stderr
    place.as_if_nothing_happened("stopped")


def test_a_rank_hangs_with_the_interpreters_lock(place: Place) -> None:
    fault = Fault("sleep with the lock", "forward", step=6)
    done = place.train("locked", fault, words=("launch.max_restarts=1", HANG))
    assert done.returncode == 0, done.stderr
    if "rank 1 does not answer" not in done.stderr:  # as where it last looked during a save
        assert "Timeout (0:00:08)!" in done.stderr
        assert 'inject/sitecustomize.py", line' in done.stderr, "its stack"
    assert "starts again from step 4" in done.stderr
    place.as_if_nothing_happened("locked")


def test_the_launcher_is_killed(place: Place) -> None:
    fault = Fault("kill launcher", "data", step=6)
    done = place.train("launcher", fault, words=("launch.max_restarts=1",))
    assert done.returncode == 0, done.stderr
    assert "the launcher was killed by SIGKILL" in done.stderr
    assert place.lost("launcher") == [0], "the ranks have saved"
    assert place.losses("launcher") == place.losses("whole")
    assert place.processes() == []


def test_the_supervisor_is_killed(place: Place) -> None:
    fault = Fault("kill supervisor", "data", step=6)
    done = place.train("supervisor", fault, words=("launch.max_restarts=1",))
    assert done.returncode == -9
    place.until_all_ended(60)
    summary = json.loads((place.run("supervisor") / "summary.json").read_text())
    assert summary["status"] == "stopped", "the ranks have saved"
    done = place.train("supervisor", fault)
    assert done.returncode == 0, done.stderr
    assert place.lost("supervisor") == [0]
    assert place.losses("supervisor") == place.losses("whole")


def test_one_process_is_supervised_too(place: Place) -> None:
    words = ("launch.nproc=1", "parallel.ep=1", "launch.max_restarts=1")
    done = place.train("one", Fault("kill", "forward", step=6, rank=0), words=words)
    assert done.returncode == 0, done.stderr
    assert "a rank was killed by SIGKILL after step 5; starts again from step 4" in done.stderr
    assert place.lost("one") == [1]
    summary = json.loads((place.run("one") / "summary.json").read_text())
    assert (summary["status"], summary["world_size"]) == ("done", 1)

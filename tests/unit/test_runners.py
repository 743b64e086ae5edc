"""Where trials run: processes that outlive who began them, and jobs that a cluster takes away."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kalmagrove.cli import local
from kalmagrove.cli.runners import SILENT, End, Here, Jobs, written
from kalmagrove.config import ConfigError, KalmaGroveError
from kalmagrove.track import Ledger, Spent
from tests.unit.test_slurm import programs, run_of  # noqa: F401 - a fixture
from tests.unit.tiny_run import make_run

pytestmark = pytest.mark.unit


def note_end(folder: Path, status: str) -> None:
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.write("stop", 3, 3, Spent(), status=status)
    ledger.close()


def until(ended: Here) -> list[End]:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if found := list(ended.ended()):
            return found
        time.sleep(0.01)
    raise AssertionError("nothing ended")


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs are a script instead, which waits for the file `end` and leaves with its number."""
    path = tmp_path / "python"
    path.write_text(
        "#!/bin/bash\ntrap 'exit 75' TERM\n"
        f"until [ -e {tmp_path}/end ]; do sleep 0.01; done; exit $(cat {tmp_path}/end)\n"
    )
    path.chmod(0o755)
    monkeypatch.setattr(local.sys, "executable", str(path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    return tmp_path / "end"


def test_a_run_that_outlives_its_sweep_is_joined(sleeper: Path, tmp_path: Path) -> None:
    run, folder = make_run(steps=3, dir=str(tmp_path)), tmp_path / "tiny"
    first = local.Machine("train", None)
    assert local.found(folder) is None
    first.begin(folder, run)
    assert first.gpus == ["5"]
    pid = first.going[0].pid
    with pytest.raises(ConfigError, match="name=tiny is being trained by another process"):
        local._start(folder, run, "train", [])
    found = local.found(folder)
    assert found == local.Going(folder, None, pid, ["4"])
    # Another sweep sees it, keeps off its GPU, and sees it end without its exit code.
    second = Here(None)
    assert second.goes_on(folder)
    second.begin(folder, run)
    assert second._machine.gpus == ["5"]
    assert list(second.ended()) == []
    second.stop(folder)
    (end,) = until(second)
    assert end.status == "lost", "its ledger does not say how it ended"
    assert second._machine.gpus == ["5", "4"]
    assert not second.goes_on(folder)
    (one,) = list(first.ended())
    assert one.code == 75, "it was asked to save"


@pytest.mark.parametrize(("said", "status"), [("stopped", "stopped"), ("budget", "budget")])
def test_a_joined_runs_ledger_tells_how_it_ended(
    said: str, status: str, sleeper: Path, tmp_path: Path
) -> None:
    run, folder = make_run(steps=3, dir=str(tmp_path)), tmp_path / "tiny"
    local.Machine("train", None).begin(folder, run)
    here = Here(None)
    here.begin(folder, run)
    note_end(folder, said)
    sleeper.write_text("0")
    (end,) = until(here)
    assert end.status == status


@pytest.mark.parametrize(
    ("code", "status"), [(75, "stopped"), (76, "budget"), (3, "failed"), (0, "failed")]
)
def test_exit_codes(code: int, status: str, sleeper: Path, tmp_path: Path) -> None:
    run, folder = make_run(steps=3, dir=str(tmp_path)), tmp_path / "tiny"
    here = Here(1)
    here.begin(folder, run)
    assert not here.room(run)
    sleeper.write_text(str(code))
    (end,) = until(here)
    assert end.status == status
    assert end.text.startswith(f"exit code {code}: no output (")
    (folder / "summary.json").write_text(json.dumps({"status": "done", "steps": 3}))
    here.begin(folder, run)
    assert list(here.ended()) == [End(folder, "done")], "it was done before"


def test_stopped_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.sys, "executable", "/bin/sleep")
    plain = subprocess.Popen
    monkeypatch.setattr(
        local.subprocess, "Popen", lambda command, **more: plain(["/bin/sleep", "60"], **more)
    )
    run, folder = make_run(steps=3, dir=str(tmp_path)), tmp_path / "tiny"
    here = Here(None)
    here.begin(folder, run)
    here.stop(folder)
    (end,) = until(here)
    assert end.status == "stopped", "SIGTERM killed it, as was asked"
    here.begin(folder, run)
    os.kill(here._machine.going[0].pid or 0, signal.SIGTERM)
    (end,) = until(here)
    assert end.status == "failed", "by whom is not known"


class TestJobs:
    """With programs that answer like Slurm's."""

    @pytest.fixture
    def began(
        self,
        programs: Path,  # noqa: F811
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> tuple[Jobs, Path, Path]:
        (programs / "scancel").write_text('#!/bin/sh\necho "$@" >"$HERE/cancelled"\n')
        (programs / "scancel").chmod(0o755)
        jobs = Jobs(None)
        run = run_of("launch.nproc=auto", "name=one", f"dir={tmp_path}/runs")
        folder = tmp_path / "runs" / "one"
        assert not jobs.goes_on(folder)
        assert jobs.room(run)
        jobs.begin(folder, run)
        assert not jobs.room(run), "it has all GPUs of the cluster"
        assert jobs.goes_on(folder)
        return jobs, folder, programs

    def answer(self, where: Path, state: str) -> None:
        (where / "state").write_text(f"JobState={state}\n")

    def test_done(self, began: tuple[Jobs, Path, Path]) -> None:
        jobs, folder, where = began
        assert list(jobs.ended()) == []
        self.answer(where, "COMPLETED")
        (folder / "summary.json").write_text(json.dumps({"status": "done"}))
        assert list(jobs.ended()) == [End(folder, "done")]

    def test_taken_away_it_is_submitted_again_as_long_as_it_gets_on(
        self, began: tuple[Jobs, Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        jobs, folder, where = began
        self.answer(where, "PREEMPTED")
        note_end(folder, "stopped")
        for step in range(3):
            (folder / "checkpoints" / f"step-00000{step}").mkdir(parents=True)
            assert list(jobs.ended()) == []
            assert "job 12 PREEMPTED" in capsys.readouterr().out
        (end,) = [*jobs.ended(), *jobs.ended(), *jobs.ended()]
        assert end.status == "failed", "three jobs saved nothing new"

    def test_cancelled(self, began: tuple[Jobs, Path, Path]) -> None:
        jobs, folder, where = began
        jobs.stop(folder)
        assert (where / "cancelled").read_text() == "--batch --signal=USR1 12\n"
        self.answer(where, "FAILED")
        note_end(folder, "stopped")
        (end,) = jobs.ended()
        assert end.status == "stopped"

    def test_failed_and_at_its_budget(self, began: tuple[Jobs, Path, Path]) -> None:
        jobs, folder, where = began
        self.answer(where, "FAILED")
        (end,) = jobs.ended()
        assert end.status == "failed"
        assert end.text.startswith("job 12 FAILED, the run is not begun: ")
        self.answer(where, "RUNNING")
        jobs.begin(folder, run_of("launch.nproc=auto", "name=one", f"dir={folder.parent}"))
        self.answer(where, "FAILED")
        note_end(folder, "budget")
        (end,) = jobs.ended()
        assert end.status == "budget"

    def test_slurm_may_be_silent_for_a_while(self, began: tuple[Jobs, Path, Path]) -> None:
        jobs, _, where = began
        (where / "scontrol").write_text("#!/bin/sh\necho timed out >&2; exit 1\n")
        for _ in range(SILENT):
            assert list(jobs.ended()) == []
        with pytest.raises(KalmaGroveError, match="scontrol does not answer: timed out"):
            list(jobs.ended())


def test_what_a_ledger_says(tmp_path: Path) -> None:
    assert written(tmp_path) is None
    note_end(tmp_path, "failed")
    assert written(tmp_path) == "failed"

"""When processes that died are started again, from where, and when not."""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tiny_run import make_run

from kalmagrove.cli import launch, supervise
from kalmagrove.cli.supervise import Processes
from kalmagrove.config import ConfigError, Training
from kalmagrove.config.attempts import Attempt, Heartbeat, beats

pytestmark = pytest.mark.unit
KILLED = 256 - signal.SIGKILL  # as DeepSpeed's launcher passes it on


class Tries:
    """Instead of processes. Each saves the checkpoint of a step, or none, and returns a code."""

    def __init__(self, folder: Path, *tries: tuple[int | None, int]) -> None:
        self.folder, self.left = folder, list(tries)
        self.resumes: list[str] = []
        self.starts: list[Attempt | None] = []
        self.paused: list[float] = []

    def run(
        self, processes: Processes, run: Training, nproc: int, verb: str, env: Mapping[str, str]
    ) -> int:
        self.resumes.append(run.checkpoint.resume)
        self.starts.append(Attempt.given(env))
        step, code = self.left.pop(0)
        if step is not None:
            (self.folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        return code


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Tries]]:
    def go(*tries: tuple[int | None, int], **settings: object) -> tuple[int, Tries]:
        found = Tries(tmp_path / "one", *tries)

        def wait(processes: Processes, seconds: float) -> bool:
            found.paused.append(seconds)
            return not processes.stopping

        monkeypatch.setattr(Processes, "run", lambda *words: found.run(*words))
        monkeypatch.setattr(Processes, "wait", wait)
        run = make_run(name="one", dir=str(tmp_path), **settings)
        with Heartbeat(tmp_path / "one", Attempt.now(), 2) as beating:
            return supervise.supervise(run, 2, beating), found

    return go


def test_until_it_is_done(tried: Callable, capsys: pytest.CaptureFixture) -> None:
    code, found = tried(
        (4, KILLED), (None, -signal.SIGKILL), (None, 77), (8, 1), (None, 0),
        launch={"max_restarts": 9},
        checkpoint={"resume": "never"},
    )  # fmt: skip
    assert code == 0
    assert found.resumes == ["never", *["auto"] * 4], "only the first one begins anew"
    assert found.paused == [1, 2, 4, 8]
    starts = [start for start in found.starts if start]
    assert len({start.name for start in starts}) == 5
    assert [start.began for start in starts] == sorted(start.began for start in starts)
    left = {beat.attempt for beat in beats(found.folder)}
    assert left == {start.name for start in starts[:-1]}, "what died is left to be booked"
    said = [line.partition("; ")[::2] for line in capsys.readouterr().err.splitlines()]
    assert [what for what, _ in said] == [
        "kalmagrove: a rank was killed by SIGKILL after step 0",
        "kalmagrove: the launcher was killed by SIGKILL after step 0",
        "kalmagrove: the ranks hung after step 0",
        "kalmagrove: a rank failed with exit code 1 after step 0",
    ]
    assert said[0][1] == "starts again from step 4 in 1 s (restart 1 of 9)"
    assert said[3][1] == "starts again from step 8 in 8 s (restart 4 of 9)"


@pytest.mark.parametrize("code", [2, 3, 75, 76])
def test_what_ends_the_same_way_is_not_tried_again(
    code: int, tried: Callable, capsys: pytest.CaptureFixture
) -> None:
    returned, found = tried((None, code), launch={"max_restarts": 9})
    assert returned == code
    assert len(beats(found.folder)) == (code == 3), "of the others the ledger tells"
    assert capsys.readouterr().err == ""


def test_gives_up_where_nothing_new_is_saved(
    tried: Callable, capsys: pytest.CaptureFixture
) -> None:
    tries = [(4, 1), (None, 1), (None, 1), (None, KILLED)]
    assert tried(*tries, launch={"max_restarts": 9})[0] == 128 + signal.SIGKILL
    assert capsys.readouterr().err.splitlines()[-1] == (
        "kalmagrove: a rank was killed by SIGKILL; gives up: 3 tries in a row saved nothing new"
    )


def test_gives_up_after_so_many_restarts(tried: Callable, capsys: pytest.CaptureFixture) -> None:
    assert tried((4, 77), (8, 77), launch={"max_restarts": 1})[0] == 77
    assert capsys.readouterr().err.splitlines()[-1] == (
        "kalmagrove: the ranks hung; gives up after 1 restarts (launch.max_restarts); the same "
        "command continues from step 8"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [(1, ""), (77, "kalmagrove: the ranks hung after step 0; the same command continues from 4\n")],
)
def test_without_restarts(
    code: int, said: str, tried: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert tried((4, code))[0] == code
    assert capsys.readouterr().err == said.replace("from 4", "from step 4")


def test_a_stop_between_two_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Processes, "run", lambda *_: KILLED)

    def sleep(seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(supervise.time, "sleep", sleep)
    run = make_run(name="one", dir=str(tmp_path), launch={"max_restarts": 1})
    with Heartbeat(tmp_path / "one", Attempt.now(), 2) as beating:
        assert supervise.supervise(run, 2, beating) == 75
    assert len(beats(tmp_path / "one")) == 2, "the try that died, and the pause after it"
    assert capsys.readouterr().err.endswith("stopped; the same command continues from step 0\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_other_launchers_have_restarts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(launch={"max_restarts": 1})
    assert launch.world_size(run) == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"max_restarts=1 is for processes that kalmagrove"):
        launch.world_size(run)
    monkeypatch.setenv(launch.OURS, "1")
    assert launch.world_size(run) == 2

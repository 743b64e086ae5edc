"""Searches of `kalmagrove sweep`: spaces, pruning, objectives, and what survives a kill. The runs
are pretended; tests/e2e/test_search.py has real ones.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.cli import main, sweep_table
from kalmagrove.cli.compose import Axis, conf_dir, sweep_axes
from kalmagrove.cli.runners import End
from kalmagrove.cli.search import Loop
from kalmagrove.cli.study import JOURNAL, Study, Trial, check_space, counted, mend, points, read
from kalmagrove.cli.sweep import decisive, plan
from kalmagrove.config import ConfigError, DataError, Run, Search
from kalmagrove.track import Ledger, Spent
from tests.unit.tiny_run import make_run

pytestmark = pytest.mark.unit
RATE = Axis("optim.lr", low=1e-3, high=1.0, log=True)
SEEDS = Axis("seed", ("seed=1", "seed=2", "seed=3"), 1, 3, 1)
KINDS = Axis("ffn", ("ffn=kan", "ffn=dense"))
BEGIN: dict[str, Any] = {"lost_steps": 0, "lost_tokens": 0, "lost_device_seconds": 0.0}
STEPS, EVERY = 8, 2


class Killed(Exception):
    """Stands for `kill -9` of the process that searches."""


class Pretend:
    """Runs that take a look for every evaluation, and write ledgers.

    Args:
        loss: from a run's settings and step.
        ends: how runs end that are not done, by their settings; None: they are.
        kill: after so many looks.
    """

    def __init__(
        self,
        loss: Callable[[Run, int], float | None] = lambda run, step: run.optim.lr + 1 / step,
        ends: Callable[[Run], str | None] = lambda run: None,
        places: int = 1,
        kill: int | None = None,
        going: Mapping[Path, Run] | None = None,
        here: bool = True,
        usd: float | None = 0.25,
    ) -> None:
        self.every = 1e-3
        self.loss, self.ends, self.places, self.kill, self.here = loss, ends, places, kill, here
        self.usd, self.others = usd, dict(going or {})
        self.going: dict[Path, Run] = {}
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.looks = 0

    def room(self, run: Run) -> bool:
        return len(self.going) < self.places

    def goes_on(self, folder: Path) -> bool:
        return folder in self.others

    def begin(self, folder: Path, run: Run) -> None:
        if folder not in self.others:
            self.begun.append(folder.name)
        self.going[folder] = run
        ledger = Ledger(folder / "ledger.jsonl")
        if not ledger.lines:
            ledger.write("start", 0, 0, Spent(), **BEGIN)
        ledger.close()

    def stop(self, folder: Path) -> None:
        self.stopped.append(folder.name)

    def ended(self) -> Iterator[End]:
        self.looks += 1
        if self.looks == self.kill:
            raise Killed
        for folder, run in list(self.going.items()):
            end = self._end(folder, run)
            if end is not None:
                del self.going[folder]
                yield end

    def _end(self, folder: Path, run: Run) -> End | None:
        if folder.name in self.stopped:
            return End(folder, "stopped")
        if (how := self.ends(run)) is not None:
            return End(folder, how, "no luck")  # type: ignore[arg-type]
        ledger = Ledger(folder / "ledger.jsonl")
        step = ledger.history().reached[0] + EVERY
        usd = None if self.usd is None else Decimal(str(self.usd)) * step / STEPS
        spent = Spent(float(step), usd, float(step))
        ledger.write("eval", step, step, spent, val_loss=self.loss(run, step))
        if step == STEPS:
            ledger.write("stop", step, step, spent, status="done")
        ledger.close()
        return End(folder, "done") if step == STEPS else None


def search(**keys: Any) -> Search:
    return Search(**{"study": "s", "trials": 4, "startup": 1} | keys)


def of(trial: Trial) -> Run:
    lr, seed = trial.params.get("optim.lr", 0.1), trial.params.get("seed", 0)
    return make_run(steps=STEPS, seed=seed, optim={"lr": lr}, eval={"every": EVERY})


def go(
    folder: Path,
    runner: Pretend,
    space: tuple[Axis, ...] = (RATE,),
    settings: Mapping[str, Any] | None = None,
    make: Callable[[Trial], Run] = of,
    **keys: Any,
) -> tuple[int, Study]:
    """A whole search, or what is left of it: exit code and study."""
    folder.mkdir(exist_ok=True)
    wanted = search(**keys)
    study = Study(folder, wanted, space, settings or {}, (EVERY, STEPS))
    total = min(wanted.trials, points(space) or wanted.trials)
    return Loop(wanted, study, runner, folder, make, total, lambda: None).run(), study


def states(study: Study) -> list[str]:
    return [trial.state for trial in study.trials]


@pytest.mark.parametrize(
    ("word", "axis"),
    [
        ("optim.lr=interval(1e-4,1e-2)", Axis("optim.lr", low=1e-4, high=1e-2)),
        (
            "optim.lr=tag(log, interval(1e-4, 1e-2))",
            Axis("optim.lr", low=1e-4, high=1e-2, log=True),
        ),
        ("schedule.warmup=int(interval(0,9))", Axis("schedule.warmup", low=0, high=9)),
        ("ffn=kan,dense,kan", Axis("ffn", ("ffn=kan", "ffn=dense"))),
        ("seed=range(1,6,2)", Axis("seed", ("seed=1", "seed=3", "seed=5"), 1, 5, 2)),
        ("seed=range(3,0,-1)", Axis("seed", ("seed=3", "seed=2", "seed=1"), 1, 3, 1)),
        ("seed=shuffle(range(1,4))", SEEDS),
        ("track.tags=[a],[b,c]", Axis("track.tags", ("track.tags=[a]", "track.tags=[b,c]"))),
        ("data.source.paths=[a,b]", Axis("data.source.paths", ("data.source.paths=[a,b]",))),
        ("~track.tags", Axis("~track.tags", ("~track.tags",))),
    ],
)
def test_spaces_in_hydras_words(word: str, axis: Axis) -> None:
    assert sweep_axes("train", [word]) == [axis]


def test_a_range_of_fractions() -> None:
    (axis,) = sweep_axes("train", ["optim.lr=range(0.1,0.5,0.1)"])
    assert (len(axis.words), axis.low, axis.high, axis.step) == (4, 0.1, 0.4, 0.1)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=interval(2,1)", "optim.lr=interval(2,1) must go from a number to a higher one"),
        ("optim.lr=tag(log,interval(0,1))", "above 0 for log"),
        ("optim.lr=tag(lin,interval(0,1))", "has a tag that is not understood"),
        ("optim.lr=interval(a,b)", "cannot be read by Hydra's grammar; TypeError"),
        ("seed=range(5,5)", "has no value"),
        ("seed=range(1,5,0)", "has a step of 0"),
        ("name=a,b", "name=a,b is not for kalmagrove sweep"),
        ("dir=a,b", "dir=a,b must be one for all trials"),
        ("hydra/launcher=slurm", "hydra/launcher=slurm is not for kalmagrove sweep"),
    ],
)
def test_words_that_cannot_be(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan([word])
    assert message in str(error.value)
    with pytest.raises(ConfigError, match=r"seed=1,2 is given again after it"):
        plan(["seed=1,2", "seed=3"])
    assert plan(["seed=3", "seed=1,2"])[1] == [Axis("seed", ("seed=1", "seed=2"))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=1,2"], "study=null is required"),
        (["study=a"], "study=a has nothing to search"),
        (["study=../a", "seed=1,2"], "study='../a' cannot name a folder of trials"),
        (["study=a", "seed=1,2", "sampler=luck"], "sampler='luck' should be 'tpe', 'random'"),
        (["study=a", "seed=1,2", "cap.eur=2"], "cap.eur=2 is not a known key"),
        (["study=a", "optim.lr=interval(1,2)", "sampler=grid"], "cannot try all of optim.lr"),
        (["study=a", "optim.lr=interval(-1,1)"], "optim.lr=-1.0 should be greater than 0"),
        (["study=a", "ffn=kan,nope"], "ffn=nope is not an option"),
        (["study=a", "seed=1,2", "pruner=median", "objective=bits_usd"], "has two"),
        (
            ["study=a", "seed=1,2", "pruner=asha", "eval.every=1000"],
            "eval.every=1000 must be below",
        ),
        (["study=a", "seed=1,2", "objective=loss_usd"], "objective=loss_usd needs the price"),
        (["study=a", "seed=1,2", "price=h100", "cap.usd=2"], "cap.usd=2.0 needs the price"),
        (["study=a", "seed=1,2", "checkpoint.resume=never"], "checkpoint.resume=never would lose"),
        (["study=a", "seed=1,2", "cluster=h100x8"], "must be one with a section `slurm`"),
        (["study=a", "-m", "seed=1,2"], "argument=-m is what `kalmagrove sweep` does"),
    ],
)
def test_mistakes_are_told_before_anything_begins(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["sweep", "model=kan_tiny", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_its_keys_are_not_those_of_runs() -> None:
    import yaml

    own = set(Search.model_fields)
    written = yaml.safe_load((conf_dir() / "sweep.yaml").read_text())
    assert own == set(written) - {"defaults", "hydra"}
    assert not own & set(Run.model_fields)
    for name in ("at_once", "objective", "pruner", "sampler", "cap"):
        default = Search.model_fields[name].default
        assert written[name] == (default.model_dump() if name == "cap" else default)


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
@pytest.mark.parametrize("joined", [False, True])
def test_killed_and_continued_it_is_the_same_search(
    sampler: str, joined: bool, tmp_path: Path
) -> None:
    """Nothing is lost or done twice, whether the run outlived the kill or ended with it."""
    keys = {"sampler": sampler, "trials": 5}
    code, whole = go(tmp_path / "whole", Pretend(), **keys)
    assert (code, states(whole)) == (0, ["done"] * 5)
    first = Pretend(kill=10)
    with pytest.raises(Killed):
        go(tmp_path / "cut", first, **keys)
    assert first.begun == ["trial-000", "trial-001", "trial-002"]
    second = Pretend(going=first.going if joined else {})
    code, cut = go(tmp_path / "cut", second, **keys)
    again = [] if joined else ["trial-002"]
    assert second.begun == [*again, "trial-003", "trial-004"]
    assert cut.trials == whole.trials
    third = Pretend()
    assert go(tmp_path / "cut", third, **keys)[0] == 0
    assert third.begun == [], "all is done"
    go(tmp_path / "cut", third, **keys | {"trials": 6})
    assert third.begun == ["trial-005"], "more trials continue it"


def test_killed_before_a_trial_knew_its_point(tmp_path: Path) -> None:
    study = Study(tmp_path, search(), (RATE, SEEDS), {})
    study._at(0).ask()  # and it dies before a value is drawn
    code, study = go(tmp_path, Pretend(), (RATE, SEEDS))
    assert (code, len(study.trials)) == (0, 4)
    assert set(study.trials[0].params) == {"optim.lr", "seed"}


def test_several_at_once(tmp_path: Path) -> None:
    runner = Pretend(places=3)
    code, study = go(tmp_path, runner, trials=6)
    assert (code, states(study), len(set(runner.begun))) == (0, ["done"] * 6, 6)
    assert runner.looks == 2 * STEPS / EVERY


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_runs_that_fall_behind_are_stopped(pruner: str, tmp_path: Path) -> None:
    """The pruner is told steps: the least resource is that of the first held-out loss."""
    words = tuple(f"optim.lr={i / 10}" for i in range(1, 11))
    rates = Axis("optim.lr", words, 0.1, 1.0, 0.1)
    keys: dict[str, Any] = {"pruner": pruner, "trials": 10, "sampler": "grid"}
    runner = Pretend(loss=lambda run, step: 100 * run.optim.lr + 1 / step)
    code, study = go(tmp_path, runner, (rates,), **keys)
    found = states(study)
    assert code == 0
    assert set(found) == {"done", "pruned"}
    assert {trial.name for trial in study.trials if trial.state == "pruned"} == set(runner.stopped)
    done = [trial.values[0] for trial in study.trials if trial.state == "done"]
    assert min(done) == 100 * 0.1 + 1 / STEPS, "the best is never pruned"
    summary = sweep_table.summarize(tmp_path)
    assert summary.rows[0].best
    assert {row.status for row in summary.rows} == {"done", "pruned"}


def test_pruning_begins_where_it_is_told_to(tmp_path: Path) -> None:
    # Trial 1 is worse at every step: the median of the earlier ones is trial 0's.
    losses = {1: 1.0, 2: 2.0, 3: 3.0}
    runner = Pretend(loss=lambda run, step: losses[run.seed])
    keys: dict[str, Any] = {"pruner": "median", "prune_from": 4, "sampler": "grid"}
    _, study = go(tmp_path, runner, (SEEDS,), **keys)
    order = [trial.params["seed"] for trial in study.trials]
    worse = [seed for i, seed in enumerate(order) if i and seed > min(order[:i])]
    pruned = [trial for trial in study.trials if trial.state == "pruned"]
    assert [trial.params["seed"] for trial in pruned] == worse
    for trial in pruned:
        lines = (tmp_path / trial.name / "ledger.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 2, 4], "not at step 2"


def test_killed_while_a_pruned_run_saves(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"pruner": "median", "trials": 3}
    rising = {0: 1.0, 1: 2.0, 2: 3.0}
    made: list[int] = []

    def make(trial: Trial) -> Run:
        made.append(trial.number)
        return of(trial).model_copy(update={"seed": trial.number})

    first = Pretend(loss=lambda run, step: rising[run.seed], kill=6)
    with pytest.raises(Killed):
        go(tmp_path, first, make=make, **keys)
    assert first.stopped == ["trial-001"]
    second = Pretend(loss=lambda run, step: rising[run.seed])
    code, study = go(tmp_path, second, make=make, **keys)
    assert (code, states(study)) == (0, ["done", "pruned", "pruned"])
    assert second.begun == ["trial-002"], "it is not begun again"


def test_two_objectives(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"objective": "loss_usd", "trials": 6, "sampler": "nsga2"}
    code, study = go(tmp_path, Pretend(), **keys)
    assert code == 0
    assert all(trial.values[1] == 0.25 for trial in study.trials)
    assert study.trials[0].values[0] == study.trials[0].params["optim.lr"] + 1 / STEPS
    unknown = Pretend(usd=None)
    code, study = go(tmp_path / "unknown", unknown, **keys | {"trials": 1})
    assert (code, states(study)) == (1, ["failed"])
    assert study.trials[0].why == "it is done, but what it cost is unknown"


def test_a_loss_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    runner = Pretend(loss=lambda run, step: None)
    code, study = go(tmp_path, runner, pruner="median", trials=2)
    assert (code, states(study)) == (1, ["failed", "failed"])
    assert "no number" in study.trials[0].why


def test_another_search_of_the_same_name_is_refused(tmp_path: Path) -> None:
    settings = {"steps": 8, "zero.stage": 1}
    go(tmp_path, Pretend(), (RATE, KINDS), settings, trials=1)
    other = Axis("optim.lr", low=1e-3, high=0.5, log=True)
    for space, now, keys, what in (
        ((other, KINDS), settings, {}, "optim.lr was tag.log, interval.0.001, 1.0.., is tag"),
        ((RATE,), settings, {}, "ffn was kan,dense, is not searched"),
        ((RATE, KINDS, SEEDS), settings, {}, "seed was not searched, is 1,2,3"),
        ((RATE, KINDS), settings | {"steps": 9}, {}, "steps was 8, is 9"),
        ((RATE, KINDS), settings, {"objective": "bits"}, "objective was loss, is bits"),
    ):
        with pytest.raises(ConfigError, match=rf"study=s was begun .*{what}.*give another study"):
            go(tmp_path, Pretend(), space, now, **keys)
    kept = settings | {"zero.stage": 2}  # how a result is computed
    code, study = go(tmp_path, Pretend(), (RATE, KINDS), kept, trials=2, sampler="random")
    assert (code, len(study.trials)) == (0, 2)


def test_what_makes_trials_comparable() -> None:
    run = make_run(steps=8)
    plain, priced = decisive(search(), run), decisive(search(objective="loss_usd"), run)
    assert plain["eval.max_tokens"] is None
    assert not [key for key in plain if key.startswith("price.")]
    assert priced["price.usd_per_core_hour"] == 36.0
    assert json.loads(json.dumps(priced)) is not None


def test_a_failure_hides_no_other_and_is_tried_again_when_asked(tmp_path: Path) -> None:
    bad = Pretend(ends=lambda run: "failed" if run.seed == 2 else None)
    code, study = go(tmp_path, bad, (SEEDS,), sampler="grid")
    assert code == 1
    assert sorted(states(study)) == ["done", "done", "failed"]
    (failed,) = [trial for trial in study.trials if trial.state == "failed"]
    assert (failed.params["seed"], failed.why) == (2, "no luck")
    code, _ = go(tmp_path, idle := Pretend(), (SEEDS,), sampler="grid")
    assert (code, idle.begun) == (1, [])
    code, study = go(tmp_path, runner := Pretend(), (SEEDS,), sampler="grid", retry=True)
    assert (code, runner.begun) == (0, [failed.name]), "in its own folder, where it stopped"
    assert states(study).count("failed") == 1
    assert [trial.state for trial in counted(study.trials)] == ["done"] * 3
    assert {row.status for row in sweep_table.summarize(tmp_path).rows} == {"done"}


def test_a_point_that_cannot_be_is_a_failed_trial(tmp_path: Path) -> None:
    def make(trial: Trial) -> Run:
        if trial.params["seed"] == 1:
            raise ConfigError("seed", 1, "does not go with it")
        return of(trial)

    code, study = go(tmp_path, Pretend(), (SEEDS,), make=make, sampler="grid")
    assert (code, sorted(states(study))) == (1, ["done", "done", "failed"])
    assert {trial.why for trial in study.trials} == {"", "seed=1 does not go with it"}


def test_a_search_in_which_nothing_works_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, study = go(tmp_path, Pretend(ends=lambda run: "failed"), trials=50)
    assert (code, states(study)) == (1, ["failed"] * 5)
    assert "5 trials have failed and none is done" in capsys.readouterr().out


def test_a_point_is_run_once(tmp_path: Path) -> None:
    two = Axis("seed", ("seed=1", "seed=2"), 1, 2, 1)
    folder = tmp_path / "few"
    folder.mkdir()
    wanted = search(trials=6, sampler="random")
    study, runner = Study(folder, wanted, (two,), {}), Pretend(places=2)
    assert Loop(wanted, study, runner, folder, of, 6, lambda: None).run() == 0
    assert states(study) == ["done"] * 6
    assert len(runner.begun) == len(set(runner.begun)) == 2
    values = {trial.params["seed"]: trial.values for trial in study.trials}
    assert all(trial.values == values[trial.params["seed"]] for trial in study.trials)
    assert len(sweep_table.summarize(folder).rows) == 2


def test_a_cap_of_all_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, study = go(tmp_path, Pretend(), cap={"usd": 0.5})
    assert (code, states(study)) == (76, ["done"] * 2), "a trial costs a quarter"
    assert "cap.usd=0.5 is reached: $0.5 are spent; no other trial" in capsys.readouterr().out
    idle = Pretend()
    assert go(tmp_path, idle, cap={"usd": 0.5})[0] == 76
    assert idle.begun == []
    code, study = go(tmp_path, Pretend(), cap={"hours": 3 * STEPS / 3600})
    assert (code, states(study)) == (76, ["done"] * 3)
    code, study = go(tmp_path, Pretend())
    assert (code, states(study)) == (0, ["done"] * 4)
    code, _ = go(tmp_path / "unknown", Pretend(usd=None), cap={"usd": 9.0})
    assert code == 76
    assert "cap.usd=9 cannot be kept" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "code"), [("budget", 76), ("stopped", 75)])
def test_what_can_go_on_stays_open(status: str, code: int, tmp_path: Path) -> None:
    ends = Pretend(ends=lambda run: status if run.seed == 2 else None)
    found, study = go(tmp_path, ends, (SEEDS,), sampler="grid")
    assert found == code
    (left,) = [trial for trial in study.trials if trial.state == "open"]
    assert left.params["seed"] == 2
    if status == "budget":
        assert states(study).count("done") == 2, "a budget is of one run"
    found, study = go(tmp_path, runner := Pretend(), (SEEDS,), sampler="grid")
    assert (found, states(study)) == (0, ["done"] * 3)
    assert runner.begun[0] == left.name


def test_a_lost_run_begins_again(tmp_path: Path) -> None:
    lost = ["lost"]
    runner = Pretend(ends=lambda run: lost.pop() if lost else None)
    code, study = go(tmp_path, runner, trials=1)
    assert (code, states(study), runner.begun) == (0, ["done"], ["trial-000"] * 2)


@pytest.mark.parametrize("here", [True, False])
def test_asked_to_stop(here: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of this machine save and end; jobs go on."""
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    runner = Pretend(here=here, places=2)
    looked = runner.ended

    def ended() -> Iterator[End]:
        if runner.looks == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from looked()

    runner.ended = ended  # type: ignore[method-assign]
    code, study = go(tmp_path, runner)
    assert code == 75
    assert states(study) == ["done", "done", "open", "open"]
    assert runner.stopped == (["trial-002", "trial-003"] if here else [])
    assert ("the jobs go on" in capsys.readouterr().out) is not here
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    code, study = go(tmp_path, Pretend(going=runner.going))
    assert (code, states(study)) == (0, ["done"] * 4)


def test_a_journal_that_a_kill_tore(tmp_path: Path) -> None:
    go(tmp_path, Pretend(), trials=2)
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "worker')
    os.symlink(path, f"{path}.lock")  # of the process that was writing
    code, study = go(tmp_path, Pretend(), trials=3)
    assert (code, states(study)) == (0, ["done"] * 3)
    assert path.read_bytes().startswith(whole)
    mend(tmp_path / "missing")
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match=r"study.journal is not whole"):
        go(tmp_path, Pretend(), trials=3)
    with pytest.raises(DataError, match=r"study.journal cannot be read"):
        read(tmp_path)


def test_grids_end_with_their_last_point(tmp_path: Path) -> None:
    space = (SEEDS, KINDS)
    assert points(space) == 6
    assert points((SEEDS, RATE)) is None
    code, study = go(tmp_path, Pretend(places=4), space, sampler="grid", trials=100)
    assert (code, states(study)) == (0, ["done"] * 6)
    found = {(trial.params["seed"], trial.params["ffn"]) for trial in study.trials}
    assert found == {(seed, kind) for seed in (1, 2, 3) for kind in ("kan", "dense")}
    assert study.words(study.trials[0]) == [
        f"seed={study.trials[0].params['seed']}",
        f"ffn={study.trials[0].params['ffn']}",
    ]
    with pytest.raises(ConfigError, match=r"sampler=grid cannot try all of optim.lr=tag"):
        check_space(search(sampler="grid"), (RATE,))


def test_one_process_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalmagrove.cli.sweep import _claim

    lock = _claim(tmp_path / "s")
    with pytest.raises(ConfigError, match="study=s is being searched by another process"):
        _claim(tmp_path / "s")
    os.close(lock)
    os.close(_claim(tmp_path / "s"))


def test_looks_are_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger is read again only when it has grown."""
    from kalmagrove.cli import search as module

    reads: list[Path] = []
    plain = module.read_history
    monkeypatch.setattr(module, "read_history", lambda path: reads.append(path) or plain(path))
    ledgers = module.Ledgers()
    assert ledgers.of(tmp_path).lines == ()
    ledger = Ledger(tmp_path / "ledger.jsonl", clock=time.monotonic)
    for _ in range(3):
        ledger.write("start", 0, 0, Spent(), **BEGIN)
        assert len(ledgers.of(tmp_path).lines) == len(ledgers.of(tmp_path).lines) == ledger.lines
    assert len(reads) == 3

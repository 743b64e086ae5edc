"""A study of Optuna's on disk: what is tried next, what came of it. The only home of optuna.

It lies in `study.journal` beside the trials' folders, a file that is only ever appended to: no
database, whole after a kill, and safe on network file systems, where SQLite's locks are not.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kalmagrove.cli.compose import Axis
from kalmagrove.cli.run_folder import differences
from kalmagrove.config import ConfigError, DataError, Search

JOURNAL = "study.journal"
GENERATION = 10  # trials of nsga2
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "open",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """A point of the space. Trials of one point share a run, whose folder `name` is.

    values: of the objective, if it is done. why: of a failed one.
    """

    number: int
    name: str
    params: Mapping[str, Any]
    state: str
    values: tuple[float, ...] = ()
    why: str = ""


class Study:
    """Trials that were told to Optuna, and those to come."""

    def __init__(
        self,
        folder: Path,
        search: Search,
        space: Sequence[Axis],
        settings: Mapping[str, Any],
        resources: tuple[int, int] = (1, 1),
    ) -> None:
        """Open the study in `folder`, or begin it. One process at a time may.

        Args:
            settings: of the runs, as far as they decide the result; flat.
            resources: steps to the first held-out loss, and of the whole run.

        Raises:
            ConfigError: it was begun with another space, objective or settings.
            DataError: its journal was changed by other means.
        """
        self._search, self._space = search, list(space)
        path = folder / JOURNAL
        mend(path)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name=search.study,
                directions=["minimize"] * len(search.measures),
                pruner=_pruner(search, resources),
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            raise DataError(f"{path} is not whole ({error}); give another study=NAME") from None
        facts = {
            "objective": search.objective,
            "space": {axis.key: describe(axis) for axis in space},
            "settings": json.loads(json.dumps(dict(settings))),
        }
        before = self._study.user_attrs.get("search")
        if before is None:
            self._study.set_user_attr("search", facts)
        else:
            _agree(search.study, before, facts)
        self._live: dict[int, optuna.trial.Trial] = {}
        self._told: dict[int, set[int]] = {}  # steps, by trial

    @property
    def trials(self) -> list[Trial]:
        """All but those that wait to be tried again, in order."""
        return _trials(self._study)

    def left(self, total: int) -> int:
        """How many are to be begun until there are `total`; failed ones that wait included."""
        waiting = sum(trial.state == TrialState.WAITING for trial in self._frozen())
        return waiting + max(0, total - len(counted(self.trials)))

    def open(self) -> list[Trial]:
        """The trials that an earlier process began and did not end."""
        for trial in self._frozen():
            if trial.state == TrialState.RUNNING:
                self._take(optuna.trial.Trial(self._at(trial.number), trial._trial_id))
        return [trial for trial in self.trials if trial.state == "open"]

    def ask(self) -> Trial:
        """A new trial, which follows from those before and `search_seed`, not from a restart."""
        trial = self._at(len(self._frozen())).ask()
        self._take(trial)
        return next(found for found in self.trials if found.number == trial.number)

    def words(self, trial: Trial) -> list[str]:
        """The overrides that the trial is."""
        return [axis.word(trial.params[axis.key]) for axis in self._space]

    def known(self, trial: Trial) -> Trial | None:
        """An earlier trial of the same point that is done or pruned."""
        same = (t for t in self.trials if t.name == trial.name and t.state in ("done", "pruned"))
        return next(same, None)

    def shown(self, number: int) -> str:
        """What the trial chooses, for people."""
        return settings_text(self._of(number).params)

    def report(self, number: int, losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        """Tell held-out losses by step; returns those that were not told before."""
        before = self._told.setdefault(number, set(self._of(number).intermediate_values))
        news = [(step, loss) for step, loss in losses if step not in before]
        before |= {step for step, _ in news}
        for step, loss in news if len(self._search.measures) == 1 else ():
            self._live[number].report(loss, step)
        return news

    def should_prune(self, number: int) -> bool:
        """Whether the trial's losses so far are worse than the pruner lets pass."""
        return self._search.pruner != "none" and self._live[number].should_prune()

    def prune(self, number: int) -> None:
        """Note that the trial is being stopped, whoever then sees it end."""
        self._live[number].set_user_attr("pruned", True)

    def is_pruned(self, number: int) -> bool:
        return bool(self._of(number).user_attrs.get("pruned"))

    def tell(self, number: int, state: str, values: Sequence[float] = (), why: str = "") -> None:
        """End a trial: done (with the objective's values), pruned, or failed."""
        if why:
            self._live[number].set_user_attr("why", why)
        code = next(code for code, name in STATES.items() if name == state)
        if self._search.sampler == "grid":  # its own would end a loop of Optuna's after the last
            self._study.sampler = optuna.samplers.RandomSampler()
        self._study.tell(number, list(values) if state == "done" else None, code)
        del self._live[number]

    def retry(self) -> None:
        """Have the points tried again whose newest trial failed."""
        waiting = [
            trial.system_attrs["fixed_params"]
            for trial in self._frozen()
            if trial.state == TrialState.WAITING
        ]
        for trial in counted(self.trials):
            if trial.state == "failed" and trial.params not in waiting:
                self._study.enqueue_trial(dict(trial.params))

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _of(self, number: int) -> FrozenTrial:
        return self._frozen()[number]

    def _at(self, number: int) -> optuna.Study:
        """The study with a sampler whose draws depend on the trial's number alone."""
        self._study.sampler = self._sampler(number)
        return self._study

    def _take(self, trial: optuna.trial.Trial) -> None:
        """Draw what the trial does not have yet."""
        for axis in self._space:
            _suggest(trial, axis)
        self._live[trial.number] = trial

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        search, samplers = self._search, optuna.samplers
        seed = (search.search_seed * 1_000_003 + number) % 2**32
        if search.sampler == "grid":
            return samplers.GridSampler(
                {axis.key: _values(axis) for axis in self._space}, search.search_seed
            )
        if search.sampler == "nsga2":
            return samplers.NSGAIISampler(population_size=GENERATION, seed=seed)
        if search.sampler == "random":
            return samplers.RandomSampler(seed)
        return samplers.TPESampler(n_startup_trials=search.startup, seed=seed)


def counted(trials: Sequence[Trial]) -> list[Trial]:
    """Without failed ones that were tried again."""
    later: set[str] = set()
    found = []
    for trial in reversed(trials):
        if not (trial.state == "failed" and trial.name in later):
            found.append(trial)
        later.add(trial.name)
    return found[::-1]


def read(folder: Path) -> tuple[dict[str, Any], list[Trial]]:
    """What a study searches (`objective`, `space`, `settings`), and its trials. Changes nothing.

    Raises:
        DataError: its journal cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / JOURNAL
    try:
        study = optuna.load_study(
            study_name=None, storage=JournalStorage(JournalFileBackend(str(path)))
        )
        return study.user_attrs["search"], _trials(study)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def mend(path: Path) -> None:
    """Take away what a kill left: a torn last line, and the lock of whoever wrote it."""
    with suppress(FileNotFoundError):
        path.with_name(f"{path.name}.lock").unlink()
    with suppress(FileNotFoundError):
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(path, whole)


def check_space(search: Search, space: Sequence[Axis]) -> None:
    """ConfigError if there is nothing to search, or not with this sampler."""
    if not space:
        rule = "has nothing to search: no setting has several values"
        remedy = "try ffn=kan,dense or 'optim.lr=tag(log, interval(1e-4, 1e-2))'"
        raise ConfigError("study", search.study, rule, remedy)
    for axis in space:
        if search.sampler == "grid" and not axis.words:
            rule = f"cannot try all of {axis.key}={describe(axis)}"
            raise ConfigError("sampler", "grid", rule, f"try {axis.key}=1e-3,2e-3 or sampler=tpe")


def points(space: Sequence[Axis]) -> int | None:
    """How many there are; None: no end of them."""
    return math.prod(len(axis.words) for axis in space) if all(a.words for a in space) else None


def describe(axis: Axis) -> str:
    """
    >>> describe(Axis("seed", ("seed=1", "seed=2"))), describe(Axis("lr", low=1, high=9, log=True))
    ('1,2', 'tag(log, interval(1, 9))')
    """
    if axis.words:
        return ",".join(_texts(axis))
    text = f"interval({axis.low}, {axis.high})"
    return f"tag(log, {text})" if axis.log else text


def settings_text(params: Mapping[str, Any]) -> str:
    """
    >>> settings_text({"optim.lr": 0.00123456, "ffn": "kan", "seed": 3})
    'optim.lr=0.001235 ffn=kan seed=3'
    """
    return " ".join(f"{key}={setting_text(value)}" for key, value in params.items())


def setting_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _texts(axis: Axis) -> list[str]:
    return [word.partition("=")[2] for word in axis.words]


def _suggest(trial: optuna.trial.Trial, axis: Axis) -> None:
    if axis.words and axis.step is None:
        trial.suggest_categorical(axis.key, _texts(axis))
    elif isinstance(axis.low, int) and isinstance(axis.high, int):
        trial.suggest_int(axis.key, axis.low, axis.high, step=int(axis.step or 1), log=axis.log)
    else:
        trial.suggest_float(axis.key, axis.low, axis.high, step=axis.step, log=axis.log)


def _values(axis: Axis) -> list[Any]:
    """Of a grid; numbers are those that Optuna makes of a range."""
    if axis.step is None:
        return list(_texts(axis))
    low, step = Decimal(str(axis.low)), Decimal(str(axis.step))
    return [type(axis.low)(low + i * step) for i in range(len(axis.words))]


def _pruner(search: Search, resources: tuple[int, int]) -> optuna.pruners.BasePruner:
    first, last = resources
    least = max(first, search.prune_from)
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(search.startup, search.prune_from)
    if search.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=least, max_resource=last)
    return optuna.pruners.NopPruner()


def _agree(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ConfigError if the study was begun with other `facts`, naming what differs."""
    wrong = []
    if before["objective"] != now["objective"]:
        wrong.append(f"objective was {before['objective']}, is {now['objective']}")
    for key in dict.fromkeys([*before["space"], *now["space"]]):
        was, found = (facts["space"].get(key, "not searched") for facts in (before, now))
        if was != found:
            wrong.append(f"{key} was {was}, is {found}")
    wrong += differences(before["settings"], now["settings"])
    if wrong:
        rule = f"was begun with other settings ({'; '.join(wrong[:5])})"
        raise ConfigError("study", name, rule, "give another study=NAME")


def _trials(study: optuna.Study) -> list[Trial]:
    return list(_named(study.get_trials(deepcopy=False)))


def _named(trials: Sequence[FrozenTrial]) -> Iterator[Trial]:
    names: dict[tuple[Any, ...], str] = {}
    for trial in trials:
        if trial.state == TrialState.WAITING:
            continue
        point = tuple(sorted(trial.params.items()))
        name = names.setdefault(point, f"trial-{trial.number:03d}")
        yield Trial(
            trial.number,
            name,
            trial.params,
            STATES[trial.state],
            tuple(trial.values or ()),
            trial.user_attrs.get("why", ""),
        )

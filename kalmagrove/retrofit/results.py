"""Reads the finished runs of an experiment with arms, and checks that they can be compared.

One folder a run, that is an arm with a seed: `arm.json`, and for each suite
`evaluation/<suite>/results.json` with `items/<task>.jsonl` beside it. `statistics` works on what is
read here.
Letters: N items of a task, R runs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from kalmagrove.config.errors import DataError
from kalmagrove.retrofit.resampling import Matrix

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A part of a file that others write, and may add to."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class ArmRecord(Record):
    """`arm.json`. None: not known, or not measured."""

    arm: str
    seed: int
    trainable_parameters: NonNegativeInt
    total_parameters: NonNegativeInt
    peak_bytes: NonNegativeInt | None = None
    tokens_per_second: float | None = None
    usd: float | None = None
    train_seconds: float | None = None
    val_nats: float | None = None  # held-out chat loss, nats per target token
    bits_per_byte: float | None = None
    device: str | None = None


class Metric(Record):
    value: float | None
    stderr: float | None = None


class TaskRecord(Record):
    """One task of `results.json`; `random` and `majority` are accuracies that need no model."""

    n: PositiveInt
    primary: str = "acc"  # the metric that `correct` of an item is
    metrics: dict[str, Metric] = {}
    random: float
    majority: float
    parse_failures: float | None = None


class SuiteRecord(Record):
    tasks: dict[str, TaskRecord]


class ItemRecord(Record):
    id: int
    correct: bool | float


@dataclass(frozen=True)
class Arm:
    """The runs of one arm. `columns` are theirs in `Results.correct`, in the order of `seeds`.

    fixed: the arm trains nothing and has one run, which stands for every seed.
    """

    name: str
    seeds: tuple[int, ...]
    columns: tuple[int, ...]
    fixed: bool


@dataclass(frozen=True)
class Task:
    """What is known of a task without any model."""

    name: str  # suite/task where there are several suites
    items: int
    random: float
    majority: float


@dataclass(frozen=True)
class Results:
    """Comparable runs: the same seeds in all arms that train, the same items in all runs."""

    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]
    records: tuple[ArmRecord, ...]  # by column
    correct: tuple[Matrix, ...]  # by task: [N, R] of 0 and 1
    parse_failures: tuple[tuple[float | None, ...], ...]  # by task, by column

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the arms that have seeds; of all arms if none has."""
        return next((arm.seeds for arm in self.arms if not arm.fixed), self.arms[0].seeds)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def of_arm(self, arm: Arm) -> list[ArmRecord]:
        return [self.records[column] for column in arm.columns]


@dataclass(frozen=True)
class Answers:
    """One task as one run did it, items sorted by id."""

    record: TaskRecord
    ids: tuple[int, ...]
    correct: Matrix


@dataclass(frozen=True)
class OneRun:
    """A folder as it was read; tasks by (suite, task)."""

    folder: Path
    record: ArmRecord
    tasks: dict[tuple[str, str], Answers]


def read_results(folders: Sequence[str | Path], suite: str | None = None) -> Results:
    """The runs in `folders`; arms stand in the order in which they are named first.

    Args:
        suite: leave out the tasks of others.
    Raises:
        DataError: a file is missing or malformed, an arm has a seed twice or lacks one that others
            have, or runs differ in tasks, items or baselines.
    """
    if not folders:
        raise DataError("there are no runs to compare; name the folders of finished runs")
    runs = [read_run(Path(folder), suite) for folder in folders]
    names = list(dict.fromkeys(run.record.arm for run in runs))
    runs.sort(key=lambda run: (names.index(run.record.arm), run.record.seed))
    for before, after in pairwise(runs):
        if (before.record.arm, before.record.seed) == (after.record.arm, after.record.seed):
            raise DataError(
                f"arm={after.record.arm} has seed={after.record.seed} twice: {before.folder} and "
                f"{after.folder}; name one of them"
            )
    arms = [_arm(name, runs) for name in names]
    _same_seeds(arms)
    for run in runs[1:]:
        _same_items(runs[0], run)
    for arm in arms:
        _same_model(arm, runs)
    first = runs[0].tasks
    several = len({suite for suite, _ in first}) > 1
    return Results(
        arms=tuple(arms),
        tasks=tuple(
            Task(
                f"{key[0]}/{key[1]}" if several else key[1],
                answers.record.n,
                answers.record.random,
                answers.record.majority,
            )
            for key, answers in first.items()
        ),
        records=tuple(run.record for run in runs),
        correct=tuple(np.stack([run.tasks[key].correct for run in runs], axis=1) for key in first),
        parse_failures=tuple(
            tuple(run.tasks[key].record.parse_failures for run in runs) for key in first
        ),
    )


def read_run(folder: Path, only: str | None = None) -> OneRun:
    """One folder, checked by itself; `only`: the suite that is read."""
    record = _parse(ArmRecord, _json(folder / "arm.json"), folder / "arm.json")
    tasks: dict[tuple[str, str], Answers] = {}
    for path in sorted(folder.glob(f"evaluation/{only or '*'}/results.json")):
        suite = _parse(SuiteRecord, _json(path), path)
        for name, task in sorted(suite.tasks.items()):
            items = path.parent / "items" / f"{name}.jsonl"
            tasks[path.parent.name, name] = _answers(items, task, path)
    if not tasks:
        place = f"evaluation/{only or '<suite>'}/results.json"
        raise DataError(f"{folder} has no {place}; evaluate the run first")
    return OneRun(folder, record, tasks)


def _answers(path: Path, task: TaskRecord, results: Path) -> Answers:
    found: dict[int, int] = {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        where = f"{path}: line {number}"
        try:
            item = _parse(ItemRecord, json.loads(line), where)
        except ValueError:
            raise DataError(f"{where} is not JSON; evaluate the run again") from None
        if item.correct not in (0, 1):
            raise DataError(
                f"{where}: correct={item.correct} must be 0 or 1; arms are compared by "
                "accuracy alone, leave other tasks out"
            )
        if item.id in found:
            raise DataError(f"{where}: id={item.id} is there twice; evaluate the run again")
        found[item.id] = int(item.correct)
    if len(found) != task.n:
        raise DataError(
            f"{path} has {len(found)} items, {results} says n={task.n}; evaluate the run again"
        )
    ids = tuple(sorted(found))
    correct = np.array([found[number] for number in ids], dtype=np.float64)
    told = task.metrics[task.primary].value if task.primary in task.metrics else None
    if told is not None and abs(told - correct.mean()) > 1e-3:
        raise DataError(
            f"{path} has an accuracy of {correct.mean():.4f}, {results} says "
            f"{task.primary}={told:.4f}; evaluate the run again"
        )
    return Answers(task, ids, correct)


def _arm(name: str, runs: list[OneRun]) -> Arm:
    columns = tuple(i for i, run in enumerate(runs) if run.record.arm == name)
    seeds = tuple(runs[i].record.seed for i in columns)
    trained = any(runs[i].record.trainable_parameters for i in columns)
    return Arm(name, seeds, columns, fixed=len(columns) == 1 and not trained)


def _same_seeds(arms: list[Arm]) -> None:
    seeded = [arm for arm in arms if not arm.fixed]
    everything = sorted({seed for arm in seeded for seed in arm.seeds})
    for arm in seeded:
        if missing := [seed for seed in everything if seed not in arm.seeds]:
            other = next(a.name for a in seeded if missing[0] in a.seeds)
            listed = ", ".join(map(str, missing))
            raise DataError(
                f"arm={arm.name} lacks seed {listed}, which arm={other} has; run it, or leave that "
                "seed out of all arms (only an arm without trainable parameters may have one run)"
            )


def _same_items(one: OneRun, other: OneRun) -> None:
    if missing := sorted(set(one.tasks) ^ set(other.tasks)):
        suite, task = missing[0]
        has, lacks = (one, other) if missing[0] in one.tasks else (other, one)
        raise DataError(
            f"{has.folder} was evaluated on {suite}/{task}, {lacks.folder} was not; evaluate all "
            "runs on the same tasks"
        )
    for (suite, task), mine in one.tasks.items():
        its = other.tasks[suite, task]
        if apart := sorted(set(mine.ids) ^ set(its.ids)):
            raise DataError(
                f"the items of {suite}/{task} differ: {len(apart)} are in one of {one.folder} and "
                f"{other.folder} alone, the first is id={apart[0]}; evaluate with the same limit"
            )
        for key in ("random", "majority"):
            a, b = getattr(mine.record, key), getattr(its.record, key)
            if abs(a - b) > 1e-6:
                raise DataError(
                    f"{key} of {suite}/{task} is {a} in {one.folder} and {b} in {other.folder}; "
                    "the items must be the same"
                )


def _same_model(arm: Arm, runs: list[OneRun]) -> None:
    for key in ("trainable_parameters", "total_parameters"):
        counts = {getattr(runs[column].record, key) for column in arm.columns}
        if len(counts) > 1:
            shown = " and ".join(map(str, sorted(counts)))
            raise DataError(
                f"{key} of arm={arm.name} differ between seeds: {shown}; give different models "
                "different names"
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; finish the run, or leave it out") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error})") from None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _parse(kind: type[R], value: Any, where: object) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        raise DataError(f"{where}: {key}: {first['msg']}") from None

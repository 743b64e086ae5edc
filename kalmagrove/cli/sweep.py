"""`kalmagrove sweep`: a search over settings with Optuna, whose trials are runs.

The same command continues a search, whatever ended it; `show` tells what was found.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalmagrove.cli import launch, run_folder, slurm, train
from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.compose import Axis, compose_tree, hydra_app, sweep_axes
from kalmagrove.config import ConfigError, KalmaGroveError, Run, Search, validate
from kalmagrove.config.errors import writing

LOCK = ".sweep"  # in the study's folder: locked by the process that searches
OURS = ("name", "hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper")
USAGE = """kalmagrove sweep show: what a sweep has found

usage: kalmagrove sweep show FOLDER

  FOLDER  of a study (runs/STUDY), or of any runs: those of a sweep with -m too

Prints the table of its runs, the best first, and writes sweep.json, sweep.csv and sweep.svg (loss
against dollars with the Pareto front) into it.
"""


def main(argv: Sequence[str]) -> int:
    """Search as `argv` says, or show what was found; returns the exit code."""
    if argv and argv[0] == "show":
        return _show(argv[1:])
    own = [word for word in argv if _is_own(word)]
    if any(word.startswith("-") for word in argv):
        if {"-m", "--multirun"} & set(argv):
            rule, remedy = "is what `kalmagrove sweep` does without it", "leave it out"
            raise ConfigError("argument", "-m", rule, remedy)
        flags = [word for word in argv if word.startswith("-") or "=" not in word]
        return hydra_app("sweep", [*flags, *own], lambda tree: None, lambda none, _: 0)
    search = parse(compose_tree("sweep", own))
    return _search(search, [word for word in argv if word not in own])


def parse(tree: dict[str, Any]) -> Search:
    """The validated keys of `conf/sweep.yaml`."""
    if tree["study"] is None:
        rule = "is required: the folder of the trials"
        raise ConfigError("study", None, rule, "try study=lr; see kalmagrove sweep --help")
    return validate(Search, tree)


def _is_own(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0].partition(".")[0]
    return not word.startswith("-") and key in Search.model_fields


def _search(search: Search, words: Sequence[str]) -> int:
    from kalmagrove.cli import sweep_table
    from kalmagrove.cli.runners import Here, Jobs, Runner
    from kalmagrove.cli.search import Loop
    from kalmagrove.cli.study import Study, Trial, check_space, points

    launch.launched(True)  # one process searches
    fixed, space = plan(words)
    check_space(search, space)
    base = checked(search, fixed, space)
    folder = Path(base.dir)
    runner: Runner = Here(search.at_once) if base.cluster is None else Jobs(search.at_once)
    resources = min(base.eval.every, base.steps), base.steps
    total = min(search.trials, points(space) or search.trials)

    def make(trial: Trial) -> Run:
        return run_of(search, [*fixed, *study.words(trial)], trial.name)

    def changed() -> None:
        sweep_table.write(sweep_table.summarize(folder))

    lock = _claim(folder)
    try:
        study = Study(folder, search, space, decisive(search, base), resources)
        print(f"study {search.study}: {total} trials in {folder}", flush=True)
        code = Loop(search, study, runner, folder, make, total, changed).run()
        changed()
    except OSError as error:
        raise KalmaGroveError(f"{folder} cannot be written ({error}); run it again") from error
    finally:
        os.close(lock)
    sweep_table.show(sweep_table.summarize(folder))
    print(f"{folder}/sweep.json, sweep.csv, sweep.svg")
    return code


def plan(words: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """The words of every run, and the settings that are searched.

    Raises:
        ConfigError: for one that a later word undoes, or that the sweep itself decides.
    """
    axes = sweep_axes("train", words)
    fixed = [axis for axis in axes if len(axis.words) == 1]
    space = [axis for axis in axes if len(axis.words) != 1]
    for i, axis in enumerate(axes):
        if axis.key == "name" or axis.key.startswith(OURS[1:]):
            rule = "is not for kalmagrove sweep, which names and begins its runs itself"
            raise ConfigError(axis.key, _said(axis), rule, "leave it out; see --help")
        if axis.key in ("dir", "cluster") and axis in space:
            raise ConfigError(axis.key, _said(axis), "must be one for all trials")
        if axis in space and axis.key in [later.key for later in axes[i + 1 :]]:
            raise ConfigError(axis.key, _said(axis), "is given again after it", "give it once")
    return [axis.words[0] for axis in fixed], space


def checked(search: Search, fixed: Sequence[str], space: Sequence[Axis]) -> Run:
    """The run of the first value of every axis; all other values are looked at one by one.

    Raises:
        ConfigError: a run cannot be, or its losses or dollars would not be known.
    """
    choices = [list(axis.words) or [axis.word(axis.low), axis.word(axis.high)] for axis in space]
    first = [words[0] for words in choices]
    base = run_of(search, [*fixed, *first])
    for i, words in enumerate(choices):
        for word in words[1:]:
            run_of(search, [*fixed, *first[:i], word, *first[i + 1 :]])
    if search.pruner != "none" and base.eval.every >= base.steps:
        rule = f"must be below steps={base.steps} for pruner={search.pruner}, which compares losses"
        raise ConfigError("eval.every", base.eval.every, rule, f"try {max(1, base.steps // 10)}")
    if base.cluster is not None:
        slurm.shape(base)
    return base


def run_of(search: Search, words: Sequence[str], name: str | None = None) -> Run:
    """The validated run of a trial.

    Raises:
        ConfigError: it cannot be.
    """
    run = train.checked(compose_tree("train", words))
    if run.checkpoint.resume == "never":
        rule, remedy = "would lose trials: the same command continues a sweep", "leave it out"
        raise ConfigError("checkpoint.resume", "never", rule, remedy)
    for key, wants in (("objective", "usd" in search.measures), ("cap.usd", search.cap.usd)):
        if wants:
            _check_price(run, key, search.objective if key == "objective" else wants)
    place = Path(run.dir).expanduser().resolve() / search.study
    track = run.track.model_copy(update={"group": run.track.group or search.study})
    started = run.launch.model_copy(update={"nproc": launch.world_size(run)})
    change = {"name": name, "dir": str(place), "track": track, "launch": started}
    return run.model_copy(update=change)


def decisive(search: Search, run: Run) -> dict[str, Any]:
    """The settings that all trials of a study must share for their values to be comparable."""
    found = dict(run_folder.flat(run.result_settings))
    found["eval.max_tokens"] = run.eval.max_tokens
    if "usd" in search.measures:
        found |= {f"price.{k}": v for k, v in run.price.model_dump().items() if "usd" in k}
    return found


def _check_price(run: Run, key: str, value: Any) -> None:
    """ConfigError if the run's dollars will not be known."""
    price = run.price
    if run.cluster is not None:
        known = (price.usd_per_gpu_hour, price.usd_per_core_hour) != (None, None)
    elif launch.visible_gpus():
        known = price.usd_per_gpu_hour is not None
    else:
        known = price.usd_per_core_hour is not None
    if not known:
        rule = f"needs the price of what the runs are done on, and price={price.name} has none"
        remedy = "try price=cpu or price=h100, or set price.usd_per_gpu_hour to what you pay"
        raise ConfigError(key, value, rule, remedy)


def _claim(folder: Path) -> int:
    """The lock of the study, until this process ends.

    Raises:
        ConfigError: another process searches here, or the folder cannot be written.
    """
    with writing("dir", folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        lock = run_folder.hold(folder / LOCK)
    if lock is None:
        rule = "is being searched by another process"
        raise ConfigError("study", folder.name, rule, "wait for it, or give another study=NAME")
    return lock


def _show(argv: Sequence[str]) -> int:
    from kalmagrove.cli import sweep_table

    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = Parser("sweep", USAGE)
    parser.add_argument("folder", type=Path)
    summary = sweep_table.summarize(parser.parse_args(argv).folder.expanduser().resolve())
    sweep_table.show(summary)
    sweep_table.write(summary)
    print(f"{summary.folder}/sweep.json, sweep.csv, sweep.svg")
    return 0


def _said(axis: Axis) -> str:
    from kalmagrove.cli.study import describe

    return describe(axis)

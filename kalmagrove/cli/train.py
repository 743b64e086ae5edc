"""`kalmagrove train`: compose, validate, start the processes, and on each of them the main path.

`train_on_this_rank` is the whole program in one screen: builders, then `fit`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.compose import compose_tree, hydra_app, read_yaml
from kalmagrove.config import Checkpoint, ConfigError, Interrupted, Run, load


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says (Hydra overrides, `--dry-run`, `--config FILE`); returns the exit code."""
    words = list(argv)
    dry_run = "--dry-run" in words
    if dry_run:
        words.remove("--dry-run")
    if "--config" in words:
        return _start(load(_saved(words)), dry_run, in_sweep=False)
    return hydra_app("train", words, lambda tree, sweep: _start(load(tree), dry_run, sweep))


def _saved(words: list[str]) -> dict[str, Any]:
    """The tree of a run's frozen `config.yaml`."""
    at = words.index("--config")
    if at + 1 >= len(words) or len(words) > 2:
        raise ConfigError("--config", " ".join(words), "takes one file and no overrides with it")
    return read_yaml(words[at + 1])


def _start(run: Run, dry_run: bool, in_sweep: bool) -> int:
    launched = launch.launched_world_size()
    world_size = launched or launch.processes_to_start(run)
    run.check_world(world_size)
    if dry_run:
        from kalmagrove.cli.dry_run import describe

        describe(run, world_size)
        return 0
    if launched is not None:
        return train_on_this_rank(run)
    folder = run_folder.choose(run)
    summary = run_folder.finished(folder, run)
    if summary is not None:
        return _already_finished(folder, summary)
    if world_size == 1 and not in_sweep:
        return train_on_this_rank(run)
    return launch.launch(run, run_folder.freeze(folder, run), world_size)


def _already_finished(folder: Path, summary: dict[str, Any]) -> int:
    from kalmagrove.track.summary import print_table

    print_table(summary)
    print(
        f"{folder} has already done its {summary['steps']} steps; "
        "train anew with checkpoint.resume=never, or change the configuration"
    )
    return 0


def train_on_this_rank(run: Run) -> int:
    """The main path, on one process of the run; returns the exit code."""
    import torch

    from kalmagrove.cli import finish
    from kalmagrove.data import build_batches, prepare, val_batches
    from kalmagrove.engine import build_engine, connect, fit, resume
    from kalmagrove.nn import build_model
    from kalmagrove.parallel import Groups, broadcast_object
    from kalmagrove.track import build_meters

    prepared = prepare(run.data, progress=launch.launched_rank() == 0)
    run = run.with_vocab(prepared.vocab_size)
    device = connect(run)
    groups = Groups.init(run.parallel, device)
    folder = broadcast_object(_claimed(run) if groups.is_main else None, groups.world)
    if isinstance(folder, ConfigError):
        raise folder
    torch.manual_seed(run.seed)
    batches = build_batches(prepared, run, groups.dp.rank, groups.dp.size)
    held_out = val_batches(prepared, run, groups.dp.rank, groups.dp.size)
    model = build_model(run.model, groups)
    engine = build_engine(model, run, groups)
    meters = build_meters(run, folder, groups, prepared)
    try:
        state = resume(engine, batches, meters, run, folder)
        outcome = fit(engine, batches, held_out, meters, state, run)
    except Interrupted as stop:
        finish.report(run, folder, groups, meters, prepared, "stopped")
        raise stop
    finish.report(run, folder, groups, meters, prepared, outcome)
    return 0


def _claimed(run: Run) -> Path | ConfigError:
    """The run's folder, claimed; an error is returned, not raised, so that all ranks learn of it."""
    folder = run_folder.choose(run)
    try:
        run_folder.claim(folder, run)
    except ConfigError as error:
        return error
    return folder

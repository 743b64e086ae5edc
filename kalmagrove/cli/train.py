"""`kalmagrove train`: compose, validate, start the processes, and on each of them the main path.

`train_on_this_rank` is the whole program in one screen: builders, then `fit`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.compose import hydra_app
from kalmagrove.cli.session import (
    already_finished,
    by_main,
    check_same_data,
    claim,
    path_here,
    rank_heartbeat,
    saved_tree,
    set_up_logging,
)
from kalmagrove.cli.supervise import supervise
from kalmagrove.config import KalmaGroveError, Run, load
from kalmagrove.config.attempts import Attempt, heartbeat

if TYPE_CHECKING:  # torch is imported only once the configuration is known to work
    from kalmagrove.data import Prepared
    from kalmagrove.parallel import Groups
    from kalmagrove.track import Energy, Meters

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says (overrides, `--dry-run`, `--config FILE`); returns the exit code."""
    words = [word for word in argv if word != "--dry-run"]
    dry_run = len(words) < len(argv)
    if any(word.partition("=")[0] == "--config" for word in words):
        return _start(checked(saved_tree(words)), dry_run, in_sweep=False)
    return hydra_app("train", words, checked, lambda run, sweep: _start(run, dry_run, sweep))


def checked(tree: dict[str, Any]) -> Run:
    run = load(tree)
    return run.check_world(launch.world_size(run))


def _start(run: Run, dry_run: bool, in_sweep: bool) -> int:
    world_size = launch.world_size(run)
    if dry_run:
        from kalmagrove.cli.dry_run import describe

        describe(run, world_size)
        return 0
    if launch.launched(in_sweep):
        with rank_heartbeat(run, world_size) as beating:
            return train_on_this_rank(run, beating.attempt)
    launch.check_here(run)
    folder = run_folder.choose(run)
    summary = run_folder.finished(folder, run)
    if summary is not None:
        return already_finished(folder, summary)
    with heartbeat(folder, world_size, since=0.0 if in_sweep else None) as beating:
        if world_size == 1 and not in_sweep and not run.launch.max_restarts:
            return train_on_this_rank(run, beating.attempt)
        from kalmagrove.data import check_seq_len, prepare

        check_seq_len(prepare(run.data), run.data.seq_len)  # once, seen, and it can be stopped
        code = supervise(run_folder.pinned(run, folder), world_size, beating)
    if code == 0 and run_folder.done(folder, run) is None:
        raise KalmaGroveError(
            f"the processes ended without an error, but {folder}/summary.json does not say that "
            f"the {run.steps} steps are done; the same command continues"
        )
    return code


def train_on_this_rank(composed: Run, attempt: Attempt) -> int:
    """The main path, on one process of the run; returns the exit code."""
    import torch

    from kalmagrove.data import build_batches, prepare, val_batches
    from kalmagrove.engine import build_engine, check_room, connect, disconnect, fit, resume
    from kalmagrove.nn import build_model
    from kalmagrove.parallel import Groups
    from kalmagrove.track import Energy

    set_up_logging()
    prepared = prepare(composed.data, progress=launch.launched_rank() == 0)
    run = composed.with_vocab(prepared.vocab_size)
    device = connect(run)
    energy = Energy.of(device)
    groups = Groups.init(run.parallel, device, run.launch.timeout)
    check_same_data(run, groups, prepared)
    folder, summary = claim(composed, groups)
    if summary is not None:
        if groups.is_main:
            already_finished(folder, summary)
        disconnect()
        return 0
    batches = build_batches(prepared, run, groups.dp.rank, groups.dp.size)
    held_out = val_batches(prepared, run, groups.dp.rank, groups.dp.size)
    torch.manual_seed(run.seed)
    model = build_model(run.model, groups)
    engine = build_engine(model, run, groups)
    meters = _meters(run, folder, groups, prepared, energy, attempt)
    state = resume(engine, batches, meters, run, folder)
    check_room(engine, state.folder, state.step)
    by_main(groups, lambda: run_folder.settle(folder, composed, prepared.tokenizer))
    by_main(groups, lambda: run_folder.write_plan(folder, _plan(run, groups)))
    outcome = fit(engine, batches, held_out, meters, state, run)
    if groups.is_main:
        del engine, model, meters, batches  # their memory may be needed
        _show_sample(run, outcome.checkpoint)
    disconnect()
    return 0


def _meters(
    run: Run,
    folder: Path,
    groups: "Groups",
    prepared: "Prepared",
    energy: "Energy",
    attempt: Attempt,
) -> "Meters":
    from kalmagrove.config.counts import parameter_count
    from kalmagrove.track import build_meters, flops_per_token

    path = path_here(run.model.backend, groups.device.type == "cuda")
    flops = flops_per_token(run.model, run.data.seq_len, path)
    count = parameter_count(run.model)
    return build_meters(
        run,
        folder,
        groups,
        params_total=count.total,
        params_active=count.active,
        flops_per_token=flops.training,
        forward_flops_per_token=flops.forward,
        hardware_flops_per_token=flops.hardware(run.engine.activation_checkpointing),
        val_bytes_per_token=prepared.val_bytes_per_token,
        val_split_tokens=prepared.manifest.val.targets,
        baselines={
            "unigram_nats": prepared.unigram_nats,
            "bigram_nats": prepared.bigram_nats,
        },
        energy=energy,
        attempt=attempt,
    )


def _plan(run: Run, groups: "Groups") -> dict[str, Any] | None:
    import torch

    from kalmagrove.plan import predict

    gpu = groups.device.type == "cuda"
    name = torch.cuda.get_device_name(groups.device) if gpu else None
    return predict(run, name, groups.world.size)


def _show_sample(run: Run, checkpoint: Path) -> None:
    """Write a few lines with the saved model, and keep them in the run's folder."""
    from kalmagrove.evaluate.generate import write
    from kalmagrove.evaluate.load import load_trained

    if not run.sample.max_new_tokens:
        return
    settings = run.sample.model_dump(exclude={"prompts"})
    try:
        model, tokenizer = load_trained(checkpoint)
        sample = write(model, tokenizer, run.sample.prompts, **settings)
        folder = checkpoint.parent.parent
        (folder / "samples" / f"{checkpoint.name}.txt").write_text(sample + "\n", encoding="utf-8")
    # A model that only fits on several devices, a full disk
    except (RuntimeError, MemoryError, OSError) as error:
        log.warning("no sample is written: %s", error)
        return
    print(
        f"\nA sample, temperature {run.sample.temperature:g}:\n\n{sample}\n\n{folder}", flush=True
    )

"""`kalmagrove train`: compose, validate, start the processes, and on each of them the main path.

`train_on_this_rank` is the whole program in one screen: builders, then `fit`.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.compose import hydra_app, read_yaml
from kalmagrove.config import ConfigError, Run, load

if TYPE_CHECKING:  # torch is imported only once the configuration is known to work
    from kalmagrove.data import Prepared
    from kalmagrove.parallel import Groups
    from kalmagrove.track import Meters


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says (overrides, `--dry-run`, `--config FILE`); returns the exit code."""
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
    from rich.console import Console

    from kalmagrove.track import results_table

    Console().print(results_table(summary))
    print(
        f"{folder} has already done its {summary['steps']} steps; train anew with "
        "checkpoint.resume=never, or change the configuration"
    )
    return 0


def train_on_this_rank(run: Run) -> int:
    """The main path, on one process of the run; returns the exit code."""
    import torch

    from kalmagrove.data import build_batches, prepare, val_batches
    from kalmagrove.engine import build_engine, connect, disconnect, fit, resume
    from kalmagrove.nn import build_model
    from kalmagrove.parallel import Groups

    logging.basicConfig(format="kalmagrove: %(message)s")
    if launch.launched_rank() == 0:
        logging.getLogger("kalmagrove").setLevel(logging.INFO)
    # DeepSpeed calls collectives under names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    prepared = prepare(run.data, progress=launch.launched_rank() == 0)
    run = run.with_vocab(prepared.vocab_size)
    device = connect(run)
    groups = Groups.init(run.parallel, device)
    folder = _claim(run, groups, prepared)
    batches = build_batches(prepared, run, groups.dp.rank, groups.dp.size)
    held_out = val_batches(prepared, run, groups.dp.rank, groups.dp.size)
    torch.manual_seed(run.seed)
    model = build_model(run.model, groups)
    engine = build_engine(model, run, groups)
    meters = _meters(run, folder, groups, prepared)
    state = resume(engine, batches, meters, run, folder)
    outcome = fit(engine, batches, held_out, meters, state, run)
    if groups.is_main:
        _show_sample(run, outcome.checkpoint)
    disconnect()
    return 0


def _claim(run: Run, groups: "Groups", prepared: "Prepared") -> Path:
    """The run's folder, claimed by the main process for all; it holds the tokenizer from now on."""
    from kalmagrove.parallel import broadcast_object

    claimed: Path | ConfigError | None = None
    if groups.is_main:
        claimed = run_folder.choose(run)
        try:
            run_folder.claim(claimed, run)
            prepared.tokenizer.save(claimed / "tokenizer")
        except ConfigError as error:
            claimed = error
    folder = broadcast_object(claimed, groups.world)
    if isinstance(folder, ConfigError):
        raise folder
    assert folder is not None
    return folder


def _meters(run: Run, folder: Path, groups: "Groups", prepared: "Prepared") -> "Meters":
    from kalmagrove.config.counts import parameter_count
    from kalmagrove.track import build_meters, flops_per_token

    count = parameter_count(run.model)
    return build_meters(
        run,
        folder,
        groups,
        params_total=count.total,
        params_active=count.active,
        flops_per_token=flops_per_token(run.model, run.data.seq_len).training,
        val_bytes_per_token=prepared.val_bytes_per_token,
        baselines={
            "unigram_nats": prepared.unigram_nats,
            "bigram_nats": prepared.bigram_nats,
        },
    )


def _show_sample(run: Run, checkpoint: Path) -> None:
    """Write a few lines with the saved model, and keep them in the run's folder."""
    from kalmagrove.evaluate.generate import generate
    from kalmagrove.evaluate.load import load_trained

    if not run.sample.max_new_tokens:
        return
    model, tokenizer = load_trained(checkpoint)
    settings = run.sample.model_dump(exclude={"prompts"})
    texts = generate(model, tokenizer, run.sample.prompts, **settings)
    pairs = zip(run.sample.prompts, texts, strict=True)
    sample = f"\n{'-' * 40}\n".join(prompt + text for prompt, text in pairs)
    folder = checkpoint.parent.parent
    (folder / "samples" / f"{checkpoint.name}.txt").write_text(sample + "\n", encoding="utf-8")
    print(
        f"\nA sample, temperature {run.sample.temperature:g}:\n\n{sample}\n\n{folder}", flush=True
    )

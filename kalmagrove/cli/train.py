"""`kalmagrove train`: compose, validate, start the processes, and on each of them the main path.

`train_on_this_rank` is the whole program in one screen: builders, then `fit`.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.compose import hydra_app, read_yaml
from kalmagrove.config import ConfigError, DataError, KalmaGroveError, Run, load

if TYPE_CHECKING:  # torch is imported only once the configuration is known to work
    from kalmagrove.data import Prepared
    from kalmagrove.parallel import Groups
    from kalmagrove.track import Meters

T = TypeVar("T")
log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says (overrides, `--dry-run`, `--config FILE`); returns the exit code."""
    words = [word for word in argv if word != "--dry-run"]
    dry_run = len(words) < len(argv)
    if any(word.partition("=")[0] == "--config" for word in words):
        return _start(_checked(_saved(words)), dry_run, in_sweep=False)
    return hydra_app("train", words, _checked, lambda run, sweep: _start(run, dry_run, sweep))


def _saved(words: list[str]) -> dict[str, Any]:
    """The tree of a run's frozen `config.yaml`: `--config FILE` or `--config=FILE`."""
    flag, *rest = words[0].split("=", 1) + words[1:]
    if flag != "--config" or len(rest) != 1:
        raise ConfigError("--config", " ".join(words), "takes one file and no overrides with it")
    return read_yaml(rest[0])


def _checked(tree: dict[str, Any]) -> Run:
    run = load(tree)
    return run.check_world(launch.world_size(run))


def _start(run: Run, dry_run: bool, in_sweep: bool) -> int:
    world_size = launch.world_size(run)
    if dry_run:
        from kalmagrove.cli.dry_run import describe

        describe(run, world_size)
        return 0
    if launch.launched_world_size() is not None:
        if in_sweep:
            rule, remedy = "starts the processes of its runs itself", "leave out the launcher"
            raise ConfigError("argument", "-m", rule, remedy)
        return train_on_this_rank(run)
    folder = run_folder.choose(run)
    summary = run_folder.finished(folder, run)
    if summary is not None:
        return _already_finished(folder, summary)
    if world_size == 1 and not in_sweep:
        return train_on_this_rank(run)
    from kalmagrove.data import check_seq_len, prepare

    check_seq_len(prepare(run.data), run.data.seq_len)  # once, where it is seen and can be stopped
    code = launch.launch(run_folder.pinned(run, folder), world_size)
    if code == 0 and run_folder.done(folder, run) is None:
        raise KalmaGroveError(
            f"the processes ended without an error, but {folder}/summary.json does not say that "
            f"the {run.steps} steps are done; the same command continues"
        )
    return code


def _already_finished(folder: Path, summary: dict[str, Any]) -> int:
    from rich.console import Console

    from kalmagrove.track import results_table

    Console().print(results_table(summary))
    print(
        f"{folder} has already done its {summary['steps']} steps; train anew with "
        "checkpoint.resume=never, or change the configuration"
    )
    return 0


def train_on_this_rank(composed: Run) -> int:
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
    prepared = prepare(composed.data, progress=launch.launched_rank() == 0)
    run = composed.with_vocab(prepared.vocab_size)
    device = connect(run)
    groups = Groups.init(run.parallel, device, run.launch.timeout)
    _check_same_data(run, groups, prepared)
    folder, summary = _claim(composed, groups)
    if summary is not None:
        if groups.is_main:
            _already_finished(folder, summary)
        disconnect()
        return 0
    batches = build_batches(prepared, run, groups.dp.rank, groups.dp.size)
    held_out = val_batches(prepared, run, groups.dp.rank, groups.dp.size)
    torch.manual_seed(run.seed)
    model = build_model(run.model, groups)
    engine = build_engine(model, run, groups)
    meters = _meters(run, folder, groups, prepared)
    state = resume(engine, batches, meters, run, folder)
    _by_main(groups, lambda: run_folder.settle(folder, composed, prepared.tokenizer))
    outcome = fit(engine, batches, held_out, meters, state, run)
    if groups.is_main:
        del engine, model, meters, batches  # their memory may be needed
        _show_sample(run, outcome.checkpoint)
    disconnect()
    return 0


def _check_same_data(run: Run, groups: "Groups", prepared: "Prepared") -> None:
    """Two machines may have prepared different data."""
    from kalmagrove.parallel import any_rank, broadcast_object

    first = broadcast_object(prepared.fingerprint, groups.world)
    if any_rank(first != prepared.fingerprint, groups.world, groups.device):
        raise DataError(
            f"data.cache={run.data.cache} holds different tokens on different machines: "
            f"{prepared.path} is {prepared.fingerprint} on rank {groups.world.rank} and {first} on "
            "rank 0; use a data.cache that all of them share"
        )


def _claim(run: Run, groups: "Groups") -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, claimed by the main process for all; or the summary of a finished run.

    Raises:
        ConfigError: on all ranks; also if some do not see the folder.
    """
    from kalmagrove.parallel import any_rank

    def claim() -> tuple[Path, dict[str, Any] | None, str]:
        folder = run_folder.choose(run)
        summary = run_folder.finished(folder, run)
        return folder, summary, run_folder.claim(folder) if summary is None else ""

    folder, summary, token = _by_main(groups, claim)
    seen = summary is not None or run_folder.holds(folder, token)
    if any_rank(not seen, groups.world, groups.device):
        raise ConfigError(
            "dir",
            run.dir,
            "must be on a file system that all machines of the run share",
            f"some do not see {folder}",
        )
    return folder, summary


def _by_main(groups: "Groups", work: Callable[[], T]) -> T:
    """What `work` returns or raises (a ConfigError) on the main process, on all of them."""
    from kalmagrove.parallel import broadcast_object

    result: tuple[T | None, ConfigError | None] = (None, None)
    if groups.is_main:
        try:
            result = (work(), None)
        except ConfigError as error:
            result = (None, error)
    value, failure = broadcast_object(result, groups.world)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


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
        val_split_tokens=prepared.manifest.val.targets,
        baselines={
            "unigram_nats": prepared.unigram_nats,
            "bigram_nats": prepared.bigram_nats,
        },
    )


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
    except (RuntimeError, MemoryError) as error:  # a model that only fits on several devices
        log.warning("no sample is written: %s", error)
        return
    folder = checkpoint.parent.parent
    (folder / "samples" / f"{checkpoint.name}.txt").write_text(sample + "\n", encoding="utf-8")
    print(
        f"\nA sample, temperature {run.sample.temperature:g}:\n\n{sample}\n\n{folder}", flush=True
    )

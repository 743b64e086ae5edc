"""What the verbs that train have in common: saved configurations, folders, and one voice for all
ranks. Used by `train` and `retrofit`.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kalmagrove.cli import launch, run_folder
from kalmagrove.cli.compose import read_yaml
from kalmagrove.config import ConfigError, DataError, Training
from kalmagrove.config.attempts import Heartbeat, heartbeat_of_rank

if TYPE_CHECKING:
    from kalmagrove.data import Prepared
    from kalmagrove.parallel import Groups
    from kalmagrove.track.flops import Path as ComputePath

T = TypeVar("T")


def saved_tree(words: list[str]) -> dict[str, Any]:
    """The tree of a run's frozen `config.yaml`: `--config FILE` or `--config=FILE`."""
    flag, *rest = words[0].split("=", 1) + words[1:]
    if flag != "--config" or len(rest) != 1:
        raise ConfigError("--config", " ".join(words), "takes one file and no overrides with it")
    return read_yaml(rest[0])


def set_up_logging() -> None:
    """Notes of the first rank, warnings of all."""
    logging.basicConfig(format="kalmagrove: %(message)s")
    if launch.launched_rank() == 0:
        logging.getLogger("kalmagrove").setLevel(logging.INFO)
    # DeepSpeed calls collectives under names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def rank_heartbeat(run: Training, world_size: int) -> Heartbeat:
    """Of a process that a launcher started as one rank."""
    folder = run_folder.choose(run)
    finished = run.checkpoint.resume != "never" and run_folder.done(folder, run) is not None
    return heartbeat_of_rank(folder, launch.launched_rank(), world_size, finished=finished)


def already_finished(folder: Path, summary: dict[str, Any]) -> int:
    from rich.console import Console

    from kalmagrove.track import results_table

    Console().print(results_table(summary))
    print(
        f"{folder} has already done its {summary['steps']} steps; train anew with "
        "checkpoint.resume=never, or change the configuration"
    )
    return 0


def check_same_data(run: Training, groups: "Groups", prepared: "Prepared") -> None:
    """Two machines may have prepared different data."""
    from kalmagrove.parallel import any_rank, broadcast_object

    first = broadcast_object(prepared.fingerprint, groups.world)
    if any_rank(first != prepared.fingerprint, groups.world, groups.device):
        raise DataError(
            f"data.cache={run.data.cache} holds different tokens on different machines: "
            f"{prepared.path} is {prepared.fingerprint} on rank {groups.world.rank} and {first} on "
            "rank 0; use a data.cache that all of them share"
        )


def path_here(backend: str, gpu: bool) -> "ComputePath":
    """What a model with `model.backend` runs on this machine."""
    from kalmagrove.track.flops import path_of

    installed = importlib.util.find_spec("triton") is not None  # as `nn.backends` looks for it
    return path_of(backend if installed else "reference", gpu)


def claim(run: Training, groups: "Groups") -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, claimed by the main process for all; or the summary of a finished run.

    Raises:
        ConfigError: on all ranks; also if some do not see the folder.
    """
    from kalmagrove.parallel import any_rank

    def claim() -> tuple[Path, dict[str, Any] | None, str]:
        folder = run_folder.choose(run)
        summary = run_folder.finished(folder, run)
        return folder, summary, run_folder.claim(folder) if summary is None else ""

    folder, summary, token = by_main(groups, claim)
    seen = summary is not None or run_folder.holds(folder, token)
    if any_rank(not seen, groups.world, groups.device):
        raise ConfigError(
            "dir",
            run.dir,
            "must be on a file system that all machines of the run share",
            f"some do not see {folder}, or cannot write there",
        )
    return folder, summary


def by_main(groups: "Groups", work: Callable[[], T]) -> T:
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

"""What the Hydra launchers have in common: the runs of a sweep, and what came of them."""

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kalmagrove.cli.compose import to_tree
from kalmagrove.config import BudgetReached, ConfigError, Interrupted, Training
from kalmagrove.config.files import read_json

CODES = {"budget": BudgetReached.exit_code, "stopped": Interrupted.exit_code}  # by status


def parsed(verb: str, loader: Any, config: Any, points: Sequence[Sequence[str]]) -> list[Training]:
    """The validated runs of a sweep's points.

    Args:
        loader: Hydra's, which composed `config`.
        points: the overrides of each run.

    Raises:
        ConfigError: if two have the same folder.
    """
    checked = importlib.import_module(f"kalmagrove.cli.{verb}").checked
    trees = [to_tree(loader.load_sweep_config(config, list(point))) for point in points]
    runs = [checked({k: v for k, v in tree.items() if k != "hydra"}) for tree in trees]
    folders = Counter((run.dir, run.run_name) for run in runs)
    for (_, name), count in folders.items():
        if count > 1:
            rule = f"is the folder of {count} runs of the sweep"
            raise ConfigError("name", name, rule, "try name='run-${seed}', or leave it out")
    return runs


def tell(failed: Mapping[Path, str], ran: Sequence[Path], finished: Sequence[Path]) -> None:
    """Say what came of the runs.

    Raises:
        SystemExit: if one is not done: 1; 75 if all such were stopped, 76 if at their budget.
    """
    for folder in finished:
        print(f"{folder}: done before")
    for folder in ran:
        print(f"{folder}: {'FAILED: ' + failed[folder] if folder in failed else 'done'}")
    if failed:
        print(f"{len(failed)} of {len(ran) + len(finished)} runs failed", flush=True)
        codes = {CODES.get(str(summary_of(folder).get("status")), 1) for folder in failed}
        raise SystemExit(min(codes))


def summary_of(folder: Path) -> Mapping[str, Any]:
    """What the run's `summary.json` says; empty if there is none."""
    return read_json(folder / "summary.json") or {}

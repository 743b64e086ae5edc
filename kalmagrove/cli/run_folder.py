"""The run folder `runs/NAME`: who owns it, and what stands in it from the start."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from kalmagrove.cli.compose import to_yaml
from kalmagrove.config import ConfigError, Run


def choose(run: Run) -> Path:
    """The run's folder; with `checkpoint.resume=never` one that does not exist yet."""
    base = Path(run.dir).expanduser().resolve() / run.run_name
    if run.checkpoint.resume != "never":
        return base
    folder, number = base, 2
    while (folder / "ledger.jsonl").exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def claim(folder: Path, run: Run) -> int:
    """Make the folder, freeze the configuration in it and point `runs/latest` to it.

    Returns the open lock file; it is held until the process ends.

    Raises:
        ConfigError: if another process trains into the folder.
    """
    for part in ("checkpoints", "samples"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            "name", folder.name, "is being trained by another process", "give another name"
        ) from None
    freeze(folder, run)
    latest = folder.parent / "latest"
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, latest)
    return lock


def freeze(folder: Path, run: Run) -> Path:
    """Write `config.yaml`, which `kalmagrove train --config` reads back; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    tree: dict[str, Any] = run.model_dump(mode="json")
    tree["name"], tree["dir"] = folder.name, str(folder.parent)
    temporary = path.with_name(f".config.yaml.{os.getpid()}")
    temporary.write_text(to_yaml(tree))
    os.replace(temporary, path)
    return path


def finished(folder: Path, run: Run) -> dict[str, Any] | None:
    """The summary of a run that has already done all its steps; None if there is work to do."""
    if run.checkpoint.resume == "never":
        return None
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    done = summary.get("status") == "done" and summary.get("steps", 0) >= run.steps
    return summary if done else None

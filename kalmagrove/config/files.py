"""Files of a run's folder: those that are whole or not there, and the names of checkpoints."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a reader sees the one before or this one.

    Raises:
        OSError: it cannot be written; the one before is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; None: it is not there, half written, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def checkpoints_in(place: Path) -> list[Path]:
    """Folders of whole checkpoints, step-N, newest first."""
    found = [path for path in place.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))

"""The run folder `runs/NAME`: who owns it, and what stands in it from the start."""

import errno
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli.compose import read_yaml, to_yaml
from kalmagrove.config import ConfigError, Training
from kalmagrove.config.files import checkpoints_in, read_json, replace_text, step_of

if TYPE_CHECKING:
    from kalmagrove.data import Tokenizer

log = logging.getLogger(__name__)
CONFIG, LOCK, PLAN = "config.yaml", ".lock", "plan.json"
# Settings of how a result is computed, not of what it is
LAYOUT = ("parallel.", "zero.", "batch.micro", "engine.activation_checkpointing", "engine.compile")


def choose(run: Training) -> Path:
    """The run's folder; with `checkpoint.resume=never` one that does not exist yet."""
    base = Path(run.dir).expanduser().resolve() / run.run_name
    if run.checkpoint.resume != "never":
        return base
    folder, number = base, 2
    while (folder / "ledger.jsonl").exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def pinned(run: Training, folder: Path) -> Training:
    """This run with the folder that was chosen for it."""
    return run.model_copy(update={"name": folder.name, "dir": str(folder.parent)})


def claim(folder: Path) -> str:
    """Make the folder and lock it until the process ends; returns a token that it then holds.

    Nothing that a run left there is changed.

    Raises:
        ConfigError: if another process trains into the folder, or it cannot be written.
    """
    with _writing(folder):
        for part in ("checkpoints", "samples"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            _try_writing(folder / part)
        for file in ("ledger.jsonl", "console.log"):
            if (folder / file).exists():
                (folder / file).open("ab").close()
        lock = hold(folder / LOCK)
        if lock is None:
            raise ConfigError(
                "name", folder.name, "is being trained by another process", "give another name"
            )
        token = secrets.token_hex(8)
        os.ftruncate(lock, 0)
        os.write(lock, token.encode())
        os.fsync(lock)
    return token


def _try_writing(folder: Path) -> None:
    """Write a file, for a folder may be a disk of its own, mounted read-only or full. Rights do
    not tell: root has all of them.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"0")
    finally:
        probe.unlink(missing_ok=True)


def hold(path: Path) -> int | None:
    """Lock a file for as long as the descriptor is open, here or in a process that inherited it.

    Returns:
        The descriptor; None if another process has the lock.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError as error:
        log.warning(
            "%s: the file system has no locks (%s); see to it that no other process trains "
            "into this folder",
            path.parent,
            error.strerror,
        )
    return lock


def holds(folder: Path, token: str) -> bool:
    """Whether this process sees the folder that another one claimed, and can save there."""
    try:
        _try_writing(folder / "checkpoints")
        return (folder / LOCK).read_text() == token
    except OSError:
        return False


def settle(folder: Path, run: Training, tokenizer: "Tokenizer") -> None:
    """Write what describes a run that is known to go on, and point `runs/latest` to it.

    `config.yaml` continues the run, whatever `checkpoint.resume` began it with.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    checkpoint = run.checkpoint.model_copy(update={"resume": "auto"})
    with _writing(folder):
        write_config(
            folder / CONFIG, pinned(run, folder).model_copy(update={"checkpoint": checkpoint})
        )
        tokenizer.save(folder / "tokenizer")
        temporary = folder.parent / f".latest-{os.getpid()}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        os.replace(temporary, folder.parent / "latest")


def write_plan(folder: Path, plan: dict[str, Any] | None) -> None:
    """`plan.json`: what was predicted before the first step (`kalmagrove.plan.predict`), or null.

    A later session leaves it as it is.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    path = folder / PLAN
    with _writing(folder):
        if not path.exists():
            replace_text(path, json.dumps(plan, indent=1) + "\n")


def write_config(path: Path, run: Training) -> None:
    """Write what `kalmagrove train --config` reads back."""
    replace_text(path, to_yaml(run.model_dump(mode="json")))


def newest_step(folder: Path) -> int:
    """The step of the run's newest checkpoint; 0: there is none."""
    return next(map(step_of, checkpoints_in(folder / "checkpoints")), 0)


def done(folder: Path, run: Training) -> dict[str, Any] | None:
    """The summary of a run that has done all its steps; None if there is work to do."""
    summary = read_json(folder / "summary.json")
    if summary is None:
        return None
    reached = summary.get("status") == "done" and summary.get("steps", 0) >= run.steps
    return summary if reached else None


def finished(folder: Path, run: Training) -> dict[str, Any] | None:
    """The summary, if `run` was trained here already; None if there is work to do.

    How it was computed (`LAYOUT`) plays no part, as for checkpoints.

    Raises:
        ConfigError: if what was trained here is not `run`, naming the settings that differ, or if
            there is work to do and dollars are capped that nobody has counted so far.
    """
    summary = None if run.checkpoint.resume == "never" else done(folder, run)
    if summary is not None:
        same_settings(folder, run)
    elif run.budget.usd is not None:
        _dollars_are_known(folder, run)
    return summary


def _dollars_are_known(folder: Path, run: Training) -> None:
    """ConfigError if a session of the folder had no price: no cap on all of them can be kept."""
    from kalmagrove.track import read_history  # needs torch

    ledger = folder / "ledger.jsonl"
    if ledger.exists() and read_history(ledger).spent.usd is None:
        raise ConfigError(
            "budget.usd",
            run.budget.usd,
            f"cannot be kept: {folder.name} has trained without a price, so what all its sessions "
            "have cost is unknown",
            "use budget.hours, or give another name",
        )


def same_settings(folder: Path, run: Training) -> None:
    """ConfigError if the folder's `config.yaml` is of another run, naming what differs."""
    before = dict(flat(read_yaml(str(folder / CONFIG))))
    wrong = differences(before, dict(flat(run.result_settings)))
    if wrong:
        raise ConfigError(
            "name",
            folder.name,
            f"was trained with other settings ({'; '.join(wrong[:5])})",
            "give another name or checkpoint.resume=never",
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`KEY was X, is Y` for the settings of a result that are not the same; see `LAYOUT`."""
    return [
        f"{key} was {before[key]}, is {value}"
        for key, value in now.items()
        if key in before and before[key] != value and not key.startswith(LAYOUT)
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the system refuses becomes one line that names `dir`."""
    try:
        yield
    except OSError as error:
        at = f": {error.filename}" if error.filename else ""
        remedy = "free space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its rights"
        raise ConfigError(
            "dir",
            folder.parent,
            f"cannot hold the run {folder.name} ({error.strerror or error}{at})",
            f"{remedy} or give another dir",
        ) from None

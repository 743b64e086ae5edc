"""Whether the disk has room for checkpoints: looked at before the first step, and before each save.

Used by the verbs that train, and by `checkpoint`. A quota is not seen here: a write then fails.
"""

import logging
import math
import shutil
from pathlib import Path

from torch import nn

from kalmagrove.config import CheckpointError, ConfigError
from kalmagrove.engine.checkpoint_files import find_checkpoints
from kalmagrove.engine.engine import Engine
from kalmagrove.engine.fragments import bytes_to_save, persistent_buffers, whole_shape
from kalmagrove.engine.rank_state import rank_state
from kalmagrove.parallel import all_gather_object, broadcast_object

log = logging.getLogger(__name__)


def checkpoint_bytes(engine: Engine) -> int:
    """Of the next checkpoint, without headers and JSON, which are little. Collective."""
    own, metadata = rank_state(engine)
    alone = sum(stored.size for stored in own.values()) + sum(map(len, metadata.values()))
    parts = sum(all_gather_object(bytes_to_save(engine) + alone, engine.groups.world))
    weights = sum(_whole_bytes(p) for p in engine.module.parameters())
    weights += sum(b.numel() * b.element_size() for _, b in persistent_buffers(engine.module))
    return parts + weights


def _whole_bytes(parameter: nn.Parameter) -> int:
    return parameter.element_size() * math.prod(whole_shape(parameter))


def free_bytes(folder: Path) -> int | None:
    """What may still be written to the disk of an existing folder; None: it does not say."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def show_bytes(count: int) -> str:
    """
    >>> show_bytes(999), show_bytes(4_200_000), show_bytes(12_340_000_000)
    ('999 bytes', '4.2 MB', '12.3 GB')
    """
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def need_room(folder: Path, needed: int) -> None:
    """CheckpointError if the disk of `folder` does not hold `needed` bytes more."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise CheckpointError(f"it takes {show_bytes(needed)}, and {show_bytes(free)} are free")


def check_room(engine: Engine, checkpoints: Path, step: int) -> None:
    """Look before the first step whether the run's checkpoints will fit. Collective.

    A warning if the last of them will not: `checkpoint.keep` and one being written, less those that
    are there already.

    Args:
        checkpoints: their folder, which exists.
        step: finished ones.

    Raises:
        ConfigError: not even the first one will.
    """
    run, needed = engine.run, checkpoint_bytes(engine)
    free = free_bytes(checkpoints) if engine.groups.is_main else None
    free = broadcast_object(free, engine.groups.world)
    if free is None or step >= run.steps:
        return
    saves = -(-(run.steps - step) // run.checkpoint.every)
    if free < needed:
        raise ConfigError(
            "dir",
            run.dir,
            f"has no room for a checkpoint: one takes {show_bytes(needed)}, "
            f"{show_bytes(free)} are free",
            "free space or give another dir",
        )
    if not engine.groups.is_main:
        return
    more = min(saves, max(1, run.checkpoint.keep + 1 - len(find_checkpoints(checkpoints))))
    if free < more * needed:
        log.warning(
            "dir=%s: %s are free, but %d more checkpoints of %s will lie there at once; free space "
            "or lower checkpoint.keep=%d, else saves will fail",
            run.dir,
            show_bytes(free),
            more,
            show_bytes(needed),
            run.checkpoint.keep,
        )

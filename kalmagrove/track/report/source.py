"""What a report reads of a run: its folder, and the series in its ledger.

A live run may write while this reads: a torn last line is left out, a file that is half there is
as good as missing.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kalmagrove.config import DataError
from kalmagrove.config.attempts import FOLDER
from kalmagrove.config.files import read_json
from kalmagrove.track.ledger import FIRST, History, Line, read_history

POINTS = 2000  # of a line
FILES = (
    "ledger.jsonl", "config.yaml", "summary.json", "plan.json", "retrofit.json", "arm.json",
    "samples/*.txt", "evaluation/*/results.json", "checkpoints/step-*[0-9]", "model/config.json",
)  # fmt: skip
BEGUN = (FOLDER, "checkpoints", "slurm", "ledger.jsonl")  # what a run has before its first line


class NotBegun(DataError):
    """There is no line in the ledger yet."""


@dataclass(frozen=True)
class EdgeCurve:
    """One learned function; `initial` is what it began as, `span` the range of its basis."""

    title: str
    x: Sequence[float]
    y: Sequence[float]
    initial: Sequence[float] | None
    span: tuple[float, float]
    r2: float  # of the best straight line
    amplitude: float  # the largest |f|


@dataclass(frozen=True)
class EdgePanel:
    """Some of the functions of one layer or grove."""

    name: str
    edges: int
    r2: float  # of the best straight lines, over all of them
    curves: Sequence[EdgeCurve]


@dataclass(frozen=True)
class RunData:
    """One run. Files that are not there are None.

    edges: of its newest checkpoint; or why there are none.
    """

    name: str
    folder: Path
    history: History
    config: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None
    retrofit: Mapping[str, Any] | None = None
    arm: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    sample: tuple[str, str] | None = None  # file and text of the newest
    scores: Mapping[str, float] = field(default_factory=dict)  # by group of tasks
    edges: Sequence[EdgePanel] | str = "not asked for"

    @cached_property
    def steps(self) -> list[Line]:
        return self.history.series("step")

    @cached_property
    def evals(self) -> list[Line]:
        return self.history.series("eval")

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Wall time of every line, by its `id`: of all sessions one after another, lost work
        included, the pauses between them not.
        """
        found, wall, before, devices = {}, 0.0, 0.0, 1
        for line in self.history.lines:
            devices = line.get("devices", devices)
            wall += max(0.0, line["device_seconds"] - before) / devices
            before = line["device_seconds"]
            wall = line.get("wall_seconds", wall)  # older ledgers do not tell it
            found[id(line)] = wall
        return found

    @property
    def first(self) -> Line:
        """What the newest session says of the run."""
        return [line for line in self.history.lines if line["event"] in FIRST][-1]

    def told(self, key: str) -> Any:
        """What the newest session says of the model and its data; of older ledgers, the summary."""
        return self.first.get(key, (self.summary or {}).get(key))

    @property
    def last(self) -> Line:
        return self.history.lines[-1]

    @property
    def status(self) -> str:
        """Of its end, see `Meters.stop`; open: none is written, the run goes on or was killed."""
        return str(self.last.get("status")) if self.last["event"] == "stop" else "open"

    @property
    def planned_steps(self) -> int | None:
        return (self.config or {}).get("steps")


def read_run(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    edges: Sequence[EdgePanel] | str = "not asked for",
) -> RunData:
    """Read the folder of a run.

    Args:
        config: its `config.yaml`, read.

    Raises:
        NotBegun: there is no line in the ledger yet.
        DataError: it is no folder of a run.
        KalmaGroveError: the ledger was changed by other means.
    """
    folder = folder.expanduser().resolve()
    path = folder / "ledger.jsonl"
    if not path.is_file():
        raise _no_ledger(folder)
    history = read_history(path)
    if not history.lines:
        if b"\n" in path.read_bytes():
            raise DataError(f"{path} holds no line that can be read; see kalmagrove ledger verify")
        raise NotBegun(f"{path} is empty: the run has not begun; try again when it has")
    return RunData(
        name=folder.name,
        folder=folder,
        history=history,
        config=config,
        summary=read_json(folder / "summary.json"),
        retrofit=read_json(folder / "retrofit.json"),
        arm=read_json(folder / "arm.json"),
        plan=read_json(folder / "plan.json"),
        sample=_sample(folder / "samples"),
        scores=_scores(folder / "evaluation"),
        edges=edges,
    )


def _no_ledger(folder: Path) -> DataError:
    if _starting(folder):
        told = "the run has not begun; try again when it has, or wait with --serve"
        return NotBegun(f"{folder} has no ledger.jsonl yet: {told}")
    return DataError(f"{folder} has no ledger.jsonl; name the folder of a run (runs/NAME)")


def _starting(folder: Path) -> bool:
    return any((folder / name).exists() for name in BEGUN)


def version(folders: Sequence[Path]) -> str:
    """Another one whenever a file that a report reads has changed, come or gone."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for name in FILES for path in folder.glob(name)):
        with suppress(FileNotFoundError):
            stat = path.stat()
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def run_folders(places: Sequence[Path], *, starting: bool = False) -> list[Path]:
    """The folders of runs: `places`, or of one that holds none itself (a study) those in it.

    Args:
        starting: runs that are starting up, without a ledger, are among them.

    Raises:
        DataError: there is no ledger at a place nor in its folders.
    """
    found: list[Path] = []
    for place in places:
        inside = [place] if (place / "ledger.jsonl").is_file() else []
        if not inside and place.is_dir():
            inside = sorted(
                path.parent for path in place.glob("*/ledger.jsonl") if not path.parent.is_symlink()
            )
        if not inside and not (starting and _starting(place)):
            raise _no_ledger(place)
        inside = inside or [place]
        whole = [folder.expanduser().resolve() for folder in inside]
        found += [folder for folder in whole if folder not in found]
    return found


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = POINTS
) -> tuple[list[float], list[float | None]]:
    """At most `most` points and the gaps: of every stretch its lowest and highest point, and of
    all the first and the last.
    """
    if len(x) <= most:
        return list(x), list(y)
    kept = {0, len(x) - 1}
    stretches = max(1, (most - 2) // 3)
    for i in range(stretches):
        places = range(i * len(x) // stretches, (i + 1) * len(x) // stretches)
        known = [j for j in places if y[j] is not None and math.isfinite(y[j] or 0.0)]
        if known:
            kept.add(min(known, key=lambda j: y[j] or 0.0))
            kept.add(max(known, key=lambda j: y[j] or 0.0))
        if len(known) < len(places):
            kept.add(next(j for j in places if j not in known))
    order = sorted(kept)
    return [x[j] for j in order], [y[j] for j in order]


def values(lines: Sequence[Line], key: str | Callable[[Line], Any]) -> list[float | None]:
    """One number a line; None where it has none."""
    get = key if callable(key) else lambda line: line.get(key)
    return [float(v) if isinstance(v := get(line), int | float) else None for line in lines]


def layers_of(lines: Sequence[Line], name: str) -> list[str]:
    """The layers that tell of `name` (`3.load_max`), in order."""
    found = {
        prefix
        for line in lines
        for key in line.get("model", {})
        for prefix, dot, last in [key.rpartition(".")]
        if dot and last == name and prefix.isdigit()
    }
    return sorted(found, key=int)


def _sample(folder: Path) -> tuple[str, str] | None:
    """The newest sample."""
    found = sorted(folder.glob("*.txt"), key=lambda path: (path.stat().st_mtime, path.name))
    if not found:
        return None
    return found[-1].name, found[-1].read_text(encoding="utf-8", errors="replace")


def _scores(folder: Path) -> dict[str, float]:
    """Accuracies of the evaluated groups of tasks, by suite and group."""
    found = {}
    for path in sorted(folder.glob("*/results.json")):
        for name, group in ((read_json(path) or {}).get("groups") or {}).items():
            value = ((group.get("metrics") or {}).get("acc") or {}).get("value")
            if value is not None:
                found[name if name == path.parent.name else f"{path.parent.name}/{name}"] = value
    return found

"""Where ledger lines go beside the ledger: W&B, TensorBoard, trackio. None of them is the truth.

`Meters` opens them when a session begins and hands them every line. A sink shows a whole run at any
time: of a resumed run it is sent the lasting lines of the ledger first, in place of what it had.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from datetime import datetime
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

from kalmagrove.config import ConfigError, Track
from kalmagrove.track.charts import charted
from kalmagrove.track.redact import scrub, without_secrets
from kalmagrove.track.wandb_sink import WandbSink, run_id

log = logging.getLogger(__name__)


class Sink(Protocol):
    def log(self, line: Mapping[str, Any]) -> None:
        """Take one ledger line."""

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> str | None:
        """Finish with the run's final figures; returns a line for the user."""


def check_packages(track: Track) -> None:
    """ConfigError if a sink is asked for whose package is missing."""
    for name, asked in (("tensorboard", track.tensorboard), ("trackio", track.trackio)):
        if asked and find_spec(name) is None:
            rule, remedy = f"needs the package {name}", f'pip install "kalmagrove[{name}]"'
            raise ConfigError(f"track.{name}", True, rule, remedy)


def open_sinks(
    track: Track,
    run_dir: Path,
    run_name: str,
    config: Mapping[str, Any],
    history: Iterable[Mapping[str, Any]] = (),
) -> list[Sink]:
    """The sinks that `track` asks for, each with the `history` of lasting lines, among them that
    which begins the session.
    """
    lines = list(history)
    config = without_secrets(config)
    made: dict[str, Callable[[], Sink]] = {}
    if track.wandb != "disabled":
        name = run_id(lines, run_name, run_dir)
        made["W&B"] = lambda: WandbSink(track, run_dir, run_name, name, config=config)
    if track.tensorboard:
        made["TensorBoard"] = lambda: TensorboardSink(run_dir)
    if track.trackio:
        made["trackio"] = lambda: TrackioSink(track, run_name, config)
    return [Guarded(name, make, lines) for name, make in made.items()]


class Guarded:
    """A sink that never stops a training: its first failure is logged, and it falls silent."""

    def __init__(
        self, name: str, make: Callable[[], Sink], history: Iterable[Mapping[str, Any]]
    ) -> None:
        self._name = name
        self._sink: Sink | None = None
        try:
            self._sink = make()
        except Exception as error:  # of any kind: it is no part of the training
            self._fail(error)
        for line in history:
            self.log(line)

    def log(self, line: Mapping[str, Any]) -> None:
        if self._sink is None:
            return
        try:
            self._sink.log(line)
        except Exception as error:
            self._fail(error)

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> str | None:
        if self._sink is None:
            return None
        try:
            return self._sink.close(summary, exit_code)
        except Exception as error:
            self._fail(error)
        return None

    def _fail(self, error: Exception) -> None:
        self._sink = None
        remedy = (
            ". Use track.wandb=offline to record without a server" if self._name == "W&B" else ""
        )
        log.warning(
            "%s stopped recording (%s: %s); training goes on and the ledger holds everything%s",
            self._name,
            type(error).__name__,
            scrub(str(error).strip().split("\n")[0]),
            remedy,
        )


class TensorboardSink:
    """Event files in RUN/tensorboard; the horizontal axis is tokens."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = run_dir / "tensorboard"
        for old in self._folder.glob("events.out.tfevents.*"):  # the history is written anew
            old.unlink()
        self._writer = SummaryWriter(str(self._folder))

    def log(self, line: Mapping[str, Any]) -> None:
        values = charted(line)
        when = datetime.fromisoformat(line["time"]).timestamp() if values else None
        for name, value in values.items():
            if "/" in name:  # no axis
                self._writer.add_scalar(name, value, line["tokens"], walltime=when)

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> str | None:
        self._writer.close()
        return f"TensorBoard: tensorboard --logdir {self._folder}"


class TrackioSink:
    """A run in trackio's own local database. It has no way to replace one: of a resumed run's
    sessions, which all have its name, the newest is the whole run.
    """

    def __init__(self, track: Track, run_name: str, config: Mapping[str, Any]) -> None:
        import trackio

        self._project = track.project
        with redirect_stdout(StringIO()):  # it greets
            self._run = trackio.init(
                project=track.project,
                name=run_name,
                group=track.group,
                config=dict(config),
                embed=False,
            )

    def log(self, line: Mapping[str, Any]) -> None:
        if values := charted(line):
            self._run.log(values, step=line["tokens"])

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> str | None:
        with redirect_stdout(StringIO()):
            self._run.finish()
        return f"trackio: trackio show --project {self._project}"

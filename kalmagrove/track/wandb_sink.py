"""Weights & Biases, the only home of it (its dashboards are in `dashboards`).

`Meters` hands every ledger line here as well. A resumed run is sent again from the start, out of
the ledger and under the same id: offline runs cannot be continued, and syncing a second part would
replace the first. The last session's upload is therefore the whole run, without the lost work. The
id is in the first line of every session of the ledger, so that a folder may be moved.
"""

import hashlib
import logging
import netrc
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kalmagrove.config import KalmaGroveError, Track
from kalmagrove.track.charts import AXES, GROUPS, axis_of, charted
from kalmagrove.track.ledger import FIRST
from kalmagrove.track.redact import scrub

log = logging.getLogger(__name__)
RUNS = "runs"  # the folder of runs that says nothing about them
SUPERSEDED = "superseded"  # in RUN/wandb
# What W&B's client says if nothing answers
NO_ANSWER = re.compile(
    "timed out|did not respond|dial tcp|no such host|connection refused|max retries", re.IGNORECASE
)


def session_id(lines: Sequence[Mapping[str, Any]], run_name: str, run_dir: Path) -> str:
    """The run's id, for a session that begins after these lines of its ledger.

    A ledger that was copied into a folder of another name, and is continued there, becomes a run of
    its own.
    """
    begun = [line for line in lines if line["event"] in FIRST]
    if begun and begun[-1].get("folder", run_dir.name) == run_dir.name:
        return run_id(lines, run_name, run_dir)
    return secrets.token_hex(8)


def run_id(lines: Iterable[Mapping[str, Any]], run_name: str, run_dir: Path) -> str:
    """That of the ledger's last session; older ledgers have none: by name and folder."""
    told: list[str] = [line["run_id"] for line in lines if "run_id" in line]
    place = f"{run_dir.resolve()}:{run_name}"
    return told[-1] if told else hashlib.sha256(place.encode()).hexdigest()[:16]


def group_of(track: Track, run_dir: Path, config: Mapping[str, Any]) -> str | None:
    """`track.group`; else the name of the study's or sweep's folder that the run was trained in."""
    place = Path(config.get("dir", run_dir.parent)).expanduser().resolve().name
    return track.group or (place if place != RUNS else None)


class WandbSink:
    """A W&B run. Its methods raise whatever W&B raises; `sinks.Guarded` keeps that from a training.

    What it sends is the given configuration, charts, summary, the machine's load (W&B's system
    metrics), the installed packages and with `track.artifacts` checkpoints: no command line,
    environment or source.
    """

    def __init__(
        self,
        track: Track,
        run_dir: Path,
        run_name: str,
        run_id: str,
        *,
        config: Mapping[str, Any],
        timeout: float = 60,
    ) -> None:
        """Begin the run.

        Args:
            run_id: of W&B; whatever it has under this id is replaced.
            config: without secrets.
            timeout: seconds the server may take to answer.
        """
        import wandb

        assert track.wandb != "disabled", "then there is no sink"
        self._offline, self._artifacts = track.wandb == "offline", track.artifacts
        self._dir, self._id = run_dir, run_id
        self._newest: Path | None = None  # checkpoint
        self._before = sorted((run_dir / "wandb").glob(f"offline-run-*-{run_id}"))
        self._run: Any = wandb.init(
            project=track.project,
            entity=track.entity,
            name=run_name,
            id=run_id,
            group=group_of(track, run_dir, config),
            tags=track.tags,
            dir=run_dir,
            config=dict(config),
            mode=track.wandb,
            settings=wandb.Settings(
                init_timeout=timeout,
                login_timeout=timeout,
                console="off",  # the live panel owns the screen, console.log the text
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,  # the command line, user and host
            ),
        )
        for axis in AXES:
            self._run.define_metric(axis, hidden=True)
        for group in GROUPS:
            self._run.define_metric(f"{group}/*", step_metric=axis_of(group))

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one ledger line, as of its own time."""
        if values := charted(line):
            when = datetime.fromisoformat(line["time"]).timestamp()
            self._run.log({**values, "_timestamp": when})
        if line["event"] == "checkpoint" and (self._dir / line["path"]).is_dir():
            self._newest = self._dir / line["path"]
            if self._artifacts == "all":
                self._send(self._newest)

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> str | None:
        """Write the run's final figures and finish; returns how to upload an offline run.

        Offline folders that it supersedes go to RUN/wandb/superseded, where `wandb sync RUN/wandb`
        does not find them. Those of a run that goes on (status open) are left.
        """
        if self._artifacts == "last" and self._newest is not None:
            self._send(self._newest)
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)
        if summary.get("status") != "open":
            self._set_aside()
        folder = Path(self._run.dir).parent
        return f"W&B, offline: wandb sync {folder}" if self._offline else None

    def _set_aside(self) -> None:
        try:
            for folder in self._before:
                if folder.name == Path(self._run.dir).parent.name:  # begun within the same second
                    continue
                aside = folder.parent / SUPERSEDED
                aside.mkdir(exist_ok=True)
                folder.rename(aside / folder.name)
        except OSError as error:
            log.warning("%s is superseded, but cannot be moved (%s)", folder, error.strerror)

    def _send(self, checkpoint: Path) -> None:
        """A checkpoint as a version of the run's artifact."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._id}", type="checkpoint")
        artifact.add_dir(str(checkpoint))
        self._run.log_artifact(artifact, aliases=["latest", checkpoint.name])


def server() -> str:
    """Address of W&B's server, by its own settings (WANDB_BASE_URL, `wandb login --host`)."""
    import wandb

    return str(wandb.setup().settings.base_url)


def api_key_missing() -> bool:
    """Whether there is no key for it: of WANDB_API_KEY, or in the netrc file of `wandb login`."""
    import wandb

    if wandb.setup().settings.api_key:
        return False
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(file).authenticators(urlsplit(server()).hostname or "") is None
    except (OSError, netrc.NetrcParseError):
        return True


def send_run(
    track: Track,
    run_dir: Path,
    run_name: str,
    lines: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    timeout: float = 60,
) -> str | None:
    """A whole run as one W&B run; returns a line for the user.

    Args:
        summary: with the run's status; open: no end is written, which W&B is told as a failure.

    Raises:
        KalmaGroveError: naming what W&B answered, or that nothing answered.
    """
    failed = summary.get("status") in ("failed", "hung", "open")
    try:
        name = run_id(lines, run_name, run_dir)
        sink = WandbSink(track, run_dir, run_name, name, config=config, timeout=timeout)
        for line in lines:
            sink.log(line)
        return sink.close(summary, exit_code=int(failed))
    except Exception as error:  # wandb's, of many kinds
        raise KalmaGroveError(f"{run_dir}: {refusal(error)}") from None


def refusal(error: Exception, remedy: str = "") -> str:
    """An exception of wandb's in one sentence; with the remedy, if W&B has answered."""
    said = scrub(str(error).strip().split("\n")[0])
    if NO_ANSWER.search(said):
        return f"W&B could not be reached ({said})"
    return f"W&B refused it ({type(error).__name__}: {said})" + (f"; {remedy}" if remedy else "")

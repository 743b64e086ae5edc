"""Weights & Biases, the only home of it (its dashboards are in `dashboards`).

`Meters` hands every ledger line here as well. A resumed run is sent again from the start, out of
the ledger and under the same id: offline runs cannot be continued, and syncing a second part would
replace the first. The last session's upload is therefore the whole run, without the lost work.
"""

import hashlib
import netrc
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kalmagrove.config import KalmaGroveError, Track
from kalmagrove.track.charts import AXES, GROUPS, axis_of, charted
from kalmagrove.track.redact import scrub

RUNS = "runs"  # the folder of runs that says nothing about them


def run_id(run_name: str, run_dir: Path) -> str:
    """The same for every session of a run, and another for the same name in another folder."""
    return hashlib.sha256(f"{run_dir.resolve()}:{run_name}".encode()).hexdigest()[:16]


def group_of(track: Track, run_dir: Path) -> str | None:
    """`track.group`; else the name of the study's or sweep's folder that the run lies in."""
    place = run_dir.resolve().parent.name
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
        *,
        config: Mapping[str, Any],
        timeout: float = 60,
    ) -> None:
        """Begin the run.

        Args:
            config: without secrets.
            timeout: seconds the server may take to answer.
        """
        import wandb

        assert track.wandb != "disabled", "then there is no sink"
        self._offline, self._artifacts = track.wandb == "offline", track.artifacts
        self._dir, self._name = run_dir, run_id(run_name, run_dir)
        self._newest: Path | None = None  # checkpoint
        self._run: Any = wandb.init(
            project=track.project,
            entity=track.entity,
            name=run_name,
            id=self._name,
            group=group_of(track, run_dir),
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
        """Send one ledger line."""
        if values := charted(line):
            self._run.log(values)
        if line["event"] == "checkpoint" and (self._dir / line["path"]).is_dir():
            self._newest = self._dir / line["path"]
            if self._artifacts == "all":
                self._send(self._newest)

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> str | None:
        """Write the run's final figures and finish; returns how to upload an offline run."""
        if self._artifacts == "last" and self._newest is not None:
            self._send(self._newest)
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=exit_code)
        folder = Path(self._run.dir).parent
        return f"W&B, offline: wandb sync {folder}" if self._offline else None

    def _send(self, checkpoint: Path) -> None:
        """A checkpoint as a version of the run's artifact."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._name}", type="checkpoint")
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
    lines: Iterable[Mapping[str, Any]],
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    timeout: float = 60,
) -> str | None:
    """A whole run as one W&B run; returns a line for the user.

    Raises:
        KalmaGroveError: naming what W&B answered.
    """
    try:
        sink = WandbSink(track, run_dir, run_name, config=config, timeout=timeout)
        for line in lines:
            sink.log(line)
        return sink.close(summary, exit_code=int(summary.get("status") in ("failed", "hung")))
    except Exception as error:  # wandb's, of many kinds
        said = scrub(str(error).strip().split("\n")[0])
        raise KalmaGroveError(
            f"{run_dir}: W&B refused it ({type(error).__name__}: {said})"
        ) from None

"""Weights & Biases, the only home of it.

`Meters` hands every ledger line here as well. A resumed run is sent again from the start, out of
the ledger and under the same id: offline runs cannot be continued, and syncing a second part would
replace the first. The last session's upload is therefore the whole run, without the lost work.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

# The group of every ledger key that is charted; dictionaries of a line are groups of their own.
GROUPS = {
    "loss": "train", "lr": "train", "grad_norm": "train", "skipped": "train", "step": "train",
    "val_loss": "val", "val_bits_per_byte": "val",
    "usd": "cost", "usd_projected": "cost", "device_seconds": "cost", "joules": "cost",
    "tokens_per_s": "perf", "mfu": "perf", "peak_memory": "perf", "step_seconds": "perf",
    "seconds_left": "perf",
}  # fmt: skip
NESTED = {"model": "model", "comm": "comm", "seconds_split": "perf"}


def run_id(run_name: str, run_dir: Path) -> str:
    """The same for every session of a run, and another for the same name in another folder."""
    return hashlib.sha256(f"{run_dir.resolve()}:{run_name}".encode()).hexdigest()[:16]


def charted(line: Mapping[str, Any]) -> dict[str, float]:
    """What W&B draws of a ledger line, named by groups; empty for lines that are no measurement."""
    if line["event"] not in ("step", "eval"):
        return {}
    flat = {}
    for key, group in GROUPS.items():
        # A step line repeats the last val_loss for the reader; only the evaluation itself is drawn.
        if key in line and not (group == "val" and line["event"] == "step"):
            flat[f"{group}/{key}"] = line[key]
    for key, group in NESTED.items():
        flat.update({f"{group}/{name}": value for name, value in line.get(key, {}).items()})
    return {key: value for key, value in flat.items() if value is not None}


class WandbSink:
    """A W&B run that never stops training: its first failure is logged, and it falls silent."""

    def __init__(
        self,
        mode: Literal["offline", "online", "disabled"],
        run_dir: Path,
        run_name: str,
        *,
        project: str,
        entity: str | None,
        config: Mapping[str, Any],
        history: Iterable[Mapping[str, Any]] = (),
        timeout: float = 60,
    ) -> None:
        """Begin the run and send `history`, the ledger's lasting lines.

        Args:
            timeout: seconds the server may take to answer.
        """
        self._run: Any = None
        self._mode = mode
        if mode == "disabled":
            return
        try:
            self._run = self._init(mode, run_dir, run_name, project, entity, config, timeout)
            for group in ("train", "val", "cost", "perf", "model", "comm"):
                self._run.define_metric(f"{group}/*", step_metric="tokens")
        except Exception as error:  # a dashboard's failure, of any kind, must not end a training
            self._fail(error)
        for line in history:
            self.log(line)

    @staticmethod
    def _init(
        mode: str,
        run_dir: Path,
        run_name: str,
        project: str,
        entity: str | None,
        config: Mapping[str, Any],
        timeout: float,
    ) -> Any:
        import wandb

        return wandb.init(
            project=project,
            entity=entity,
            name=run_name,
            id=run_id(run_name, run_dir),
            dir=run_dir,
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(
                init_timeout=timeout,
                login_timeout=timeout,
                console="off",  # the live panel owns the screen, console.log the text
                silent=True,
                disable_git=True,
                disable_code=True,
            ),
        )

    @property
    def folder(self) -> Path | None:
        """Where an offline run lies, for `wandb sync`; None if there is none."""
        return Path(self._run.dir).parent if self._run and self._mode == "offline" else None

    def log(self, line: Mapping[str, Any]) -> None:
        """Send one ledger line."""
        values = charted(line)
        if self._run is None or not values:
            return
        try:
            self._run.log({"tokens": line["tokens"], **values})
        except Exception as error:
            self._fail(error)

    def close(self, summary: Mapping[str, Any], exit_code: int = 0) -> None:
        """Write the run's final figures and finish."""
        if self._run is None:
            return
        try:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._fail(error)
        self._run = None

    def _fail(self, error: Exception) -> None:
        self._run = None
        log.warning(
            "W&B stopped recording (%s: %s); training goes on and the ledger holds everything. "
            "Use track.wandb=offline to record without a server",
            type(error).__name__,
            str(error).strip().split("\n")[0],
        )

"""`kalmagrove track`: what W&B shows, made from run folders alone, and dashboards as code."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.compose import read_yaml
from kalmagrove.config import ConfigError, KalmaGroveError, Track, validate
from kalmagrove.config.errors import writing

if TYPE_CHECKING:
    from kalmagrove.track import History

USAGE = """kalmagrove track: send runs to Weights & Biases, make its dashboards

usage: kalmagrove track sync RUN [RUN ...] [--online] [--project P] [--entity E]
       kalmagrove track dashboards [--project P] [--entity E] [--out FILE] [--push]

  sync        one W&B run for each run folder, made anew from its ledger: all sessions together,
              without the work that was lost. It has the id of the runs that training recorded, and
              takes their place, also if the folder was moved since. A run without an end, which
              goes on or was killed, is sent up to its last line, as one that failed. Offline into
              RUN/wandb, unless --online
  dashboards  four workspaces (learning, cost, throughput, groves), checked without a network

--online      upload now; needs a key (`wandb login`, or the variable WANDB_API_KEY)
--project P   instead of the run's track.project; of dashboards: kalmagrove
--entity E    user or team; instead of the run's track.entity
--out FILE    write what the server would be sent, as JSON
--push        save the dashboards on the server
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = Parser("track", USAGE)
    sync, boards = parser.add_actions("sync", "dashboards")
    sync.add_argument("runs", nargs="+", type=Path)
    sync.add_argument("--online", action="store_true")
    boards.add_argument("--out", type=Path)
    boards.add_argument("--push", action="store_true")
    for action in (sync, boards):
        action.add_argument("--project")
        action.add_argument("--entity")
    chosen = parser.parse_args(argv)
    if chosen.action == "dashboards":
        return _dashboards(chosen.project or "kalmagrove", chosen.entity, chosen.out, chosen.push)
    return _sync(chosen.runs, chosen.online, chosen.project, chosen.entity)


def _sync(runs: list[Path], online: bool, project: str | None, entity: str | None) -> int:
    from kalmagrove.track import summary_of
    from kalmagrove.track.redact import without_secrets
    from kalmagrove.track.wandb_sink import send_run

    found = [_read(folder) for folder in runs]  # all of them before the first is sent
    if online:
        _require_key("track sync --online")
    given = {"wandb": "online" if online else "offline", "project": project, "entity": entity}
    for folder, config, history in found:
        track = validate(Track, config.get("track", {}))
        track = track.model_copy(update={key: value for key, value in given.items() if value})
        lines, summary = history.effective(), summary_of(folder, history)
        said = send_run(track, folder, summary["run"], lines, without_secrets(config), summary)
        open_ = " (no end: it goes on, or was killed)" if summary["status"] == "open" else ""
        where = said or f"W&B: sent to the project {track.project}"
        print(f"{folder}: {len(lines)} lines of the ledger{open_}. {where}")
    return 0


def _read(run: Path) -> "tuple[Path, dict[str, Any], History]":
    """Folder, configuration and ledger of a run."""
    from kalmagrove.track import read_history

    folder = run.expanduser().resolve()
    ledger = folder / "ledger.jsonl"
    if not ledger.is_file():
        raise ConfigError("RUN", run, "holds no ledger.jsonl", "give folders such as runs/NAME")
    history = read_history(ledger)
    if not history.sessions:
        raise ConfigError("RUN", run, "has not begun: its ledger is empty", "try again later")
    return folder, read_yaml(str(folder / "config.yaml")), history


def _dashboards(project: str, entity: str | None, out: Path | None, push: bool) -> int:
    from kalmagrove.track import dashboards

    if push:
        _require_key("track dashboards --push")
        if entity is None:
            raise ConfigError("--entity", None, "is required by --push", "give your user or team")
    pages = dashboards.build(project, entity or "")
    for page in pages:
        panels = sum(len(section.panels) for section in page.sections)
        print(f"{page.name}: {len(page.sections)} sections, {panels} panels")
    if out:
        with writing("--out", out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(dashboards.as_json(pages) + "\n")
        print(f"written to {out}")
    for address in dashboards.push(pages) if push else []:
        print(address)
    return 0


def _require_key(action: str) -> None:
    from kalmagrove.track.wandb_sink import api_key_missing

    if api_key_missing():
        raise KalmaGroveError(
            f"{action} needs an API key of W&B; run `wandb login`, or set WANDB_API_KEY"
        )

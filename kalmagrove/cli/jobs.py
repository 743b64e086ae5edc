"""`kalmagrove jobs`: the runs that were given to Slurm, whoever submitted them and whether or not
the shell that did is still there.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.multirun import summary_of
from kalmagrove.cli.slurm import Job, cancel, rank_logs, recorded, wait
from kalmagrove.config import ConfigError

USAGE = """kalmagrove jobs: runs that were given to Slurm

usage: kalmagrove jobs [list] [PATH ...]
       kalmagrove jobs follow PATH ... [--poll SECONDS]
       kalmagrove jobs cancel PATH ... [--now]

  list      job, state, tries and steps of each run
  follow    print what the batch script and rank 0 write, until all jobs have ended; exit code 1 if
            a run failed. Ctrl-C leaves the jobs as they are
  cancel    ask running jobs to save and end, and do not queue them again; --now: without saving

PATH is the folder of a run, or of runs; `runs` if none is given to list.
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    words = list(argv)
    action = words.pop(0) if words and words[0] in ("list", "follow", "cancel") else "list"
    parser = Parser("jobs", USAGE)
    parser.add_argument("paths", type=Path, nargs="*" if action == "list" else "+")
    if action == "follow":
        parser.add_argument("--poll", type=float, default=5.0)
    if action == "cancel":
        parser.add_argument("--now", action="store_true")
    chosen = parser.parse_args(words)
    jobs = _jobs(chosen.paths or [Path("runs")])
    if action == "follow":
        return _follow(jobs, chosen.poll)
    if action == "cancel":
        return _cancel(jobs, chosen.now)
    return _list(jobs)


def _jobs(paths: list[Path]) -> list[Job]:
    """Of the runs at, or right below, `paths`."""
    found: list[Job] = []
    for path in paths:
        folder = path.expanduser().resolve()
        here = recorded(folder)
        records = folder.glob("*/slurm/job.json")
        places = [p.parent.parent for p in records if not p.parent.parent.is_symlink()]
        below = [recorded(place) for place in sorted(places)]
        jobs = [job for job in [here, *below] if job is not None]
        if not jobs:
            raise ConfigError("jobs", path, "holds no run that was given to Slurm")
        found += jobs
    return found


def _list(jobs: list[Job]) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("run", "job", "Slurm", "tries", "steps", "status"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        summary = summary_of(job.folder)
        tries = len(list((job.folder / "slurm").glob(f"{job.job}.*/started")))
        steps = _steps(job.folder)
        state = job.state or "forgotten"
        status = "goes on" if job.goes_on else summary.get("status", "not begun")
        table.add_row(job.folder.name, job.job, state, str(tries), steps, status)
    Console().print(table)
    return 0


def _steps(folder: Path) -> str:
    from kalmagrove.track import read_history

    ledger = folder / "ledger.jsonl"
    return f"{read_history(ledger).reached[0]:,}" if ledger.is_file() else "-"


def _follow(jobs: list[Job], poll: float) -> int:
    """Print the logs as they grow. Files are read anew each time: a try begins new ones."""
    seen: dict[Path, int] = {}

    def news(_: str = "") -> None:
        for job in jobs:
            for log in [job.folder / "slurm" / "batch.log", *rank_logs(job.folder)[:1]]:
                if not log.is_file():
                    continue
                with log.open("rb") as file:
                    file.seek(seen.get(log, 0))
                    text = file.read()
                seen[log] = seen.get(log, 0) + len(text)
                for line in text.decode("utf-8", "replace").splitlines():
                    print(f"{job.folder.name} | {line}" if len(jobs) > 1 else line)
        sys.stdout.flush()

    while any(job.goes_on for job in jobs):
        news()
        time.sleep(poll)
    news()
    failed = wait(jobs, poll, say=lambda text: print(text, flush=True))
    for folder, text in failed.items():
        print(f"{folder}: {text}")
    return 1 if failed else 0


def _cancel(jobs: list[Job], now: bool) -> int:
    for job in jobs:
        if not job.goes_on:
            print(f"job {job.job} has ended already")
            continue
        print(cancel(job, now))
    return 0

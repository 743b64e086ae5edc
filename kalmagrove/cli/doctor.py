"""`kalmagrove doctor`: what is wrong with this machine, and between the ranks of a run."""

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kalmagrove.cli import launch
from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.compose import compose_tree
from kalmagrove.cli.session import set_up_logging
from kalmagrove.config import ConfigError, KalmaGroveError, Run, load

if TYPE_CHECKING:
    from kalmagrove.bench.doctor import Finding

USAGE = """kalmagrove doctor: look for what may go wrong, before it does

usage: kalmagrove doctor [--nproc N] [--json FILE] [key=value ...]

  --nproc N    start N processes as a training would, and measure what moves between them
  --json FILE  the findings as JSON

Overrides are those of `kalmagrove train`: the folders looked at are `dir` and `data.cache`.
Each line is ok, a warning or a problem; the exit code is 1 if there is a problem, else 0. Under
torchrun, deepspeed or srun every machine is looked at and all ranks are measured.

example: kalmagrove doctor --nproc 8 dir=/shared/runs data.cache=/scratch/tokens
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    parser = Parser("doctor", USAGE)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen, words = parser.parse_known_args(argv)
    if chosen.nproc < 1:
        raise ConfigError("--nproc", chosen.nproc, "must be at least 1")
    gpus = launch.visible_gpus()
    if gpus and chosen.nproc > len(gpus):
        rule = f"must be at most the {len(gpus)} visible GPUs"
        raise ConfigError("--nproc", chosen.nproc, rule, f"try {len(gpus)}")
    run = load(compose_tree("train", ["launch.timeout=120", *words]))
    if chosen.json and launch.launched_rank() == 0:
        _check_writable(chosen.json)
    launched = launch.launched_world_size()
    if launched is None and chosen.nproc > 1:
        command = [*launch.command(run, chosen.nproc), "kalmagrove", "doctor", *argv]
        return launch.exit_code(subprocess.run(command, env=launch.environment()).returncode)
    found = _examine(run) if launched is None else _examine_together(run)
    problems = sum(finding.level == "problem" for finding in found)
    if launch.launched_rank() == 0:
        _show(found)
        if chosen.json:
            _write(chosen.json, found)
    if launched is not None:
        from kalmagrove.engine import disconnect

        disconnect()
    return int(problems > 0)


def _examine(run: Run) -> list["Finding"]:
    from kalmagrove.bench.doctor import examine

    return examine(Path(run.dir), Path(run.data.cache).expanduser())


def _examine_together(run: Run) -> list["Finding"]:
    """Of every machine, by its first rank; then of all ranks. The same list on every rank."""
    import torch.distributed as dist

    from kalmagrove.bench.doctor_links import links
    from kalmagrove.engine import connect
    from kalmagrove.parallel import Group, all_gather_object

    set_up_logging()
    device = connect(run)
    assert dist.group.WORLD is not None
    group = Group.of(dist.group.WORLD)
    own = _examine(run) if os.environ["LOCAL_RANK"] == "0" else []
    told = [pair for pair in all_gather_object((socket.gethostname(), own), group) if pair[1]]
    found = [
        finding if len(told) == 1 else finding._replace(topic=f"{host} {finding.topic}")
        for host, findings in told
        for finding in findings
    ]
    return found + (links(group, device) if group.size > 1 else [])


def _show(found: list["Finding"]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "warning": "yellow", "problem": "red"}
    table = Table.grid(padding=(0, 2))
    for topic, level, text, advice in found:
        said = Text(text)
        if advice:
            said.append("; ").append(advice, "bold")
        table.add_row(Text(level, colors[level]), topic, said)
    console = Console()
    console.print(table)
    counts = {level: sum(one.level == level for one in found) for level in ("problem", "warning")}
    console.print(f"\n{counts['problem']} problems, {counts['warning']} warnings")


def _write(path: Path, found: list["Finding"]) -> None:
    from kalmagrove.bench.environment import environment

    findings = [finding._asdict() for finding in found]
    with _writing(path):
        path.write_text(json.dumps({"findings": findings, **environment()}, indent=1) + "\n")


def _check_writable(path: Path) -> None:
    """KalmaGroveError if the file cannot be written, before anything is measured."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        at = f": {error.filename}" if error.filename else ""
        raise KalmaGroveError(
            f"--json {path} cannot be written ({error.strerror}{at}); give another file"
        ) from None

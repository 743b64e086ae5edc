"""`kalmagrove ledger`: what a run did and cost, shown, verified, exported.

Works on the run's `ledger.jsonl` alone, of a run that still goes on too.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kalmagrove.cli.arguments import Parser
from kalmagrove.config import ConfigError
from kalmagrove.config.errors import writing

if TYPE_CHECKING:
    from kalmagrove.track import History, Spent
    from kalmagrove.track.accounts import Part

USAGE = """kalmagrove ledger: what a run did and cost

usage: kalmagrove ledger show RUN
       kalmagrove ledger verify RUN
       kalmagrove ledger export RUN --out FILE

  show      sessions, what the time went to, dollars, and how much of it lasted
  verify    whether all lines are whole, unchanged, there, and add up; exit code 1 and one line for
            each fault, if there are any; and what a kill took that the next start will book
  export    every line as a row of a table, FILE.csv or FILE.parquet

RUN is the folder of a run, or its ledger.jsonl.
"""


LOOK = "see kalmagrove ledger verify"


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = Parser("ledger", USAGE)
    show, verify, export = parser.add_actions("show", "verify", "export")
    for action in (show, verify, export):
        action.add_argument("run", type=Path)
    export.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(argv)
    path = chosen.run / "ledger.jsonl" if chosen.run.is_dir() else chosen.run
    if not path.is_file():
        raise ConfigError("ledger", chosen.run, "holds no ledger.jsonl", "name a run's folder")
    if chosen.action == "verify":
        return _verify(path)
    if chosen.action == "export" and chosen.out.suffix not in (".csv", ".parquet"):
        raise ConfigError("--out", chosen.out, "must end in .csv or .parquet")
    from kalmagrove.track import read_history

    history = read_history(path)
    if not history.sessions:
        if path.stat().st_size:
            raise ConfigError("ledger", path, "holds no line that can be read", LOOK)
        raise ConfigError("ledger", path, "is empty: the run has not begun")
    if chosen.action == "export":
        _export(history, chosen.out)
    else:
        _show(path, history)
    return 0


def _verify(path: Path) -> int:
    from kalmagrove.track.audit import faults, unfinished

    found, more = faults(path), unfinished(path)
    for fault in found:
        print(f"{path}: {fault}")
    if not found:
        print(f"{path} is whole and adds up")
    if more:
        print(more)
    return 1 if found else 0


def _export(history: "History", out: Path) -> None:
    from kalmagrove.track.accounts import rows

    table = rows(history)
    with writing("--out", out):
        if out.suffix == ".csv":
            with out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(table[0]))
                writer.writeheader()
                writer.writerows(table)
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(table), out)
    print(f"{out}: {len(table)} rows, {len(table[0])} columns")


def _show(path: Path, history: "History") -> None:
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    from kalmagrove.track.accounts import parts, sessions

    numbers = ("steps", "devices", "wall", "dev-hours", "dollars", "lost")
    began = Table(title=str(path), title_justify="left", box=box.SIMPLE, pad_edge=False)
    began.padding = (0, 1, 0, 0)
    for column in ("", "began", *numbers, "ended"):
        right: Literal["left", "right"] = "right" if column in numbers else "left"
        began.add_column(column, justify=right, no_wrap=True)
    for number, session in enumerate(sessions(history), start=1):
        first, last = session.first, session.last
        for other in session.before:
            starts = f"{other.starts} start{'s' * (other.starts > 1)}" if other.starts else ""
            steps = f"0 to {other.step:,}" if other.what == "inherited" else ""
            began.add_row("", starts, steps, "", *_spent(other.spent), "", other.what)
        began.add_row(
            str(number),
            first["time"][5:16].replace("T", " "),
            f"{first['step']:,} to {last['step']:,}",
            f"{session.devices} {first['unit']}{'s' * (session.devices > 1)}",
            *_spent(session.spent),
            f"{first['lost_steps']:,}",
            session.ended,
        )
    found = parts(history)
    tables = [began, *([_phases(found)] if found else []), _totals(history)]
    console = Console()
    wide = console.options.update(max_width=1000)
    widest = max(Measurement.get(console, wide, table).maximum for table in tables)
    console.width = max(console.width, widest)  # better wrapped by a terminal than cut off here
    for table in tables:
        console.print(table)


def _spent(spent: "Spent") -> tuple[str, str, str]:
    from kalmagrove.track.console import show_seconds
    from kalmagrove.track.cost import show_usd

    hours = f"{spent.device_seconds / 3600:,.4f}"
    return show_seconds(spent.wall_seconds), hours, show_usd(spent.usd)


def _phases(found: "Mapping[str, Part]") -> Any:
    """A row for every phase; those within training are indented, and share its joules."""
    from rich import box
    from rich.table import Table

    from kalmagrove.track.accounts import WITHIN
    from kalmagrove.track.cost import show_usd
    from kalmagrove.track.phases import label

    spread = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("phase", "seconds", "share", "dev-seconds", "dollars", "joules", "tokens", "FLOPs")
    for column in columns:
        justify: Literal["left", "right"] = "left" if column == "phase" else "right"
        spread.add_column(column, justify=justify, no_wrap=True)
    whole = sum(part.seconds for name, part in found.items() if name not in WITHIN)
    for name, part in found.items():
        inside = name in WITHIN
        spread.add_row(
            f"  {label(name)}" if inside else name,
            _seconds(part.seconds),
            f"{part.seconds / whole:.1%}" if whole else "-",
            _seconds(part.device_seconds),
            show_usd(part.usd),
            "" if inside else _short(part.joules),
            _short(part.tokens) if name in ("training", "evaluation") else "",
            "" if part.flops is None else f"{part.flops:.3g}",
        )
    return spread


def _seconds(value: float) -> str:
    return f"{value:,.2f}" if value < 10_000 else f"{value:,.0f}"


def _short(value: float | None) -> str:
    from kalmagrove.track.report.markup import number

    return "-" if value is None else number(value)


def _totals(history: "History") -> Any:
    from rich import box
    from rich.table import Table

    from kalmagrove.track.accounts import sessions
    from kalmagrove.track.console import show_seconds
    from kalmagrove.track.cost import show_usd

    steps, tokens = history.reached
    spent, lost, goodput = history.spent, history.lost, history.goodput
    per_token = sessions(history)[-1].first["flops_per_token"]
    facts = Table(box=box.SIMPLE, show_header=False)
    facts.add_row("steps, tokens", f"{steps:,}, {tokens:,}")
    facts.add_row("model FLOPs", "-" if per_token is None else f"{tokens * per_token:.4g}")
    facts.add_row("wall clock", show_seconds(spent.wall_seconds))
    facts.add_row("device-hours", f"{spent.device_seconds / 3600:,.4f}")
    facts.add_row("energy", "-" if history.joules is None else f"{history.joules / 3.6e6:.4f} kWh")
    facts.add_row("dollars", show_usd(spent.usd))
    facts.add_row("lost", f"{lost.steps:,} steps, {lost.device_seconds / 3600:,.4f} device-hours")
    facts.add_row("goodput", "-" if goodput is None else f"{goodput:.1%}")
    return facts

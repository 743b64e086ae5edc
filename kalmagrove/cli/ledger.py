"""`kalmagrove ledger`: what a run did and cost, shown, verified, exported.

Works on the run's `ledger.jsonl` alone, of a run that still goes on too.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kalmagrove.config import ConfigError

if TYPE_CHECKING:
    from kalmagrove.track import History

USAGE = """kalmagrove ledger: what a run did and cost

usage: kalmagrove ledger show RUN
       kalmagrove ledger verify RUN
       kalmagrove ledger export RUN --out FILE

  show      sessions, what the time went to, dollars, and how much of it lasted
  verify    whether all lines are whole, unchanged, and add up; exit code 1 and one line for each
            fault, if there are any
  export    every line as a row of a table, FILE.csv or FILE.parquet

RUN is the folder of a run, or its ledger.jsonl.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("ledger", message, "is not understood", "see kalmagrove ledger --help")


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = _Parser(prog="kalmagrove ledger", usage=USAGE, add_help=False)
    actions = parser.add_subparsers(dest="action", required=True, parser_class=_Parser)
    for name in ("show", "verify", "export"):
        action = actions.add_parser(name, add_help=False)
        action.add_argument("run", type=Path)
        if name == "export":
            action.add_argument("--out", type=Path, required=True)
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
        raise ConfigError("ledger", path, "holds no line yet that begins a session")
    if chosen.action == "export":
        _export(history, chosen.out)
    else:
        _show(path, history)
    return 0


def _verify(path: Path) -> int:
    from kalmagrove.track.audit import faults

    found = faults(path)
    for fault in found:
        print(f"{path}: {fault}")
    if not found:
        print(f"{path} is whole and adds up")
    return 1 if found else 0


def _export(history: "History", out: Path) -> None:
    from kalmagrove.track.accounts import rows

    table = rows(history)
    try:
        if out.suffix == ".csv":
            with out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(table[0]))
                writer.writeheader()
                writer.writerows(table)
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(table), out)
    except OSError as error:
        raise ConfigError("--out", out, f"cannot be written ({error.strerror})") from None
    print(f"{out}: {len(table)} rows, {len(table[0])} columns")


def _show(path: Path, history: "History") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kalmagrove.track.accounts import parts, sessions
    from kalmagrove.track.console import show_seconds
    from kalmagrove.track.cost import show_usd

    console = Console()
    began = Table(title=str(path), title_justify="left", box=box.SIMPLE, pad_edge=False)
    numbers = ("steps", "devices", "wall", "dev-hours", "dollars", "lost")
    for column in ("", "began", *numbers, "ended"):
        began.add_column(column, justify="right" if column in numbers else "left")
    for number, session in enumerate(sessions(history), start=1):
        first, last = session.first, session.last
        began.add_row(
            str(number),
            first["time"][5:16].replace("T", " "),
            f"{first['step']:,} to {last['step']:,}",
            f"{session.devices} {first['unit']}s",
            show_seconds(session.wall_seconds),
            f"{session.device_seconds / 3600:,.4f}",
            show_usd(session.usd),
            f"{first['lost_steps']:,}",
            session.ended,
        )
    console.print(began)
    spread = Table(box=box.SIMPLE)
    for column in ("phase", "seconds", "share", "device-hours", "dollars"):
        spread.add_column(column, justify="left" if column == "phase" else "right")
    found = parts(history)
    whole = sum(part.seconds for part in found)
    for part in found if whole else ():
        share, hours = f"{part.seconds / whole:.1%}", f"{part.device_seconds / 3600:,.4f}"
        spread.add_row(part.phase, f"{part.seconds:,.2f}", share, hours, show_usd(part.usd))
    if whole:
        console.print(spread)
    console.print(_totals(history))


def _totals(history: "History") -> Any:
    from rich import box
    from rich.table import Table

    from kalmagrove.track.accounts import sessions
    from kalmagrove.track.console import show_seconds
    from kalmagrove.track.cost import show_usd

    steps, tokens = history.reached
    spent, lost, goodput = history.spent, history.lost, history.goodput
    flops = tokens * sessions(history)[-1].first["flops_per_token"]
    facts = Table(box=box.SIMPLE, show_header=False)
    facts.add_row("steps, tokens", f"{steps:,}, {tokens:,}")
    facts.add_row("model FLOPs", f"{flops:.4g}")
    facts.add_row("wall clock", show_seconds(spent.wall_seconds))
    facts.add_row("device-hours", f"{spent.device_seconds / 3600:,.4f}")
    facts.add_row("energy", "-" if history.joules is None else f"{history.joules / 3.6e6:.4f} kWh")
    facts.add_row("dollars", show_usd(spent.usd))
    facts.add_row("lost", f"{lost.steps:,} steps, {lost.device_seconds / 3600:,.4f} device-hours")
    facts.add_row("goodput", "-" if goodput is None else f"{goodput:.1%}")
    return facts

"""`kalmagrove checkpoint`: look into a checkpoint, verify it, merge its parts into whole tensors.

Works on files alone: any machine with enough memory for one tensor will do.
"""

from collections.abc import Sequence
from pathlib import Path

from kalmagrove.cli.arguments import Parser

USAGE = """kalmagrove checkpoint: look after checkpoints

usage: kalmagrove checkpoint inspect PATH
       kalmagrove checkpoint verify PATH
       kalmagrove checkpoint convert SRC DST [--weights-only]

  inspect   step, model, layout, tensors and files
  verify    read all of it; exit code 1 and one line for each fault, if there are any
  convert   write it anew as one file of whole tensors, that of one process; any number of
            processes in any layout continues from either

PATH and SRC are the folder of a checkpoint, or of a run: then its newest checkpoint.
--weights-only leaves out the optimizer's states, which then begin anew.
"""


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = Parser("checkpoint", USAGE)
    inspect, verify, convert = parser.add_actions("inspect", "verify", "convert")
    for action in (inspect, verify, convert):
        action.add_argument("path", type=Path)
    convert.add_argument("target", type=Path)
    convert.add_argument("--weights-only", action="store_true")
    chosen = parser.parse_args(argv)
    if chosen.action == "convert":
        return _convert(chosen.path, chosen.target, chosen.weights_only)
    return _inspect(chosen.path) if chosen.action == "inspect" else _verify(chosen.path)


def _verify(path: Path) -> int:
    from kalmagrove.engine.checkpoint_tools import newest, verify

    folder = newest(path)
    found = verify(folder)
    for fault in found:
        print(f"{folder}: {fault}")
    if not found:
        print(f"{folder} is whole")
    return 1 if found else 0


def _convert(path: Path, target: Path, weights_only: bool) -> int:
    from kalmagrove.engine.checkpoint_tools import convert, newest

    folder = newest(path)
    convert(folder, target, weights_only=weights_only)
    print(f"{folder} is written to {target}")
    return 0


def _inspect(path: Path) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kalmagrove.engine.checkpoint_files import read_index, read_state
    from kalmagrove.engine.checkpoint_tools import newest, sizes

    folder = newest(path)
    state, index = read_state(folder), read_index(folder)
    run = state["run"]
    facts = Table(title=str(folder), title_justify="left", box=box.SIMPLE, show_header=False)
    facts.add_row("step", f"{state['step']:,} of {run['steps']:,}")
    facts.add_row("tokens", f"{state['tokens']:,}")
    facts.add_row("model", f"{run['model']['name']}, {run['optim']['kind']}")
    facts.add_row("layout", ", ".join(f"{k}={v}" for k, v in state["layout"].items()))

    tensors = Table("kind", box=box.SIMPLE)
    files = Table("file", box=box.SIMPLE)
    for table, columns in ((tensors, ("tensors", "elements")), (files, ("bytes",))):
        for column in columns:
            table.add_column(column, justify="right")
    for kind, (count, elements) in sizes(index).items():
        tensors.add_row(kind, f"{count:,}", f"{elements:,}")
    for name, (size, _) in sorted(state["files"].items()):
        files.add_row(name, f"{size:,}")
    files.add_section()
    files.add_row("total", f"{sum(size for size, _ in state['files'].values()):,}")
    console = Console()
    for table in (facts, tensors, files):
        console.print(table)
    return 0

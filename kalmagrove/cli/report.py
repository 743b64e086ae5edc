"""`kalmagrove report`: one HTML page about a run, or about several side by side."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli.arguments import Parser
from kalmagrove.cli.compose import read_yaml
from kalmagrove.config import ConfigError, KalmaGroveError
from kalmagrove.config.files import checkpoints_in

if TYPE_CHECKING:
    from kalmagrove.track.report import EdgePanel, RunData

USAGE = """kalmagrove report: one HTML page about a run, or about several side by side

usage: kalmagrove report RUN [RUN ...] [--out FILE] [--edges | --no-edges]
       kalmagrove report RUN [RUN ...] --serve [PORT] [--host HOST] [--edges | --no-edges]

  RUN            folder of a run (runs/NAME), or one that holds several (a study)
  --out FILE     where the page goes (RUN/report.html; of several ./report.html)
  --serve [PORT] show it at http://127.0.0.1:PORT/ (8017) and follow the runs until Ctrl-C;
                 a run that is still starting up is waited for
  --host HOST    let other machines read it too: 0.0.0.0; anyone who reaches the port can
  --edges        draw learned edge functions, however large the checkpoint
  --no-edges     open no checkpoint

The page needs no network. Edge functions are of the newest checkpoint; one of more than 8 GB is
opened with --edges only.
"""
PORT = 8017
EVERY = 5.0  # seconds between a served page's questions
CURVES = 6  # functions of a layer
LARGE = 8e9  # bytes of a checkpoint that is not opened unasked


def main(argv: Sequence[str]) -> int:
    """Do what `argv` says; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0 if argv else 2
    parser = Parser("report", USAGE, "see --help")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", nargs="?", type=int, const=PORT)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--edges", action=argparse.BooleanOptionalAction)
    chosen = parser.parse_args(argv)
    from kalmagrove.track.report import render, run_folders, write

    folders = run_folders(chosen.runs, starting=chosen.serve is not None)
    for arm in sorted(path.parent for place in chosen.runs for path in place.glob("*/arm.json")):
        if arm.resolve() not in folders and not arm.is_symlink():
            print(f"{arm.name} has no ledger (it trained nothing) and is left out")
    reader = Reader(folders, chosen.edges)
    if chosen.serve is not None:
        if chosen.out is not None:
            raise ConfigError("--out", chosen.out, "does not go with --serve", "leave one out")
        return serve(reader, chosen.host, chosen.serve)
    out = chosen.out or (chosen.runs[0] if len(chosen.runs) == 1 else Path()) / "report.html"
    write(out, render(reader.read()))
    print(f"written to {out}")
    return 0


def serve(reader: "Reader", host: str, port: int) -> int:
    """Show the report until Ctrl-C."""
    from kalmagrove.track.report import Live, Server, render

    def make(version: str) -> str:
        runs, starting = reader.begun()
        return render(runs, Live(EVERY, version, starting))

    _, starting = reader.begun()  # mistakes are told before anything is served
    count = len(reader.folders)
    with Server(host, port, reader.folders, make) as server:
        told = f"{server.url} follows {count} run{'s' * (count != 1)}; Ctrl-C ends it"
        waits = [f"{name} is starting up: the page waits for its ledger" for name in starting]
        print("\n".join([told, *waits]), flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class Reader:
    """Reads the runs, as often as asked; edges only where there is a newer checkpoint."""

    def __init__(self, folders: Sequence[Path], edges: bool | None) -> None:
        """edges: None: of checkpoints that are not large."""
        self.folders, self._wanted = list(folders), edges
        self._drawn: dict[Path, tuple[Path, Sequence[EdgePanel] | str]] = {}

    def read(self) -> "list[RunData]":
        return [self._read(folder) for folder in self.folders]

    def begun(self) -> "tuple[list[RunData], list[str]]":
        """The runs that have begun, and the names of those that have not."""
        from kalmagrove.track.report import NotBegun

        runs, starting = [], []
        for folder in self.folders:
            try:
                runs.append(self._read(folder))
            except NotBegun:
                starting.append(self._name(folder))
        return runs, starting

    def _read(self, folder: Path) -> "RunData":
        from kalmagrove.track.report import read_run

        run = read_run(folder, config=_config(folder), edges=self._edges(folder))
        return replace(run, name=self._name(folder))

    def _name(self, folder: Path) -> str:
        """With that of the folder above where there are two of the same."""
        same = [each for each in self.folders if each.name == folder.name]
        return folder.name if len(same) == 1 else f"{folder.parent.name}/{folder.name}"

    def _edges(self, folder: Path) -> "Sequence[EdgePanel] | str":
        """Of the newest checkpoint; or why there are none."""
        if self._wanted is False:
            return "--no-edges"
        newest = _newest(folder)
        if newest is None:
            return "there is no checkpoint yet"
        if folder not in self._drawn or self._drawn[folder][0] != newest:
            self._drawn[folder] = newest, self._draw(newest)
        return self._drawn[folder][1]

    def _draw(self, place: Path) -> "Sequence[EdgePanel] | str":
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        if size > LARGE and not self._wanted:
            return f"the checkpoint has {size / 1e9:.0f} GB; --edges opens it all the same"
        try:
            return draw_edges(place) or "the model has no edge functions"
        except (KalmaGroveError, OSError, RuntimeError, MemoryError) as error:
            return f"the checkpoint cannot be opened ({str(error).splitlines()[0]})"


def draw_edges(place: Path) -> "list[EdgePanel]":
    """Learned functions of the model at `place`; none of a model without any.

    Raises:
        KalmaGroveError: it cannot be opened.
    """
    from kalmagrove.evaluate.edge_maps import edges_of
    from kalmagrove.evaluate.edges import Function, inspect_edges
    from kalmagrove.evaluate.subject import open_model
    from kalmagrove.track.report import EdgeCurve, EdgePanel

    def curve(function: Function) -> EdgeCurve:
        place = f"edge {function.input}"
        if function.output is not None:
            place = f"{function.input} → {function.output}"
        return EdgeCurve(
            title=place,
            x=function.x,
            y=function.y,
            initial=function.initial,
            span=function.span,
            r2=function.r2,
            amplitude=function.amplitude,
        )

    model = open_model(place, "cpu", "fp32").model
    try:
        maps = edges_of(model)
    except ConfigError:  # it has none
        return []
    return [
        EdgePanel(layer.name, layer.edges, layer.r2, [curve(each) for each in layer.functions])
        for layer in inspect_edges(maps, count=CURVES)
    ]


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or the model that a retrofit saved."""
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    return next(iter(checkpoints_in(folder / "checkpoints")), None)


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.yaml"
    return read_yaml(str(path)) if path.is_file() else None

"""`kalmagrove inspect`: a model's learned edge functions, as a table, JSON and figures."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.cli.compose import hydra_app
from kalmagrove.config import ConfigError, Inspect, validate

if TYPE_CHECKING:
    from kalmagrove.evaluate.edges import EdgeLayer

VERSION = 1  # of edges.json
LENGTH = 512  # tokens of the text in a row


def main(argv: Sequence[str]) -> int:
    """Inspect as `argv` says; returns the exit code."""

    def parse(tree: dict[str, Any]) -> Inspect:
        return validate(Inspect, tree)

    return hydra_app("inspect", argv, parse, lambda wanted, _: _inspect(wanted))


def _inspect(wanted: Inspect) -> int:
    from kalmagrove.evaluate.edge_maps import edges_of
    from kalmagrove.evaluate.edges import inspect_edges, observe, token_rows
    from kalmagrove.evaluate.figures import draw, require_matplotlib
    from kalmagrove.evaluate.subject import open_model

    if wanted.figures:
        require_matplotlib()
    text = None if wanted.text is None else _read(Path(wanted.text))
    subject = open_model(wanted.run, wanted.device, "fp32")
    maps = edges_of(subject.model, wanted.layers)
    seen = None
    if text is not None:
        tokens = subject.codec.encode([text[: 32 * wanted.tokens]])[0][: wanted.tokens]
        rows = token_rows(tokens, min(LENGTH, subject.length or LENGTH))
        seen = observe(subject.model, maps, rows, subject.device)
    layers = inspect_edges(
        maps, seen=seen, count=wanted.edges, select=wanted.select, seed=wanted.seed
    )
    folder = Path(wanted.out or f"edges/{subject.name}")
    folder.mkdir(parents=True, exist_ok=True)
    settings = wanted.model_dump(exclude={"out", "figures", "device"})
    held = {"version": VERSION, **settings, "layers": [asdict(layer) for layer in layers]}
    (folder / "edges.json").write_text(json.dumps(held, allow_nan=False) + "\n")
    if wanted.figures:
        draw(folder, layers, subject.name)
    _print(layers)
    print(f"written to {folder}")
    return 0


def _read(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", path, f"cannot be read ({error})", "name a text file") from None
    if not text:
        raise ConfigError("text", path, "is empty", "name a file with text")
    return text


def _print(layers: "Sequence[EdgeLayer]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", title="Edge functions", title_justify="left", box=box.SIMPLE)
    columns = ("edges", "tokens", "R² of lines", "mean", "lowest")
    for column in (*columns, "mean |f|", "largest |f|", "out of range"):
        table.add_column(column, justify="right")
    for layer in layers:
        out = "-" if layer.out_of_range is None else f"{100 * layer.out_of_range:.2f}%"
        table.add_row(
            layer.name,
            f"{layer.edges:,}",
            f"{layer.tokens:,}" if layer.tokens else "-",
            *(f"{value:.3f}" for value in (layer.r2, layer.r2_mean, layer.r2_min)),
            *(f"{value:.3g}" for value in (layer.amplitude_mean, layer.amplitude_max)),
            out,
        )
    console = Console()
    Console(width=max(console.width, 110)).print(table)

"""Draws edge functions, one figure a layer, PNG and SVG. The only use of matplotlib here.

Colours are of Okabe and Ito's palette and no line is told by its colour alone.
"""

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalmagrove.config import ConfigError
from kalmagrove.evaluate.edges import EdgeLayer, Function

LEARNED, INITIAL, SEEN = "#0072B2", "#D55E00", "#BBBBBB"
COLUMNS = 4


def require_matplotlib() -> Any:
    """`matplotlib.figure`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        rule = "needs matplotlib, which is not installed"
        remedy = "pip install 'kalmagrove[bench]', or set figures=false"
        raise ConfigError("figures", "true", rule, remedy) from None


def draw(folder: Path, layers: Sequence[EdgeLayer], title: str) -> list[Path]:
    """`edges-<layer>.png` and `.svg` in `folder` for each layer; returns their paths."""
    figures = require_matplotlib()
    written = []
    for layer in layers:
        columns = min(COLUMNS, len(layer.functions))
        rows = math.ceil(len(layer.functions) / columns)
        size = 1.5 + 2.4 * columns, 1.4 + 1.9 * rows
        figure = figures.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, function in zip(axes, layer.functions, strict=False):
            _draw_one(axis, function)
        for place, axis in enumerate(axes):
            if place >= len(layer.functions):
                axis.axis("off")
            elif place + columns >= len(layer.functions):
                axis.set_xlabel("input", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel("function", fontsize=8)
        _label(figure, layer, title)
        for ending in ("png", "svg"):
            path = folder / f"edges-{layer.name}.{ending}"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def _draw_one(axis: Any, function: Function) -> None:
    if function.density is not None:
        behind = axis.twinx()
        behind.stairs(function.density.counts, function.density.bounds, fill=True, color=SEEN)
        behind.set_ylim(0, 3 * max(1, *function.density.counts))  # the lower third
        behind.set_yticks([])
        behind.spines[["top", "right"]].set_visible(False)
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)
    if function.initial is not None:
        axis.plot(function.x, function.initial, color=INITIAL, linestyle="--", linewidth=1.2)
    axis.plot(function.x, function.y, color=LEARNED, linewidth=1.8)
    if function.density is not None:
        for end in function.span:
            axis.axvline(end, color="black", linestyle=":", linewidth=0.8)
    axis.set_title(f"{name_of(function)}, R² {function.r2:.2f}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def name_of(function: Function) -> str:
    if function.output is None:
        return f"edge {function.input}"
    return f"{function.input} to {function.output}"


def _label(figure: Any, layer: EdgeLayer, title: str) -> None:
    """Title and legend of the whole figure."""
    lines = importlib.import_module("matplotlib.lines")
    patches = importlib.import_module("matplotlib.patches")
    first = layer.functions[0]
    marks = [lines.Line2D([], [], color=LEARNED, linewidth=1.8, label="learned")]
    if first.initial is not None:
        marks.append(lines.Line2D([], [], color=INITIAL, linestyle="--", label="at the start"))
    if first.density is not None:
        marks.append(lines.Line2D([], [], color="black", linestyle=":", label="end of the range"))
        marks.append(patches.Patch(color=SEEN, label="observed inputs"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8)
    which = "" if first.output is None else "input to output; "
    figure.suptitle(
        f"{title}, {layer.name}: {len(layer.functions)} of {layer.edges:,} edges ({which}R² of the "
        "best straight line)",
        fontsize=9,
        wrap=True,
    )

"""The figures that look into the model: loads of groves, use of edges, learned edge functions."""

from collections.abc import Callable, Sequence
from typing import Any

from kalmagrove.track.ledger import Line
from kalmagrove.track.report.figures import NO_STEP, TOKENS, legend, lines, of_steps, percent
from kalmagrove.track.report.markup import Figure, data_table, escape, number, spread
from kalmagrove.track.report.source import EdgeCurve, EdgePanel, RunData, layers_of, values
from kalmagrove.track.report.svg import (
    WIDE,
    WIDTH,
    Axis,
    Scale,
    Series,
    both,
    canvas,
    clip,
    heat_map,
)

NO_EDGES = "the model has no edge functions"

COLUMNS = 48  # of a heat map over time
PANELS = 8  # layers and groves whose edges are drawn; of several runs fewer of each
SAMPLES = 80  # points of a small curve
SHARES = {
    "kept_share": "energy kept",
    "dead_edges": "dead edges",
    "out_of_range": "out of range",
}
CELL, TALL, GAP = 150, 104, 10  # of a small curve
ACROSS = {WIDE: 7, WIDTH: 2}  # of them


def groves(runs: Sequence[RunData]) -> list[Figure]:
    """How evenly the groves or experts of every layer are loaded: each of them, and over time."""
    figures = []
    for i, run in enumerate(runs):
        named = "" if len(runs) == 1 else f", {run.name}"
        figures.append(shares(run, f"groves-{i}", f"Tokens of each grove{named}"))
        figures.append(
            over_time(
                run, f"load-{i}", f"Fullest grove{named}", "load_max", 1.0,
                "The tokens of a layer's fullest grove or expert, divided by the mean over all of "
                "them: 1 is even.",
                "no layer has groves or experts",
            )
        )  # fmt: skip
    return figures


def shares(run: RunData, key: str, title: str) -> Figure:
    """A heat map of layers and their groves or experts, at the newest checkpoint that tells."""
    told = [line for line in run.history.series("checkpoint") if line.get("shares")]
    if not told:
        absent = "no checkpoint has written down any; layers without groves have none"
        return Figure(key, title, absent=absent)
    newest = told[-1]["shares"]
    most = max(len(parts) for parts in newest.values())
    cells = {
        layer: [part * len(parts) for part in parts] + [None] * (most - len(parts))
        for layer, parts in newest.items()
    }
    columns = [str(grove) for grove in range(most)]
    known = [value for row in cells.values() for value in row if value is not None]
    step = told[-1]["step"]
    rows = [[layer, *("" if v is None else number(v) for v in row)] for layer, row in cells.items()]
    return Figure(
        key,
        title,
        body=heat_map(key, list(cells), columns, list(cells.values()), ("layer", "grove"), 0.0),
        says=f"Heat map of {len(cells)} layers and {most} groves, at step {step:,}: from "
        f"{number(min(known), 3)} to {number(max(known), 3)} of an even share.",
        note=f"At step {step:,}: a grove's or expert's tokens divided by an even share; 1 is even.",
        table=data_table(["layer", *columns], rows),
    )


def over_time(
    run: RunData, key: str, title: str, name: str, low: float, note: str, absent: str
) -> Figure:
    """A heat map of a layer's figure over the run; of every stretch of steps the largest."""
    layers = layers_of(run.steps, name)
    if not layers:
        return Figure(key, title, absent=absent)
    count = min(COLUMNS, len(run.steps))
    cuts = [
        run.steps[i * len(run.steps) // count : (i + 1) * len(run.steps) // count]
        for i in range(count)
    ]
    cells = [[_largest(cut, f"{layer}.{name}") for cut in cuts] for layer in layers]
    if count < len(run.steps):
        note += f" Each of the {count} columns is the largest of its stretch of steps."
    columns = [number(cut[-1]["tokens"], 3) for cut in cuts]
    known = [value for row in cells for value in row if value is not None]
    last = [value for row in cells for value in row[-1:] if value is not None]
    says = (
        f"Heat map of {len(layers)} layers by tokens: from {number(min(known), 3)} to "
        f"{number(max(known), 3)}; at the end at most {number(max(last, default=None), 3)}."
    )
    rows = [
        [columns[j], *(number(row[j], 4) for row in cells)] for j in spread(len(columns), COLUMNS)
    ]
    return Figure(
        key,
        title,
        body=heat_map(key, layers, columns, cells, ("layer", "tokens"), low),
        says=says,
        note=note,
        table=data_table(["tokens", *(f"layer {layer}" for layer in layers)], rows),
    )


def _largest(steps: Sequence[Line], name: str) -> float | None:
    told = values(steps, lambda line: line.get("model", {}).get(name))
    return max((value for value in told if value is not None), default=None)


def activity(runs: Sequence[RunData]) -> list[Figure]:
    """Shares of edges: of one run all in a figure, of several one figure a share."""

    def get(name: str) -> Callable[[Line], Any]:
        return lambda line: line.get("model", {}).get(name)

    if len(runs) == 1:
        steps = runs[0].steps
        tokens = [line["tokens"] for line in steps]
        found = [
            Series(label, tokens, values(steps, get(name)), i)
            for i, (name, label) in enumerate(SHARES.items())
        ]
        note = (
            "Means over the layers. Energy kept: the kept edges' share of the squares of all. Dead "
            "edges: no token kept them. Out of range: inputs beyond the range of the basis."
        )
        axis, absent = Axis("share", percent, True), NO_EDGES if steps else NO_STEP
        title = "Edge activity"
        return [lines("edges-used", title, found, TOKENS, axis, absent, note=note, wide=True)]
    return [
        of_steps(
            runs, f"edges-{name.replace('_', '-')}", f"Edge activity: {label}", "share", get(name),
            NO_EDGES, percent,
        )
        for name, label in SHARES.items()
    ]  # fmt: skip


def learned(runs: Sequence[RunData]) -> list[Figure]:
    """Some of the learned edge functions of every run."""
    figures = []
    for i, run in enumerate(runs):
        title = "Learned edge functions" + ("" if len(runs) == 1 else f", {run.name}")
        most = max(2, PANELS // len(runs))
        figures.append(edge_figure(f"functions-{i}", title, run.edges, most))
    return figures


def edge_figure(key: str, title: str, edges: Sequence[EdgePanel] | str, most: int) -> Figure:
    """Small curves, a row a layer or grove."""
    if isinstance(edges, str):
        return Figure(key, title, absent=edges)
    panels = [edges[i] for i in spread(len(edges), most) if edges[i].curves]
    note = (
        "The functions that vary most in each, over the range of their basis, from the newest "
        "checkpoint. R² is of the best straight line."
    )
    if len(panels) < len(edges):
        note += f" {len(panels)} of {len(edges)} layers and groves are drawn; the table has all."
    rows = [[panel.name, f"{panel.edges:,}", f"{panel.r2:.3f}"] for panel in edges]
    says = " ".join(
        f"{panel.name}: {panel.edges} edges, R² of straight lines {panel.r2:.2f}."
        for panel in panels
    )
    return Figure(
        key,
        title,
        body=both(lambda width: small_curves(key, panels, ACROSS[width])),
        says=f"Small plots of learned functions. {says}",
        legend=legend([("learned", 0), ("as it began", 1)]),
        note=note,
        table=data_table(["layer", "edges", "R² of lines"], rows),
        wide=True,
    )


def small_curves(key: str, panels: Sequence[EdgePanel], across: int) -> str:
    """Of every panel its name and its curves, at most `across` in a row."""
    across, top, drawing = min(across, max(len(panel.curves) for panel in panels)), 0, []
    for panel in panels:
        drawing.append(
            f'<text class=name x="4" y="{top + 14}">{escape(clip(panel.name, 40))}</text>'
        )
        for j, curve in enumerate(panel.curves):
            row, column = divmod(j, across)
            drawing.append(small(curve, 4 + column * (CELL + GAP), top + 20 + row * TALL))
        top += 24 + TALL * -(-len(panel.curves) // across)
    return canvas(key, "".join(drawing), 8 + across * (CELL + GAP), top)


def small(curve: EdgeCurve, left: float, top: float) -> str:
    """One function in its own box: the learned and the initial one, and the zero lines."""
    low = min([*curve.y, *(curve.initial or ()), 0.0])
    high = max([*curve.y, *(curve.initial or ()), 0.0])
    begin, end = curve.x[0], curve.x[-1]
    if not (end > begin and high > low):
        return ""
    xs = Scale(begin, end, left + 4, left + CELL - 4)
    ys = Scale(low, high, top + TALL - 22, top + 6)
    parts = [f'<rect class=box x="{left}" y="{top}" width="{CELL}" height="{TALL - 14}"/>']
    parts.append(f'<path class=grid d="M{left},{ys(0):.1f}h{CELL}"/>')
    if begin < 0 < end:
        parts.append(f'<path class=grid d="M{xs(0):.1f},{top}v{TALL - 14}"/>')
    shown = spread(len(curve.x), SAMPLES)
    for y, style in ((curve.initial, 1), (curve.y, 0)):
        if y is not None:
            places = "L".join(f"{xs(curve.x[i]):.1f},{ys(y[i]):.1f}" for i in shown)
            parts.append(f'<path class="line s{style}" d="M{places}"/>')
    told = f"{curve.title}, R² {curve.r2:.2f}, |f| ≤ {number(curve.amplitude, 2)}"
    parts.append(f'<text class=small x="{left + 1}" y="{top + TALL - 3}">{escape(told)}</text>')
    return "".join(parts)

"""Loss against dollars over many runs, with the Pareto front: in a report, and as a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kalmagrove.track.report.figures import left_out, legend
from kalmagrove.track.report.looks import STYLE
from kalmagrove.track.report.markup import Figure, data_table, dollars, escape, exact, number
from kalmagrove.track.report.source import RunData
from kalmagrove.track.report.svg import WIDE, Axis, Dot, both, patch, scatter

TITLE = "Held-out loss against dollars, run by run"
FRONT = "Pareto front: no run that is done has less loss for less money"
DONE, OPEN = "done", "not done: the last loss so far, for what is paid so far"
STYLES = {FRONT: 1, DONE: 0, OPEN: 7}


COST = Axis("cost (US dollars)", exact, log=None)


@dataclass(frozen=True)
class Outcome:
    """A run's last held-out loss and its dollars; None: unknown. done: it did all its steps."""

    name: str
    usd: float | None
    loss: float | None
    done: bool


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Of the runs that are done those that no other beats in both, the cheapest first.

    >>> a, b, c = (Outcome(n, u, l, True) for n, u, l in (("a", 1, 5), ("b", 2, 4), ("c", 3, 4.5)))
    >>> [one.name for one in pareto([c, b, a])]
    ['a', 'b']
    """
    best, found = math.inf, []
    for one in sorted((o for o in outcomes if o.done and _known(o)), key=_cost_then_loss):
        if _cost_then_loss(one)[1] < best:
            best = _cost_then_loss(one)[1]
            found.append(one)
    return found


def trade(outcomes: Sequence[Outcome], label: str = "loss (nats a token)") -> Figure:
    """The figure; left out if fewer than two runs tell of both."""
    known = [one for one in outcomes if _known(one)]
    bare = left_out([(one.name, _why(one)) for one in outcomes if not _known(one)])
    if len(known) < 2:
        why = "fewer than two runs have a held-out loss and a known price (price=NAME)"
        return Figure("trade", TITLE, absent=f"{why}; {bare}" if known else why)
    front = pareto(known)
    places = [_cost_then_loss(one) for one in known]
    kinds = [FRONT if one in front else DONE if one.done else OPEN for one in known]
    dots = [
        Dot(one.name, *place, STYLES[kind], "" if one.done else "not done", kind == FRONT)
        for one, place, kind in zip(known, places, kinds, strict=True)
    ]
    stairs = [_cost_then_loss(one) for one in front]
    note = f"Left out: {bare}." if bare else ""
    told = ", ".join(f"{one.name} ({dollars(one.usd)}, {number(one.loss)})" for one in front)
    return Figure(
        "trade",
        TITLE,
        body=both(lambda width: scatter("trade", dots, stairs, COST, Axis(label, number), width)),
        says=f"Scatter plot of {label} by dollars, {len(known)} runs. Pareto front of those that "
        f"are done: {told or '-'}. {note}".strip(),
        note=note,
        legend=legend([(kind, STYLES[kind]) for kind in STYLES if kind in kinds], patch, True),
        table=data_table(
            ["run", "dollars", label, ""],
            [
                [dot.name, dollars(dot.x), number(dot.y), kind]
                for dot, kind in sorted(zip(dots, kinds, strict=True), key=lambda pair: pair[0].x)
            ],
        ),
        wide=True,
    )


def _why(one: Outcome) -> str:
    """It is not drawn."""
    if one.usd is None:
        return "the price is unknown"
    if one.loss is None:
        return "there is no held-out loss yet"
    return "its held-out loss is not finite"


def outcome(run: RunData) -> Outcome:
    """Of a run as a report reads it."""
    usd = run.history.spent.usd
    loss = run.evals[-1]["val_loss"] if run.evals else None
    return Outcome(run.name, None if usd is None else float(usd), loss, run.status == "done")


def as_file(figure: Figure) -> str:
    """The drawing of a figure as an SVG file of its own."""
    wide = figure.body.partition("</svg>")[0] + "</svg>"
    inner = wide.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, _, rest = inner.partition(">")
    told = "dashed stairs: the Pareto front of what is done; grey: not done"
    return (
        f'{head} style="background:var(--ground);font-family:sans-serif">'
        f'<title id="{figure.key}">{escape(figure.title)}</title>'
        f'<desc id="{figure.key}-says">{escape(figure.says)}</desc>'
        f"<style><![CDATA[{STYLE}]]></style>"
        f'<text class="small" x="{WIDE - 24}" y="11" text-anchor="end">{told}</text>{rest}\n'
    )


def _known(one: Outcome) -> bool:
    return one.usd is not None and one.loss is not None and math.isfinite(one.loss)


def _cost_then_loss(one: Outcome) -> tuple[float, float]:
    assert one.usd is not None
    assert one.loss is not None
    return one.usd, one.loss

"""Loss against dollars over many runs, with the Pareto front: in a report, and as a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kalmagrove.track.report.figures import legend
from kalmagrove.track.report.looks import STYLE
from kalmagrove.track.report.markup import Figure, data_table, dollars, escape, number
from kalmagrove.track.report.source import RunData
from kalmagrove.track.report.svg import WIDE, Axis, Dot, patch, scatter

TITLE = "Held-out loss against dollars, run by run"
FRONT, DONE, OPEN = "Pareto front: no run has less loss for less money", "done", "not done"
STYLES = {FRONT: 1, DONE: 0, OPEN: 7}


def exact(usd: float) -> str:
    """Dollars that tell neighbouring ticks of cheap runs apart.

    >>> exact(0.0001525), exact(12.5)
    ('$0.000152', '$12.50')
    """
    return f"${usd:.3g}" if 0 < usd < 0.1 else dollars(usd)


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
    if len(known) < 2:
        why = "fewer than two runs have a held-out loss and a known price (price=NAME)"
        return Figure("trade", TITLE, absent=why)
    front = pareto(known)
    places = [_cost_then_loss(one) for one in known]
    kinds = [FRONT if one in front else DONE if one.done else OPEN for one in known]
    dots = [
        Dot(one.name, *place, STYLES[kind], kind == FRONT)
        for one, place, kind in zip(known, places, kinds, strict=True)
    ]
    stairs = [_cost_then_loss(one) for one in front]
    told = ", ".join(f"{one.name} ({dollars(one.usd)}, {number(one.loss)})" for one in front)
    return Figure(
        "trade",
        TITLE,
        body=scatter("trade", dots, stairs, COST, Axis(label, number), WIDE),
        says=f"Scatter plot of {label} by dollars, {len(known)} runs. Pareto front: {told or '-'}.",
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


def outcome(run: RunData) -> Outcome:
    """Of a run as a report reads it."""
    usd = run.history.spent.usd
    loss = run.evals[-1]["val_loss"] if run.evals else None
    return Outcome(run.name, None if usd is None else float(usd), loss, run.status == "done")


def as_file(figure: Figure) -> str:
    """The drawing of a figure as an SVG file of its own."""
    inner = figure.body.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, _, rest = inner.partition(">")
    told = "dashed stairs: the Pareto front; grey: not done; a pointer on a point tells its run"
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

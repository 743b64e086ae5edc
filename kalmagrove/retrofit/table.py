"""Writes a `statistics.Summary` down: tables in Markdown and on the console, everything as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kalmagrove.retrofit.statistics import ArmSummary, Comparison, LossComparison, Spread, Summary
from kalmagrove.retrofit.verdict import nats, points

VERSION = 1  # of the JSON
UNKNOWN = "-"
WIDTH = 120  # of the console, at least


@dataclass(frozen=True)
class Grid:
    """A table, before it is known how it will be shown. All columns but the first are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def to_markdown(summary: Summary) -> str:
    """Tables as GitHub shows them, then the verdicts as lists."""
    parts = [_preface(summary)]
    for grid in grids(summary):
        rule = ["---", *("---:" for _ in grid.columns[1:])]
        lines = [_row(grid.columns), "| " + " | ".join(rule) + " |", *map(_row, grid.rows)]
        parts += [f"**{grid.title}**", "\n".join(lines)]
    for title, said in verdicts(summary):
        parts += [f"**{title}**", "\n".join(f"- {_cell(sentence)}" for sentence in said)]
    return "\n\n".join(parts) + "\n"


def to_json(summary: Summary) -> str:
    """All numbers, unrounded; accuracies and their differences are shares."""
    whole = {"version": VERSION, **asdict(summary), "items": summary.items}
    return json.dumps(whole, indent=2, allow_nan=False) + "\n"


def to_console(summary: Summary, console: Console | None = None) -> None:
    """Print tables and verdicts; of tasks the means alone."""
    if console is None:
        console = Console()
        console = Console(width=max(console.width, WIDTH))
    console.print(_preface(summary), markup=False, highlight=False)
    for grid in grids(summary, narrow=True):
        table = Table(title=escape(grid.title), title_justify="left", box=box.SIMPLE)
        for number, column in enumerate(grid.columns):
            table.add_column(escape(column), justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for title, said in verdicts(summary):
        console.print(title, style="bold", markup=False)
        for sentence in said:
            console.print(f"  {sentence}", markup=False, highlight=False)


def grids(summary: Summary, narrow: bool = False) -> list[Grid]:
    """Every table; one that would hold nothing is left out. narrow: no spread of single tasks."""
    made = [_arms(summary), _costs(summary), _tasks(summary, narrow)]
    if summary.comparisons:
        made.append(_comparisons(summary.comparisons))
    if summary.losses:
        made.append(_losses(summary.losses))
    return made


def verdicts(summary: Summary) -> list[tuple[str, list[str]]]:
    """(title, sentences)."""
    said = [
        ("Arms against one another", [c.verdict for c in summary.comparisons]),
        ("Held-out loss", [c.verdict for c in summary.losses]),
        ("Arms against answers that need no model", [arm.verdict for arm in summary.arms]),
    ]
    return [(title, sentences) for title, sentences in said if sentences]


def _preface(summary: Summary) -> str:
    seeds = ", ".join(map(str, summary.seeds))
    return (
        f"{len(summary.arms)} arms, seeds {seeds}, {len(summary.tasks)} tasks, "
        f"{summary.items:,} items. Accuracy is the mean over tasks; ± is the standard deviation "
        f"over seeds; intervals are of {100 * summary.level:.0f}%, by {summary.resamples:,} "
        f"resamples of items and seeds (bootstrap seed {summary.bootstrap_seed})."
    )


def _arms(summary: Summary) -> Grid:
    columns = ("arm", "seeds", "accuracy %", "interval", "by items %", "parse failures %")
    losses = ("held-out nats", "bits/byte")
    rows: list[tuple[str, ...]] = [
        (
            arm.arm,
            "one run" if arm.fixed else str(len(arm.seeds)),
            _percent(arm.macro),
            f"[{100 * arm.macro_interval[0]:.1f}, {100 * arm.macro_interval[1]:.1f}]",
            _percent(arm.micro),
            _percent(arm.parse_failures),
            _spread(arm.val_nats, lambda x: f"{x:.4f}"),
            _spread(arm.bits_per_byte, lambda x: f"{x:.4f}"),
        )
        for arm in summary.arms
    ]
    for name, share in (("commonest answer", summary.majority), ("guessing", summary.random)):
        rows.append((name, UNKNOWN, f"{100 * share:.1f}", *[UNKNOWN] * 5))
    return Grid("Results", (*columns, *losses), tuple(rows))


def _costs(summary: Summary) -> Grid:
    columns = ("arm", "trainable", "total", "peak GiB", "tokens/s", "seconds", "$ a run", "device")
    return Grid("Cost", columns, tuple(map(_cost, summary.arms)))


def _cost(arm: ArmSummary) -> tuple[str, ...]:
    return (
        arm.arm,
        f"{arm.trainable_parameters:,}",
        f"{arm.total_parameters:,}",
        UNKNOWN if arm.peak_bytes is None else f"{arm.peak_bytes / 2**30:.2f}",
        _mean(arm.tokens_per_second, lambda x: f"{x:,.0f}"),
        _mean(arm.train_seconds, lambda x: f"{x:,.0f}"),
        _mean(arm.usd, _dollars),
        ", ".join(arm.devices) or UNKNOWN,
    )


def _tasks(summary: Summary, narrow: bool) -> Grid:
    def show(spread: Spread) -> str:
        return f"{100 * spread.mean:.1f}" if narrow else _percent(spread)

    columns = ("task", "items", "guessing", "commonest", *(arm.arm for arm in summary.arms))
    rows = tuple(
        (
            task.name,
            f"{task.items:,}",
            f"{100 * task.random:.1f}",
            f"{100 * task.majority:.1f}",
            *(show(arm.tasks[task.name]) for arm in summary.arms),
        )
        for task in summary.tasks
    )
    return Grid("Accuracy by task, %", columns, rows)


def _comparisons(comparisons: Sequence[Comparison]) -> Grid:
    columns = ("accuracy, points", "difference", "interval", "seeds alone", "p", "p (Holm)")
    rows = tuple(
        (
            f"{c.arm} - {c.reference}",
            points(c.difference),
            _interval(c.interval, points),
            _interval(c.seed_interval, points),
            _p(c.p),
            _p(c.p_holm),
            f"{100 * c.detectable:.1f}",
            c.outcome,
        )
        for c in comparisons
    )
    return Grid("Differences", (*columns, "least seen", "outcome"), rows)


def _losses(losses: Sequence[LossComparison]) -> Grid:
    columns = ("held-out loss, nats", "difference", "interval", "p", "p (Holm)")
    rows = tuple(
        (
            f"{c.arm} - {c.reference}",
            nats(c.difference),
            _interval(c.interval, nats),
            _p(c.p),
            _p(c.p_holm),
            UNKNOWN if c.detectable is None else f"{c.detectable:.4f}",
            c.outcome if c.interval is not None else UNKNOWN,
        )
        for c in losses
    )
    return Grid("Differences of held-out loss", (*columns, "least seen", "outcome"), rows)


def _percent(spread: Spread | None) -> str:
    return _spread(spread, lambda share: f"{100 * share:.1f}")


def _spread(spread: Spread | None, show: Callable[[float], str]) -> str:
    if spread is None:
        return UNKNOWN
    return show(spread.mean) + ("" if spread.sd is None else f" ± {show(spread.sd)}")


def _mean(spread: Spread | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if spread is None else show(spread.mean)


def _interval(interval: tuple[float, float] | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if interval is None else f"[{show(interval[0])}, {show(interval[1])}]"


def _p(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _dollars(usd: float) -> str:
    return "<$0.01" if 0 < usd < 0.005 else f"${usd:,.2f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Text that Markdown leaves alone."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")

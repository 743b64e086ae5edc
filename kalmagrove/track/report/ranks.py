"""Stragglers: how long each rank takes for what it does alone, and which the others wait for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kalmagrove.track.ledger import Line
from kalmagrove.track.report.figures import NO_STEP, TOKENS, lines, of_steps, percent
from kalmagrove.track.report.markup import Figure, data_table, number
from kalmagrove.track.report.source import RunData
from kalmagrove.track.report.svg import Axis, Series

TITLE = "Own time of ranks"
NOTE = (
    "A rank's own time is that of its data and forward passes without all-to-alls: everywhere else "
    "ranks wait for one another."
)
NAMED = 3  # ranks, in the note; the table has all


def ranks(runs: Sequence[RunData]) -> Figure:
    """Of one run the least, mean and most of all ranks, and how often each was the slowest; of
    several how far the slowest is above the mean.
    """
    if len(runs) > 1:
        label, note = "slowest over the mean", f"How far above the mean the slowest is. {NOTE}"
        return of_steps(runs, "ranks", TITLE, label, _excess, _absent, percent, note=note)
    (run,) = runs
    told = _told(run)
    tokens = [line["tokens"] for line in told]
    series = [
        Series(name, tokens, [1000 * line[f"rank_seconds_{key}"] for line in told], style)
        for style, (name, key) in enumerate(
            (("mean", "mean"), ("slowest", "max"), ("fastest", "min"))
        )
    ]
    axis = Axis("milliseconds a step", number, True)
    note = f"{NOTE} {often(told)}" if told else ""
    figure = lines("ranks", TITLE, series, TOKENS, axis, _absent(run), note=note)
    return figure if figure.absent else replace(figure, table=figure.table + table(told))


def often(told: Sequence[Line]) -> str:
    """How often each rank was the slowest, in words."""
    count = Counter(line["slowest_rank"] for line in told).most_common()
    text = ", ".join(f"rank {rank} in {times:,}" for rank, times in count[:NAMED])
    if len(count) > NAMED:
        text += f", {len(count) - NAMED:,} others in {sum(n for _, n in count[NAMED:]):,}"
    return f"The slowest, of {len(told):,} lines: {text}."


def table(told: Sequence[Line]) -> str:
    """Of each rank that was the slowest: how often, and how far above the mean it was then."""
    rows = []
    for rank, times in Counter(line["slowest_rank"] for line in told).most_common():
        above = [_excess(line) or 0.0 for line in told if line["slowest_rank"] == rank]
        mean = percent(sum(above) / times)
        rows.append([str(rank), f"{times:,}", percent(times / len(told)), mean])
    return data_table(["rank", "lines", "share", "above the mean"], rows, "Slowest ranks")


def _told(run: RunData) -> list[Line]:
    """The step lines that compare ranks: of sessions with several."""
    size, found = 1, set()
    for line in run.history.lines:
        size = line.get("world_size", size)
        if size > 1 and "rank_seconds_max" in line:
            found.add(id(line))
    return [line for line in run.steps if id(line) in found]


def _excess(line: Line) -> float | None:
    mean, least, most = (line.get(f"rank_seconds_{name}") for name in ("mean", "min", "max"))
    return most / mean - 1 if mean and most != least else None  # one rank: nothing to compare


def _absent(run: RunData) -> str:
    if not run.steps:
        return NO_STEP
    if max(line.get("world_size", 1) for line in run.history.lines) == 1:
        return "there is one rank"
    return "the ledger, of an older version, does not tell it"

"""The figures of a report, each made of one or of several runs.

Every function takes the runs and returns `Figure`s; one that a run has no data for says why.
"""

from collections.abc import Callable, Sequence
from typing import Any

from kalmagrove.track.ledger import Line
from kalmagrove.track.phases import label
from kalmagrove.track.report.markup import (
    Figure,
    data_table,
    escape,
    exact,
    number,
)
from kalmagrove.track.report.source import POINTS, RunData, thin, values
from kalmagrove.track.report.svg import (
    BLANK,
    WIDE,
    WIDTH,
    Axis,
    Series,
    both,
    line_chart,
    patch,
    stacked_bars,
    swatch,
)

TOKENS = Axis("tokens", number)
NARROW = 500  # points of a line that is drawn a second time
REST = "other"  # of the parts of a whole
NO_STEP = "no step is written yet"
NO_PRICE = "the price is unknown (price=NAME)"


Why = Callable[[RunData], str]  # a run is not in a figure


def missing(runs: Sequence[RunData], drawn: set[str], why: Why) -> tuple[str, str]:
    """Why a figure is left out, if no run is drawn; and the note on those that are not."""
    found = [(run.name, why(run)) for run in runs if run.name not in drawn]
    told, reasons = left_out(found), {reason for _, reason in found}
    return reasons.pop() if len(reasons) == 1 else told, f" Left out: {told}." if found else ""


def left_out(found: Sequence[tuple[str, str]]) -> str:
    """Names of runs and why each is not drawn, those with one reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in found:
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names[reason])}, as {reason}" for reason in names)


def no_loss(run: RunData) -> str:
    return "no loss was finite" if run.steps else NO_STEP


def no_dollars(run: RunData) -> str:
    return NO_PRICE if run.last["usd"] is None else no_loss(run)


def no_mfu(run: RunData) -> str:
    if run.first.get("unit") == "gpu":
        return "the peak of the device is unknown (price.peak_tflops)"
    return "the processes ran on CPU cores, which have no stated peak"


def lines(
    key: str,
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    absent: str,
    *,
    levels: Sequence[tuple[float, str]] = (),
    note: str = "",
    wide: bool = False,
    named: bool = False,
) -> Figure:
    """A line chart of what `series` have, thinned; the figure is absent if they have nothing.

    named: a single line is named too.
    """
    series = [line for line in series if line.points()]
    if not series:
        return Figure(key, title, absent=absent)
    most = max(250, POINTS // max(1, len({line.style for line in series}) // 2))
    longest = max(len(line.x) for line in series)
    thinned = _thinned(series, most)
    body = line_chart(key, thinned, x, y, levels)
    if wide:
        drawn = {WIDE: thinned, WIDTH: _thinned(series, NARROW)}
        body = both(lambda width: line_chart(key, drawn[width], x, y, levels, width))
    if longest > most:
        note += f" Of up to {longest:,} points a line at most {most:,} are drawn, extremes kept."
    rows = [
        [line.name, x.text(px), "gap" if py is None else y.text(py)]
        for line in thinned
        for px, py in zip(line.x, line.y, strict=True)
    ]
    return Figure(
        key,
        title,
        body=body,
        says=f"Line chart of {y.label} by {x.label}. "
        + " ".join(described(line, y) for line in series),
        legend=legend([(line.name, line.style) for line in series if not line.faint], named=named),
        note=note.strip(),
        table=data_table(["line", x.label, y.label], rows),
        wide=wide,
    )


def _thinned(series: Sequence[Series], most: int) -> list[Series]:
    return [
        Series(line.name, *thin(line.x, line.y, most), line.style, line.faint, line.dots)
        for line in series
    ]


def described(line: Series, y: Axis) -> str:
    """A line in words."""
    points = line.points()
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    return (
        f"{line.name}: {len(points)} points, from {y.text(points[0][1])} to "
        f"{y.text(points[-1][1])}, lowest {y.text(low)}, highest {y.text(high)}."
    )


def legend(
    entries: Sequence[tuple[str, int]],
    draw: Callable[[int], str] = swatch,
    named: bool = False,
) -> str:
    if len(entries) < 2 and not named:
        return ""
    items = "".join(f"<li>{draw(style)}{escape(name)}</li>" for name, style in entries)
    return f"<ul class=legend>{items}</ul>"


def time_axis(runs: Sequence[RunData]) -> tuple[Axis, float]:
    """Wall time in the unit that suits the longest run, and its seconds."""
    longest = max((max(run.seconds.values(), default=0.0) for run in runs), default=0.0)
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if longest >= 2 * size:
            return Axis(f"wall time ({unit})", number), size
    return Axis("wall time (seconds)", number), 1.0


def loss(runs: Sequence[RunData]) -> list[Figure]:
    """Loss against tokens, time and dollars."""
    unit, size = time_axis(runs)
    money = Axis("cost (US dollars)", exact)
    axes: list[tuple[str, Axis, Callable[[RunData, Line], Any], Why]] = [
        ("tokens", TOKENS, lambda run, line: line["tokens"], no_loss),
        ("time", unit, lambda run, line: run.seconds[id(line)] / size, no_loss),
        ("dollars", money, lambda run, line: line["usd"], no_dollars),
    ]
    figures = []
    for key, axis, place, why in axes:
        series: list[Series] = []
        drawn: set[str] = set()
        for i, run in enumerate(runs):
            of_loss = [line for line in run.steps if place(run, line) is not None]
            held_out = [line for line in run.evals if place(run, line) is not None]
            one = len(runs) == 1
            series += [
                Series(
                    "training" if one else f"{run.name}, training",
                    [place(run, line) for line in of_loss],
                    values(of_loss, "loss"),
                    style=0 if one else i,
                    faint=not one,
                ),
                Series(
                    "held out" if one else run.name,
                    [place(run, line) for line in held_out],
                    values(held_out, "val_loss"),
                    style=1 if one else i,
                    dots=True,
                ),
            ]
            drawn |= {run.name} if any(line.points() for line in series[-2:]) else set()
        note = "" if len(runs) == 1 else "Thin: training loss. With dots: held-out loss."
        if key == "time":
            note += " All sessions one after another, lost work included, pauses left out."
        if key == "dollars":
            note += " Lost work included."
        absent, bare = missing(runs, drawn, why)
        levels = baselines(runs) if key == "tokens" else []
        figures.append(
            lines(
                f"loss-{key}",
                f"Loss against {key}",
                series,
                axis,
                Axis("loss (nats a token)", number, log=None),
                absent,
                levels=levels,
                note=note + bare,
                wide=key == "tokens",
            )
        )
    return figures


def baselines(runs: Sequence[RunData]) -> list[tuple[float, str]]:
    """Losses of n-gram models, where all runs were measured on the same text."""
    found = []
    for name in ("unigram", "bigram"):
        told = {run.told(f"{name}_nats") for run in runs}
        if len(told) == 1 and (value := told.pop()) is not None:
            found.append((float(value), name))
    return found


def of_steps(
    runs: Sequence[RunData],
    key: str,
    title: str,
    label: str,
    get: str | Callable[[Line], Any],
    why: str | Why,
    text: Callable[[float], str] = number,
    zero: bool = True,
    note: str = "",
) -> Figure:
    """One figure of the step lines, a line a run. why: a run that has begun tells nothing of it."""
    series = [
        Series(run.name, [line["tokens"] for line in run.steps], values(run.steps, get), style=i)
        for i, run in enumerate(runs)
    ]
    axis = Axis(label, text, zero, log=None)
    drawn = {line.name for line in series if line.points()}

    def reason(run: RunData) -> str:
        if not run.steps:
            return NO_STEP
        return why if isinstance(why, str) else why(run)

    absent, bare = missing(runs, drawn, reason)
    many = len(runs) > 1
    return lines(key, title, series, TOKENS, axis, absent, note=note + bare, named=many)


def percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def speed(runs: Sequence[RunData]) -> list[Figure]:
    """Throughput, utilisation, memory, and where a step's time goes."""
    return [
        of_steps(runs, "throughput", "Throughput", "tokens a second", "tokens_per_s", NO_STEP),
        utilisation(runs),
        *split(runs),
        of_steps(runs, "memory", "Peak memory", "GB, largest rank", _gigabytes, NO_STEP),
        of_steps(
            runs, "comm", "Sent between groves", "bytes a step and rank",
            lambda line: line.get("comm", {}).get("alltoall_bytes"),
            "no groves or experts were spread over ranks (parallel.ep=1)",
        ),
        of_steps(
            runs, "grad-norm", "Gradient norm", "norm before clipping", "grad_norm",
            "no norm was finite", zero=False,
        ),
    ]  # fmt: skip


def utilisation(runs: Sequence[RunData]) -> Figure:
    """Of one run also what is computed twice (hfu)."""
    title = "Model FLOPs utilisation"
    if len(runs) > 1:
        return of_steps(runs, "mfu", title, "share of the peak", "mfu", no_mfu, percent)
    steps = runs[0].steps
    tokens = [line["tokens"] for line in steps]
    series = [
        Series("model (MFU)", tokens, values(steps, "mfu"), 0),
        Series("hardware (HFU)", tokens, values(steps, "hfu"), 1),
    ]
    note = "Hardware FLOPs count what is computed twice too."
    axis = Axis("share of the peak", percent, True)
    absent = no_mfu(runs[0]) if steps else NO_STEP
    return lines("mfu", title, series, TOKENS, axis, absent, note=note)


def _gigabytes(line: Line) -> float | None:
    return line["peak_memory"] / 1e9 if line.get("peak_memory") else None


def bars(
    key: str,
    title: str,
    names: Sequence[str],
    parts: dict[str, list[float]],
    x: Axis,
    *,
    note: str = "",
    absent: str = "",
) -> Figure:
    """Stacked bars, the rest last and without a colour, parts that no bar has left out; absent if
    they are all empty.
    """
    order = sorted(parts, key=lambda name: name == REST)
    parts = {name: parts[name] for name in order if any(parts[name])}
    if not parts:
        return Figure(key, title, absent=absent)
    styles = [BLANK if name == REST else i for i, name in enumerate(parts)]
    rows = [
        [name, *(x.text(column[i]) for column in parts.values())] for i, name in enumerate(names)
    ]
    told = " ".join(
        f"{name}: " + ", ".join(f"{part} {x.text(column[i])}" for part, column in parts.items())
        + "."
        for i, name in enumerate(names)
    )  # fmt: skip
    return Figure(
        key,
        title,
        body=stacked_bars(key, names, list(zip(styles, parts.values(), strict=True)), x),
        says=f"Stacked bars of {x.label}. {told}",
        legend=legend(list(zip(parts, styles, strict=True)), patch),
        note=note,
        table=data_table(["", *parts], rows),
    )


def split(runs: Sequence[RunData]) -> list[Figure]:
    """Where the time of a step went; of one run over its course."""
    pieces = [(run.name, run.steps) for run in runs]
    if len(runs) == 1:
        steps = runs[0].steps
        count = min(8, len(steps))
        cuts = [
            steps[i * len(steps) // count : (i + 1) * len(steps) // count] for i in range(count)
        ]
        pieces = [(f"to step {cut[-1]['step']:,}", cut) for cut in cuts]
    parts: dict[str, list[float]] = {}
    for i, (_, cut) in enumerate(pieces):
        for name, seconds in step_split(cut).items():
            parts.setdefault(name, [0.0] * len(pieces))[i] = seconds
    axis = Axis("milliseconds a step", lambda ms: number(ms, 3), True)
    return [
        bars(
            "split", "Time of a step", [name for name, _ in pieces], parts, axis,
            absent=NO_STEP,
            note="As the first rank sees it. Other: the step's remainder.",
        )
    ]  # fmt: skip


def step_split(steps: Sequence[Line]) -> dict[str, float]:
    """Milliseconds a step, by part."""
    known = [line for line in steps if line.get("step_seconds")]
    count = sum(line["train_seconds"] / line["step_seconds"] for line in known)
    if not count:
        return {}
    sums: dict[str, float] = {}
    for line in known:
        for name, seconds in (line.get("seconds_split") or {}).items():
            if isinstance(seconds, int | float):
                sums[label(name)] = sums.get(label(name), 0.0) + seconds
    sums[REST] = max(0.0, sum(line["train_seconds"] for line in known) - sum(sums.values()))
    return {name: 1000 * seconds / count for name, seconds in sums.items()}

"""What a run cost: where its time went, its budget, and what happened to it."""

from collections.abc import Sequence

from kalmagrove.track.budget import show
from kalmagrove.track.ledger import FIRST, Line
from kalmagrove.track.phases import label
from kalmagrove.track.report.figures import (
    NO_PRICE,
    NO_STEP,
    REST,
    TOKENS,
    bars,
    lines,
    missing,
    percent,
)
from kalmagrove.track.report.markup import Figure, dollars, duration, exact, number
from kalmagrove.track.report.source import RunData, values
from kalmagrove.track.report.svg import Axis, Series

CAPS = {"usd": "dollars", "hours": "hours", "tokens": "tokens"}
INHERITED = "the run whose checkpoint it continues"
FAR = 5  # times the largest figure: a budget above that would flatten the lines


def hours(runs: Sequence[RunData]) -> list[Figure]:
    """What was paid for: where the device-hours went."""
    parts: dict[str, list[float]] = {}
    for i, run in enumerate(runs):
        for name, share in spent(run).items():
            parts.setdefault(name, [0.0] * len(runs))[i] = share
    note = "Of all that was paid for. Other: what none of these has measured."
    lost = [run for run in runs if run.history.lost.device_seconds and _phases(run)]
    for run in lost:
        seconds = number(run.history.lost.device_seconds)
        note += f" {run.name}: {seconds} device-seconds of it were lost work."
    for run in runs:
        if inherited := run.history.inherited.device_seconds:
            seconds = number(inherited)
            note += f" {run.name}: without the {seconds} device-seconds of {INHERITED}."
    return [
        bars(
            "hours", "Where the time went", [run.name for run in runs], parts,
            Axis("share of the device-seconds", percent, True), note=note,
            absent="no time is written down yet",
        )
    ]  # fmt: skip


def spent(run: RunData) -> dict[str, float]:
    """Shares of all device-seconds, by phase; of a ledger without phases, what its lines tell. What
    another ledger tells of is left out.
    """
    whole = run.history.spent.device_seconds - run.history.inherited.device_seconds
    if whole <= 0:
        return {}
    found = _phases(run) or _told(run)
    if killed := sum(part.spent.device_seconds for part in run.history.killed):
        found["killed"] = killed
    rest = max(0.0, whole - sum(found.values()))
    found[REST] = found.get(REST, 0.0) + rest
    return {name: seconds / whole for name, seconds in found.items()}


def _phases(run: RunData) -> dict[str, float]:
    """Device-seconds, of the last line of every session; nothing if one has none."""
    ends: list[tuple[Line, int]] = []
    for line in run.history.lines:
        if line["event"] in FIRST:
            ends.append((line, line.get("devices", 1)))
        elif ends:
            ends[-1] = line, ends[-1][1]
    found: dict[str, float] = {}
    for line, devices in ends:
        if not line.get("phases"):
            return {}
        for name, seconds in line["phases"].items():
            part = REST if name == "idle" else label(name)
            found[part] = found.get(part, 0.0) + seconds * devices
    return found


def _told(run: RunData) -> dict[str, float]:
    """Device-seconds of steps that lasted, evaluations, checkpoints, and lost work."""
    devices, found = 1, dict.fromkeys(("training", "evaluation", "checkpoint"), 0.0)
    for line in run.history.effective():
        devices = line.get("devices", devices)
        kinds = {"step": "training", "eval": "evaluation", "checkpoint": "checkpoint"}
        if kind := kinds.get(line["event"]):
            found[kind] += devices * (line.get("train_seconds") or line.get("seconds") or 0.0)
    return found | {"lost work": run.history.lost.device_seconds}


def budget(runs: Sequence[RunData]) -> Figure:
    """The share of every cap that is used, against tokens."""
    series: list[Series] = []
    notes = []
    for run in runs:
        seen = [*run.steps, *([run.last] if run.steps and run.last["event"] != "step" else [])]
        tokens = [line["tokens"] for line in seen]
        for cap, limit in caps(run).items():
            amounts = [_used(run, line, cap) for line in seen]
            share = [None if amount is None else amount / limit for amount in amounts]
            name = CAPS[cap] if len(runs) == 1 else f"{run.name}: {CAPS[cap]}"
            series.append(Series(name, tokens, share, len(series)))
            if share and share[-1] is not None:
                notes.append(f"{name}: {_told_of(run, cap, limit, amounts[-1])}.")
    drawn = {run.name for run in runs if caps(run) and run.steps}
    absent, bare = missing(runs, drawn, _no_budget)
    axis, note = Axis("share of the cap", percent, True), " ".join(notes) + bare
    levels = [(1.0, "the cap")]
    title = "Budget"
    return lines(
        "budget", title, series, TOKENS, axis, absent, levels=levels, note=note, named=True
    )


def _used(run: RunData, line: Line, cap: str) -> float | None:
    """Up to this line, in the cap's unit."""
    return run.seconds[id(line)] / 3600 if cap == "hours" else line[cap]


def _told_of(run: RunData, cap: str, limit: float, used: float | None) -> str:
    """What is used of a cap, and what the whole run takes by the last projection."""
    text, newest = f"{show(cap, used)} of {show(cap, limit)}", run.steps[-1]
    left, whole = newest.get("seconds_left"), None
    if cap == "usd":
        whole = newest.get("usd_projected")
    elif cap == "hours" and left is not None:
        whole = (run.seconds[id(newest)] + left) / 3600
    elif cap == "tokens" and run.planned_steps:
        whole = newest["tokens"] / newest["step"] * run.planned_steps
    done = run.status == "done" or whole is None
    return text if done else f"{text}, the whole run at this pace {show(cap, whole)}"


def _no_budget(run: RunData) -> str:
    if run.config is None:
        return "config.yaml is missing, which says what was set"
    return NO_STEP if caps(run) else "no budget was set"


def money(runs: Sequence[RunData]) -> Figure:
    """Dollars spent and projected against tokens, below their cap if there is one."""
    series = []
    for i, run in enumerate(runs):
        one, tokens = len(runs) == 1, [line["tokens"] for line in run.steps]
        name, style = ("projected", 1) if one else (f"{run.name}, projected", i)
        ahead = values(run.steps, "usd_projected")
        series += [
            Series("spent" if one else run.name, tokens, values(run.steps, "usd"), i),
            Series(name, tokens, ahead, style, faint=not one),
        ]
        if one:
            series += [
                Series(f"{end} of the projection", tokens, told, 1, faint=True)
                for end, told in zip(("low end", "high end"), _interval(run), strict=True)
            ]
    limits = [(limit, run.name) for run in runs if (limit := caps(run).get("usd")) is not None]
    most = max((value for line in series for _, value in line.points()), default=0.0)
    near = [limit <= FAR * most for limit, _ in limits]
    levels = [
        (limit, "budget" if len(runs) == 1 else f"budget of {name}")
        for (limit, name), drawn in zip(limits, near, strict=True)
        if drawn
    ]
    note = ""
    for (limit, name), drawn in zip(limits, near, strict=True):
        note += "" if drawn else f" Far above, not drawn: the budget of {name}, {dollars(limit)}."
    if any(line.faint and line.points() for line in series) and len(runs) == 1:
        note += " Thin: the projection's 90% interval."
    axis = Axis("US dollars", exact, True)
    priced = {run.name for run in runs if run.steps and _priced(run)}
    absent, bare = missing(runs, priced, _no_money)
    title = "Dollars spent and projected"
    return lines("money", title, series, TOKENS, axis, absent, levels=levels, note=note + bare)


def _priced(run: RunData) -> bool:
    return run.last["usd"] is not None


def _no_money(run: RunData) -> str:
    return NO_STEP if _priced(run) else NO_PRICE


def _interval(run: RunData) -> tuple[list[float | None], list[float | None]]:
    """Ends of the projected dollars."""
    low = values(run.steps, lambda line: (line.get("usd_interval") or [None, None])[0])
    high = values(run.steps, lambda line: (line.get("usd_interval") or [None, None])[1])
    return low, high


def caps(run: RunData) -> dict[str, float]:
    """The limits that were set: usd, hours, tokens."""
    given = (run.config or {}).get("budget") or {}
    return {name: cap for name, cap in given.items() if cap is not None}


def sessions(run: RunData) -> list[list[str]]:
    """Everything but steps, evaluations and checkpoints, in words."""
    rows = []
    for line in run.history.lines:
        event, told = line["event"], ""
        if event in FIRST:
            told = (
                f"processes: {line.get('world_size', 'unknown')}, {line.get('unit', 'device')}s: "
            )
            told += f"{line.get('devices', 'unknown')}, {line.get('price', 'price unknown')}"
            if line.get("lost_steps") or line.get("lost_device_seconds"):
                lost = line["lost_device_seconds"]
                told += f"; lost {line['lost_steps']:,} steps, {number(lost)} device-seconds"
            if line.get("killed"):
                seconds = sum(part["device_seconds"] for part in line["killed"])
                told += f"; after their last lines killed starts took {number(seconds)} of these"
            if inherited := line.get("inherited"):
                told += f"; had cost {number(inherited['device_seconds'])} device-seconds elsewhere"
        elif event == "skip":
            told = f"no update: {line.get('reason', 'not finite')}"
        elif event == "unsaved":
            told = f"a save failed: {line['reason']}"
        elif event == "budget":
            told = f"{percent(line['share'])} of budget.{line['cap']}={line['limit']:g} is used"
        elif event == "refit":
            told = f"spline grids moved to their data: {len(line.get('grids', {})):,}"
        elif event == "stop":
            told = ": ".join(str(line[key]) for key in ("status", "reason") if key in line)
        elif event in ("step", "eval", "checkpoint"):
            continue
        rows.append([event, f"{line['step']:,}", duration(run.seconds[id(line)]), told])
    return rows

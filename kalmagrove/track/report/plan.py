"""What was predicted for a run (`plan.json`, of `kalmagrove.plan`) beside what it did."""

from collections.abc import Sequence

from kalmagrove.track.ledger import Line
from kalmagrove.track.report.figures import percent, step_split
from kalmagrove.track.report.markup import dollars, escape, number, table
from kalmagrove.track.report.source import RunData
from kalmagrove.track.report.svg import Format
from kalmagrove.track.summary import throughput

NONE = "without a GPU whose figures are listed there is none, nor in fp32"
Row = tuple[str, float | None, float | None, Format]  # name, predicted, actual


def predicted(run: RunData) -> str:
    """A table, or why there is none."""
    if run.plan is None:
        return f"<p>Left out: {escape(run.name)} has no prediction (plan.json): {NONE}.</p>"
    shown = [
        [name, _text(wanted, text), _text(found, text), _ratio(wanted, found)]
        for name, wanted, found, text in (*of_steps(run), *of_all(run))
    ]
    doubts = [str(doubt) for doubt in run.plan.get("extrapolated") or ()]
    told = f"Not covered by measurements: {'; '.join(doubts)}." if doubts else ""
    head = ["", "predicted", "actual", "actual / predicted"]
    note = f"<p class=note>{escape(told)}</p>" if told else ""
    return f"<h3>{escape(run.name)}</h3>{table(head, shown)}{note}"


def of_steps(run: RunData) -> list[Row]:
    """What can be compared from the first step on."""
    plan, steps = run.plan or {}, run.steps
    peak = max((line["peak_memory"] for line in steps if line.get("peak_memory")), default=None)
    rate = throughput(steps)
    per_step = None if not rate else plan.get("tokens_per_step", 0) / rate or None
    rows: list[Row] = [
        ("tokens a second", plan.get("tokens_per_s"), rate, number),
        ("seconds a step", plan.get("step_seconds"), per_step, number),
        ("MFU", plan.get("mfu"), _mean(steps, "mfu"), percent),
        ("HFU", plan.get("hfu"), _mean(steps, "hfu"), percent),
        ("peak memory of a device (bytes)", plan.get("peak_bytes"), peak, number),
    ]
    actual = step_split(steps)
    parts = {name: 1000 * seconds for name, seconds in (plan.get("step_split") or {}).items()}
    return rows + [
        (f"milliseconds a step, {name}", milliseconds, actual.get(name), number)
        for name, milliseconds in parts.items()
    ]


def of_all(run: RunData) -> list[Row]:
    """What the whole run takes; actual once it has come that far."""
    plan = run.plan or {}
    tokens = plan.get("tokens")
    done = tokens is not None and run.history.reached[1] >= tokens
    cost, joules = run.history.spent, run.history.joules
    usd = None if cost.usd is None else float(cost.usd)
    of = f", all {number(tokens)} tokens"
    rows: list[Row] = [
        (f"hours{of}", plan.get("hours"), max(run.seconds.values()) / 3600, number),
        (f"dollars{of}", plan.get("usd"), usd, dollars),
        (f"joules at most{of}", plan.get("joules_at_most"), joules or None, number),
    ]
    return [(name, wanted, found if done else None, text) for name, wanted, found, text in rows]


def _mean(steps: Sequence[Line], key: str) -> float | None:
    """Over the time of the steps."""
    known = [line for line in steps if line.get(key) is not None]
    seconds = sum(line["train_seconds"] for line in known)
    return sum(line[key] * line["train_seconds"] for line in known) / seconds if seconds else None


def _text(value: float | None, text: Format) -> str:
    return "-" if value is None else text(value)


def _ratio(wanted: float | None, found: float | None) -> str:
    return f"{found / wanted:.2f}" if wanted and found is not None else "-"

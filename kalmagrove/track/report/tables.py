"""The tables of a report: headline figures, runs side by side, settings that differ, what was
predicted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kalmagrove.track.budget import show
from kalmagrove.track.ledger import Line
from kalmagrove.track.report.cost import caps
from kalmagrove.track.report.figures import percent
from kalmagrove.track.report.markup import dollars, duration, number
from kalmagrove.track.report.source import RunData
from kalmagrove.track.summary import throughput

OWN = ("name", "dir")  # settings that every run has its own of
STATUS = {
    "done": "done",
    "stopped": "stopped, can go on",
    "failed": "failed",
    "hung": "hung, can go on",
    "budget": "stopped by its budget",
    "open": "running, or killed",
}


def headline(run: RunData) -> dict[str, str]:
    """The figures that one asks for first; what is not known says so."""
    step, tokens = run.history.reached
    planned = run.planned_steps
    evaluated = run.evals[-1] if run.evals else {}
    cost = run.history.spent
    unit = run.first.get("unit", "device")
    best = min((v for line in run.evals if (v := line["val_loss"]) is not None), default=None)
    bits = evaluated.get("val_bits_per_byte")
    facts = {
        "status": STATUS.get(run.status, run.status),
        "steps": f"{step:,}" + (f" of {planned:,}" if planned else ""),
        "tokens": number(tokens),
        "held-out loss": f"{number(evaluated.get('val_loss'))} nats",
        "bits a byte": number(bits),
        "best held-out loss": f"{number(best)} nats",
        "training loss": f"{number(_last(run.steps, 'loss'))} nats",
        "throughput": f"{number(throughput(run.steps))} tokens/s",
        "MFU": "unknown" if (mfu := _last(run.steps, "mfu")) is None else percent(mfu),
        "peak memory": f"{number(_peak(run))} GB",
        "cost": dollars(None if cost.usd is None else float(cost.usd)),
        f"{unit}-hours": number(cost.device_seconds / 3600),
        "wall time": duration(max(run.seconds.values())),
        "goodput": "unknown" if (part := run.history.goodput) is None else percent(part),
        "budget": _budget(run),
        "energy": _energy(run),
        "lost steps": f"{run.history.lost.steps:,}",
        "sessions": f"{run.history.sessions}",
        "skipped steps": f"{sum(line.get('skipped') or 0 for line in run.steps):,}",
        "parameters": _told(run, "params_total"),
        "active parameters": _told(run, "params_active"),
    }
    for name, score in run.scores.items():
        facts[f"accuracy, {name}"] = percent(score)
    if run.arm is not None:
        facts["trainable parameters"] = number(run.arm.get("trainable_parameters"))
    return {name: "unknown" if "unknown" in text else text for name, text in facts.items()}


def compared(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row a figure, a column a run."""
    facts = [headline(run) for run in runs]
    names = list(dict.fromkeys(name for found in facts for name in found))
    rows = [[name, *(found.get(name, "-") for found in facts)] for name in names]
    return ["", *(run.name for run in runs)], rows


def config_diff(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the settings that are not the same in all runs; `-`: it has none."""
    flat = [dict(flatten(run.config or {})) for run in runs]
    keys = list(dict.fromkeys(key for found in flat for key in found))
    rows = []
    for key in keys:
        cells = [setting(found[key]) if key in found else "-" for found in flat]
        if len(set(cells)) > 1 and key not in OWN:
            rows.append([key, *cells])
    return ["setting", *(run.name for run in runs)], rows


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of everything that is not a mapping; an empty one is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def retrofit_rows(run: RunData) -> list[list[str]]:
    """What `retrofit.json` says of the replaced layers."""
    return [[key, setting(value)] for key, value in flatten(run.retrofit or {})]


def _last(lines: Sequence[Line], key: str) -> float | None:
    return lines[-1].get(key) if lines else None


def _peak(run: RunData) -> float | None:
    known = [line["peak_memory"] for line in run.steps if line.get("peak_memory")]
    return max(known) / 1e9 if known else None


def _energy(run: RunData) -> str:
    joules = run.history.joules
    return "unknown" if not joules else f"{number(joules / 3.6e6)} kWh"


def _budget(run: RunData) -> str:
    none = "unknown" if run.config is None else "none"
    return ", ".join(show(cap, limit) for cap, limit in caps(run).items()) or none


def _told(run: RunData, key: str) -> str:
    return number(run.told(key))

"""What of a ledger line is drawn, and under which name: one list for all sinks and dashboards.

Names are GROUP/NAME; W&B and TensorBoard show a section for each group. Metrics of single layers
keep their number: `groves/3.load_cv` beside the mean over layers, `groves/load_cv`.
"""

from collections.abc import Mapping
from typing import Any

from kalmagrove.track.phases import STAGES, TRAINING

AXES = ("tokens", "usd", "hours")  # logged with every point; hours of wall clock, all sessions

EITHER = {
    "usd": "cost/usd",
    "device_seconds": "cost/device_seconds",
}
STEP = EITHER | {
    "loss": "loss/train",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped": "optim/skipped",
    "step": "optim/step",
    "usd_projected": "cost/usd_projected",
    "joules": "cost/joules",
    "seconds_left": "cost/seconds_left",
    "tokens_per_s": "throughput/tokens_per_s",
    "tokens_per_s_device": "throughput/tokens_per_s_device",
    "mfu": "throughput/mfu",
    "hfu": "throughput/hfu",
    "step_seconds": "throughput/step_seconds",
    "rank_seconds_min": "ranks/seconds_min",
    "rank_seconds_mean": "ranks/seconds_mean",
    "rank_seconds_max": "ranks/seconds_max",
    "slowest_rank": "ranks/slowest",
    "peak_memory": "memory/peak",
    "reserved_memory": "memory/reserved",
}
EVAL = EITHER | {"val_loss": "eval/loss", "val_bits_per_byte": "eval/bits_per_byte"}
LINES = {"step": STEP, "eval": EVAL}

# Dictionaries of a step line: the group of what they hold. `TRAINING`, `COMM` and `STAGES` are what
# there is.
NESTED = {"seconds_split": "phases", "comm": "comm", "phase_joules": "energy"}
COMM = ("alltoall_bytes", "alltoall_seconds")  # of a step: not about the model
# Metrics of the model, by the last part of their names; `model/` takes those not listed.
MODEL = {
    "aux_loss": "loss/aux_loss",
    "load_cv": "groves/load_cv",
    "load_max": "groves/load_max",
    "gate_mean": "groves/gate_mean",
    "gate_std": "groves/gate_std",
    "out_of_range": "edges/out_of_range",
    "kept_share": "edges/kept_share",
    "dead_edges": "edges/dead_edges",
    "time_constant_mean": "attention/time_constant_mean",
    "time_constant_max": "attention/time_constant_max",
}
# Made of the others: what a token has cost so far, and the losses over dollars.
PER_TOKEN = {
    "usd": ("cost/usd_per_million_tokens", 1e6),
    "joules": ("cost/joules_per_token", 1.0),
}
BY_USD = {"loss": "by_usd/train_loss", "val_loss": "by_usd/eval_loss"}

NAMES = frozenset(
    [*STEP.values(), *EVAL.values(), *MODEL.values(), *BY_USD.values()]
    + [name for name, _ in PER_TOKEN.values()]
    + [f"phases/{name}" for name in TRAINING]
    + [f"comm/{name}" for name in COMM]
    + [f"energy/{name}" for name in STAGES]
)
GROUPS = tuple(sorted({name.partition("/")[0] for name in NAMES} | {"model"}))


def axis_of(group: str) -> str:
    """What a group is drawn over, unless a panel says otherwise."""
    return "usd" if group == "by_usd" else "tokens"


def charted(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a ledger line, with those of `AXES`; empty if it is no measurement."""
    names = LINES.get(line["event"])
    if names is None:
        return {}
    found = {name: line.get(key) for key, name in names.items()}
    for key, group in NESTED.items():
        found |= {f"{group}/{name}": value for name, value in line.get(key, {}).items()}
    for key, value in line.get("model", {}).items():
        layer, dot, last = key.rpartition(".")
        group, _, name = MODEL.get(last, f"model/{last}").partition("/")
        found[f"{group}/{layer}{dot}{name}"] = value
    found |= {name: _per_token(line, key, unit) for key, (name, unit) in PER_TOKEN.items()}
    if line.get("usd") is not None:
        found |= {name: line.get(key) for key, name in BY_USD.items() if key in names}
    seconds = line.get("wall_seconds")
    found |= {"tokens": line["tokens"], "usd": line.get("usd")}
    found["hours"] = None if seconds is None else seconds / 3600
    return {name: value for name, value in found.items() if value is not None}


def _per_token(line: Mapping[str, Any], key: str, unit: float) -> float | None:
    amount = line.get(key)
    return amount * unit / line["tokens"] if amount is not None and line["tokens"] else None

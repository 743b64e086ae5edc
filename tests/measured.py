"""The measured trainings of the repository's result files, each beside its prediction.

`python -m tests.measured` prints the tables of docs/cost.md.
"""

import copy
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from kalmagrove.cli.bench_lengths import DEFAULTS, contenders
from kalmagrove.cli.compose import compose_tree
from kalmagrove.config import Run, load
from kalmagrove.plan import HostTimes, Prediction, predicted
from kalmagrove.plan.efficiency import TABLE, machine_of

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "kernels/bench/results"
# What a commit before the kernels of ADA, or before all kernels, ran.
BEFORE = {
    "164da1b": ["model.attention.ada.form=chunked"],
    "133198c": ["model.attention.ada.form=chunked", "model.backend=reference"],
    "7363eac": ["model.attention.ada.form=chunked", "model.backend=reference"],
}


# Whose norms kept their inputs in fp32, not in the type of the weights.
WIDE_NORMS = {
    "164da1b", "133198c", "7363eac", "1b550a9", "35ba44d", "5f85ca0", "f49308b", "56bda0d",
    "ab2374a", "f64f8a6",
}  # fmt: skip
# What the plan took for those: fitted to the first and the last file of `rows`.
WIDE = {"optimizer": 122.0, "stream": 180.0, "softmax": 269.0, "step": 0.015}


class Row(NamedTuple):
    group: str
    name: str
    prediction: Prediction
    predicted_bytes: int  # of that commit
    seconds: float  # of a step, median
    peak_bytes: int

    @property
    def time_error(self) -> float:
        return self.prediction.step_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float:
        return self.predicted_bytes / self.peak_bytes - 1


def rows() -> Iterator[Row]:
    for path in (
        BENCH / "kan_1b_h200_2026-11-27.json",
        BENCH / "kan_1b_h200_2026-11-22.json",
        ROOT / "docs/results/layouts-2xh200.json",
    ):
        for record in json.loads(path.read_text())["runs"]:
            yield from _layouts(path.stem, record)
    yield from _lengths(BENCH / "lengths_h200_2026-11-27.json")


def unfitted() -> Iterator[Row]:
    """Trainings whose memory nothing was fitted to; their steps were slower than today's code."""
    for record in json.loads((ROOT / "docs/results/plan-2xh200.json").read_text())["runs"]:
        yield from _layouts(record["name"], record)


def fitted() -> Iterator[Row]:
    """Those that today's numbers of norms and rotations come from."""
    for record in json.loads((ROOT / "docs/results/host-2xh100.json").read_text())["fitted"]:
        yield from _layouts("fitted", record)


def on_the_spot() -> Iterator[Row]:
    """Trainings predicted with the host's times that were measured there: nothing was fitted."""
    for name in ("host-h200.json", "host-2xh200.json", "host-h100.json", "host-2xh100.json"):
        for record in json.loads((ROOT / "docs/results" / name).read_text())["runs"]:
            if "host" in record:
                host = HostTimes.of(record["host"], record["name"])
                series = record.get("series", record["commit"])
                yield from _layouts(f"{series}: {record['name']}", record, host)


def _layouts(group: str, record: dict[str, Any], host: HostTimes | None = None) -> Iterator[Row]:
    words = [word for word in record["command"].split()[3:] if "=" in word]
    kinds = ("ffn=", "attention=", "model.backend=")
    chosen = [word for word in words if word.startswith(kinds)]
    words += BEFORE.get(record["commit"], [])
    tree = compose_tree("train", words)
    for layout in record["layouts"]:
        if "failed" in layout:
            continue
        run = load(_with(tree, layout["overrides"]))
        name = ", ".join([*chosen, layout["layout"]])
        yield _row(group, name, run, record, record["ranks"], layout, host)


def _with(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A layout's `section.key=value`, without composing anew: numbers and booleans."""
    changed = copy.deepcopy(tree)
    for override in overrides:
        key, _, value = override.partition("=")
        section, name = key.split(".")
        changed[section][name] = json.loads(value)
    return changed


def _lengths(path: Path) -> Iterator[Row]:
    first = {
        contender.attention: contender.first
        for contender in contenders(["ada", "hybrid", "softmax"], (1024,), 131072, DEFAULTS)
    }
    file = json.loads(path.read_text())
    for record in file["records"]:
        name, length = record["attention"], record["length"]
        run = first[name]
        data = run.data.model_copy(update={"seq_len": length})
        batch = run.batch.model_copy(update={"micro": 131072 // length})
        run = run.model_copy(update={"data": data, "batch": batch})
        yield _row(path.stem, f"{name}, rows of {length:,}", run, file["header"], 1, record)


def _row(
    group: str,
    name: str,
    run: Run,
    record: dict[str, Any],
    ranks: int,
    found: dict[str, Any],
    host: HostTimes | None = None,
) -> Row:
    cluster = machine_of(record["gpu"], ranks, None)
    assert cluster is not None
    wide = record["commit"] in WIDE_NORMS
    then = {name: TABLE[name]._replace(value=value) for name, value in WIDE.items() if wide}
    with mock.patch.dict(TABLE, then):
        prediction = predicted(run, cluster, run.batch.tokens, host)
    bytes_ = prediction.peak_bytes + (_wider_norms(run) if wide else 0)
    seconds = statistics.median(found["step_seconds"])
    return Row(group, name, prediction, bytes_, seconds, found["peak_bytes"])


def _wider_norms(run: Run) -> int:
    """Bytes that norms kept more in fp32 than in bf16; none if blocks are computed again."""
    if run.engine.activation_checkpointing:
        return 0
    model, layout, soft = run.model, run.parallel, run.model.attention.softmax
    stream = 2 * model.d_model / (layout.tp if layout.sequence else 1)
    heads = (soft.heads + soft.kv_heads) * (soft.head_dim or model.d_model // soft.heads)
    attending = sum(model.attention_kind(i) == "softmax" for i in range(model.layers))
    numbers = model.layers * stream + attending * soft.qk_norm * heads / layout.tp
    return round(2 * numbers * run.batch.micro * run.data.seq_len / layout.cp)


if __name__ == "__main__":
    for row in itertools.chain(rows(), unfitted(), fitted(), on_the_spot()):
        print(
            f"| {row.group} | {row.name} | {row.seconds * 1e3:,.0f} | "
            f"{row.prediction.step_seconds * 1e3:,.0f} | {row.time_error:+.1%} | "
            f"{row.peak_bytes / 1e9:.1f} | {row.predicted_bytes / 1e9:.1f} | "
            f"{row.memory_error:+.1%} |"
        )

"""Which layouts of a run fit on a cluster, and which of them is fastest (and so cheapest)."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from kalmagrove.config import Cluster, ConfigError, Run
from kalmagrove.config.layout import check_layout
from kalmagrove.plan.host import HostTimes
from kalmagrove.plan.prediction import Prediction, memory_of, predicted, usable_bytes

MICRO = (32, 16, 8, 4, 2, 1)  # rows a rank holds at once


class Refusal(NamedTuple):
    layout: str
    reason: str
    error: ConfigError | None = None  # the rule that it breaks; None: it is too large


class Search(NamedTuple):
    """Predictions that fit, fastest first; and what was refused, the nearest to fitting first."""

    found: list[Prediction]
    refused: list[Refusal]


def search(run: Run, cluster: Cluster, tokens: int, host: HostTimes | None = None) -> Search:
    """Vary tp, cp (tp x cp within a machine), ep, ZeRO, activation checkpointing and the
    micro-batch, of which the largest that fits is taken. cp is no larger than it must be: it saves
    memory of a row and costs time. Where nothing fits, rows are split over machines too.
    `host`: as for `predicted`.
    """
    result = _within(min(cluster.gpus, cluster.gpus_per_node), run, cluster, tokens, host)
    if result.found or cluster.gpus <= cluster.gpus_per_node:
        return result
    return _within(cluster.gpus, run, cluster, tokens, host)


def given(run: Run, cluster: Cluster, tokens: int, host: HostTimes | None = None) -> Search:
    """The layout of `run` alone. Raises ConfigError if it does not go over the cluster's GPUs."""
    one = predicted(run, cluster, tokens, host)
    return Search([one], []) if one.fits else Search([], [_too_large(run, one.memory, cluster)])


def _within(reach: int, run: Run, cluster: Cluster, tokens: int, host: HostTimes | None) -> Search:
    """Of layouts with at most `reach` ranks that share a row."""
    found, large, refused = [], [], []
    for first in _layouts(run, cluster):
        for cp in _powers(cluster.gpus):
            if cp * first.parallel.tp > reach:
                break
            layout = _with_cp(first, cp)
            try:
                check_layout(layout)
                sizes = [_with_micro(layout, micro) for micro in _micros(layout, cluster)]
            except ConfigError as error:
                refused.append(Refusal(describe(layout), str(error), error))
                if error.key != "batch.tokens":  # for which fewer ranks may read different rows
                    break
                continue
            least = memory_of(sizes[-1], cluster)
            if sum(least.values()) <= usable_bytes(cluster):
                one = next(size for size in sizes if _bytes(size, cluster) <= usable_bytes(cluster))
            elif _bytes(sizes[0], cluster) <= usable_bytes(cluster):
                one = sizes[0]  # the whole step at once: ZeRO 2 need not hold sums
            else:
                large.append((sum(least.values()), _too_large(sizes[-1], least, cluster)))
                continue
            found.append(predicted(one, cluster, tokens, host))
            break
    found.sort(key=lambda prediction: prediction.step_seconds)
    large.sort(key=lambda sized: sized[0])
    return Search(found, [refusal for _, refusal in large] + refused)


def describe(run: Run) -> str:
    layout = run.parallel
    words = [f"tp {layout.tp}", f"ep {layout.ep}", f"ZeRO {run.zero.stage}"]
    if layout.cp > 1:
        words.insert(1, f"cp {layout.cp}")
    words.append(f"micro {run.batch.micro}")
    if run.engine.activation_checkpointing:
        words.append("checkpointing")
    return ", ".join(words)


def _layouts(run: Run, cluster: Cluster) -> Iterator[Run]:
    """All that might go, with cp 1; whether they do is checked with each."""
    node = min(cluster.gpus, cluster.gpus_per_node)
    kinds = {run.model.ffn_kind(i) for i in range(run.model.layers)}
    experts = _powers(cluster.gpus) if kinds & {"moe", "grove"} else [1]
    stages = [1, 2, 3] if cluster.gpus > 1 else [1]
    if run.optim.kind == "muon":
        stages = [stage for stage in stages if stage < 3]  # it must see whole matrices
    for tp, ep, stage, again in itertools.product(_powers(node), experts, stages, (False, True)):
        update = {"tp": tp, "cp": 1, "ep": ep, "sequence": tp > 1}
        yield run.model_copy(
            update={
                "parallel": run.parallel.model_copy(update=update),
                "zero": run.zero.model_copy(update={"stage": stage}),
                "engine": run.engine.model_copy(update={"activation_checkpointing": again}),
            }
        )


def _with_cp(run: Run, cp: int) -> Run:
    return run.model_copy(update={"parallel": run.parallel.model_copy(update={"cp": cp})})


def _micros(run: Run, cluster: Cluster) -> list[int]:
    """Sizes of which the step is a multiple, largest first.

    Raises:
        ConfigError: if there is none, or the layout does not go over the GPUs.
    """
    _with_micro(run, 1).check_world(cluster.gpus)
    unit = run.data.seq_len * run.data_parallel(cluster.gpus)
    return [micro for micro in MICRO if run.batch.tokens % (unit * micro) == 0]


def _with_micro(run: Run, micro: int) -> Run:
    return run.model_copy(update={"batch": run.batch.model_copy(update={"micro": micro})})


def _bytes(run: Run, cluster: Cluster) -> int:
    return sum(memory_of(run, cluster).values())


def _too_large(run: Run, memory: dict[str, int], cluster: Cluster) -> Refusal:
    """Names the largest part. What is needed is rounded up, and what there is down."""
    name = max(memory, key=lambda part: memory[part])
    return Refusal(
        describe(run),
        f"needs {math.ceil(sum(memory.values()) / 1e8) / 10:,.1f} GB of a GPU's "
        f"{math.floor(usable_bytes(cluster) / 1e8) / 10:,.1f} usable "
        f"({name} {memory[name] / 1e9:,.1f} GB)",
    )


def _powers(whole: int) -> list[int]:
    return [2**i for i in range(whole.bit_length()) if whole % 2**i == 0]

"""Which layouts of a run fit on a cluster, and which of them is fastest (and so cheapest)."""

import itertools
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


class Search(NamedTuple):
    """Predictions that fit, fastest first; and what was refused, the nearest to fitting first."""

    found: list[Prediction]
    refused: list[Refusal]


def search(run: Run, cluster: Cluster, tokens: int, host: HostTimes | None = None) -> Search:
    """Vary tp (within a machine), ep, ZeRO, activation checkpointing and the micro-batch, of which
    the largest that fits is taken. cp stays as it is given: it is for rows that one GPU cannot
    hold. `host`: as for `predicted`.
    """
    found, large, refused = [], [], []
    for layout in _layouts(run, cluster):
        try:
            check_layout(layout)
            sizes = [_with_micro(layout, micro) for micro in _micros(layout, cluster)]
            fitting = next(
                (one for one in sizes if _bytes(one, cluster) <= usable_bytes(cluster)), None
            )
            if fitting is not None:
                found.append(predicted(fitting, cluster, tokens, host))
            else:
                large.append((_bytes(sizes[-1], cluster), _too_large(sizes[-1], cluster)))
        except ConfigError as error:
            refused.append(Refusal(describe(layout), str(error)))
    found.sort(key=lambda prediction: prediction.step_seconds)
    return Search(found, [refusal for _, refusal in sorted(large)] + refused)


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
    """All that might go; whether they do is checked with each."""
    node = min(cluster.gpus, cluster.gpus_per_node)
    kinds = {run.model.ffn_kind(i) for i in range(run.model.layers)}
    experts = _powers(cluster.gpus) if kinds & {"moe", "grove"} else [1]
    stages = (1, 2, 3) if cluster.gpus > 1 else (1,)
    for tp, ep, stage, again in itertools.product(_powers(node), experts, stages, (False, True)):
        update = {"tp": tp, "ep": ep, "sequence": tp > 1}
        yield run.model_copy(
            update={
                "parallel": run.parallel.model_copy(update=update),
                "zero": run.zero.model_copy(update={"stage": stage}),
                "engine": run.engine.model_copy(update={"activation_checkpointing": again}),
            }
        )


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


def _too_large(run: Run, cluster: Cluster) -> Refusal:
    """Names the largest part."""
    memory = memory_of(run, cluster)
    name = max(memory, key=lambda part: memory[part])
    return Refusal(
        describe(run),
        f"needs {sum(memory.values()) / 1e9:,.0f} GB of a GPU's "
        f"{usable_bytes(cluster) / 1e9:,.0f} usable ({name} {memory[name] / 1e9:,.0f} GB)",
    )


def _powers(whole: int) -> list[int]:
    return [2**i for i in range(whole.bit_length()) if whole % 2**i == 0]

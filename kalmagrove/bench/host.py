"""What a step costs the host, by kind of layer and layout: `kalmagrove bench host`.

Models of two and of eight layers of a kind, as wide as the run's, take steps of so few tokens that
the GPU waits for the host all the time. What the two differ by is a layer's; the plan multiplies.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from kalmagrove.bench.layouts import Layout, in_turn, random_batches
from kalmagrove.config import Run
from kalmagrove.config.counts import parameter_count
from kalmagrove.config.layout import UsedLayout
from kalmagrove.engine import build_engine, connect, disconnect
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups, all_reduce_max, barrier
from kalmagrove.track.phases import ALLTOALL

SHALLOW, DEEP = 2, 8  # layers
ROW = 2048  # tokens of a rank: enough for the kernels of real steps, few enough that the GPU waits
WARMUP = 3
PASSES = ("forward", "backward", ALLTOALL)


def run_all(
    runs: list[tuple[Layout, Run | str]], steps: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure every layout in this process and its fellows.

    Args:
        runs: with each layout its run, `model.vocab_size` known; or why there is none.
        steps: timed ones of each model, after three that are not.
        keep: given on rank 0 all that is known so far, after each layout.
    """
    first = next(run for _, run in runs if isinstance(run, Run))
    device = connect(first)
    result = {
        "ranks": dist.get_world_size(),
        "parameters": parameter_count(first.model).total,
        "compile": first.engine.compile,
        "row": ROW,
        "layers": [SHALLOW, DEEP],
    }

    def one(run: Run, groups: Groups, _: Layout) -> dict[str, Any]:
        kinds = dict.fromkeys(run.model.layer_kinds())
        measured = [measure(run, groups, *kind, steps) for kind in kinds]
        return {"used": UsedLayout.of(run, groups.world.size)._asdict(), "kinds": measured}

    for records in in_turn(runs, device, one):
        if dist.get_rank() == 0:
            for text in lines(records[-1]):
                print(text, flush=True)
            keep(result | {"layouts": records})
    disconnect()


def lines(record: dict[str, Any]) -> list[str]:
    if "failed" in record:
        return [f"{record['layout']:24} {record['failed']}"]
    return [
        f"{record['layout']:24} {kind['attention']} + {kind['ffn']}: "
        f"a layer {1e3 * kind['layer']:.2f} ms, the rest {1e3 * kind['rest']:.2f} ms; optimizer "
        f"{1e3 * kind['optimizer_layer']:.2f} ms a layer and {1e3 * kind['optimizer_rest']:.2f} ms"
        for kind in record["kinds"]
    ]


def measure(run: Run, groups: Groups, attention: str, ffn: str, steps: int) -> dict[str, Any]:
    """Seconds of the host: `layer`, of one layer's forward and backward pass of a micro-batch;
    `rest`, of those passes outside of layers; `forward_layer` and `forward_rest`, of the forward
    pass alone, without all-to-alls; `optimizer_layer` and `optimizer_rest`, of the rest of a step.
    """
    taken = {}
    for layers in (SHALLOW, DEEP):
        taken[layers] = _step(_narrowed(run, groups, attention, ffn, layers), groups, steps)
        gc.collect()
    found: dict[str, Any] = {"attention": attention, "ffn": ffn}
    for i, name in enumerate(("", "forward_", "optimizer_")):
        shallow, deep = taken[SHALLOW][i], taken[DEEP][i]
        layer = (deep - shallow) / (DEEP - SHALLOW)
        found |= {name + "layer": layer, name + "rest": shallow - SHALLOW * layer}
    return found


def _narrowed(run: Run, groups: Groups, attention: str, ffn: str, layers: int) -> Run:
    """The run with layers of one kind, and one micro-batch of one row a step."""
    model = run.model
    row = ROW * run.parallel.cp
    changes = {
        "model": {
            "layers": layers,
            "attention": model.attention.model_copy(update={"pattern": (attention,)}),
            "ffn": model.ffn.model_copy(update={"pattern": (ffn,)}),
        },
        "data": {"seq_len": row},
        "batch": {"micro": 1, "tokens": row * groups.dp.size},
    }
    return run.model_copy(
        update={key: getattr(run, key).model_copy(update=own) for key, own in changes.items()}
    )


def _step(run: Run, groups: Groups, steps: int) -> list[float]:
    """Seconds of a step's forward and backward passes, of the forward pass alone, and of the rest
    of the step: medians, the slowest rank's.
    """
    torch.manual_seed(run.seed)
    engine = build_engine(build_model(run.model, groups), run, groups)
    batches = random_batches(run, groups)
    taken = []
    before = engine.timer.seconds()
    for number in range(WARMUP + steps):
        batch = next(batches)
        barrier(groups.world)
        begun = time.perf_counter()
        engine.timer.begin()
        engine.train_step([batch], number)
        after = engine.timer.seconds()  # waits for the GPU
        whole = time.perf_counter() - begun
        spent = {phase: after.get(phase, 0.0) - before.get(phase, 0.0) for phase in PASSES}
        passes = sum(spent.values())
        taken.append((passes, spent["forward"], whole - passes))
        before = after
    medians = [statistics.median(column) for column in zip(*taken[WARMUP:], strict=True)]
    slowest = all_reduce_max(torch.tensor(medians, device=groups.device), groups.world)
    seconds: list[float] = slowest.tolist()
    return seconds

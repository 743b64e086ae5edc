"""The matrix of layouts that must all train like one process, and the worker that runs them.

A case is a layout (tp, ep, cp, sequence) with a ZeRO stage, a precision and a way to compute.
"""

import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalmagrove.config import Run
from kalmagrove.engine import build_engine, connect, disconnect
from kalmagrove.engine.compat import master_weight
from kalmagrove.engine.optim import build_optimizer
from kalmagrove.engine.refit import refit_grids
from kalmagrove.engine.schedule import lr_factor
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups, all_gather_object, all_reduce_sum, module_shards
from tests.dist.serving import Layouts
from tests.dist.toy import ROWS, Rows, real_run, toy_run

STEPS = 4
MODEL = [
    "attention=hybrid",
    "model.layers=4",
    "model.attention.pattern=[ada,softmax,mla,ada]",
    "model.ffn.pattern=[grove,kan,moe,dense]",
    "model.attention.softmax.kv_heads=2",
    "model.attention.ada.qk_rank=[[14,8],[8,8]]",  # the first layer's pieces differ in size
    "model.attention.ada.taps=3",
    "model.ffn.kan.edge={range: [-1.0, 1.0], refit_above: 0.0}",
    "model.ffn.grove.kan.edge={range: [-1.0, 1.0], refit_above: 0.0}",
    "model.vocab_size=40",
    "optim.lr=0.1",
    "optim.clip=0.5",
    "batch.micro=1",
]
Case = dict[str, Any]  # tp, ep, cp, sequence, and overrides of the run


def case(
    stage: int, *more: str, tp: int = 1, ep: int = 1, cp: int = 1, sequence: bool = False
) -> Case:
    return {
        "tp": tp,
        "ep": ep,
        "cp": cp,
        "sequence": sequence,
        "overrides": [f"zero.stage={stage}", *more],
    }


def name_of(chosen: Case) -> str:
    layout = "x".join(f"{key}{chosen[key]}" for key in ("tp", "ep", "cp"))
    return " ".join([layout + ("s" if chosen["sequence"] else ""), *chosen["overrides"]])


CHECKPOINTED = "engine.activation_checkpointing=true"
BF16 = "engine.precision=bf16"


def whole_matrix(ranks: int) -> list[Case]:
    """TP {1, 2} x EP {1, 2, 4} x CP {1, 2} x ZeRO {0, 1, 2, 3}, in fp32 and bf16."""
    cases = []
    sizes = itertools.product((1, 2), (1, 2, 4), (1, 2))
    for tp, ep, cp in sizes:
        if ranks % (tp * cp) or ranks % ep:
            continue
        for stage in (0, 1, 2, 3):
            layout: Any = {"tp": tp, "ep": ep, "cp": cp}
            cases.append(case(stage, **layout))
            cases.append(case(stage, CHECKPOINTED, "optim.clip=0", **layout))
            if stage:
                cases.append(case(stage, BF16, **layout))
            if tp > 1:
                cases.append(case(stage, **layout, sequence=True))
    return cases


# On two ranks: each dimension and stage
PAIRS = [
    case(0, tp=2, ep=2),
    case(1, tp=2),
    case(2, CHECKPOINTED, tp=2, ep=2, sequence=True),
    case(3, ep=2),
    case(2, cp=2),
    case(3, BF16, tp=2),
    case(1, BF16, tp=2, ep=2),
    case(2, BF16, cp=2),
]
# What every change is tested with, on 4 ranks: each dimension and stage, the folded layouts.
REPRESENTATIVE = [
    case(1, tp=2, ep=2),
    case(2, CHECKPOINTED, tp=2, ep=4),
    case(3, tp=2, ep=2),
    case(0, ep=2),
    case(2, tp=2, ep=2, cp=2, sequence=True),
    case(3, BF16, ep=4),
]


def run_of(chosen: Case) -> Run:
    layout = [f"parallel.{key}={chosen[key]}" for key in ("tp", "ep", "cp", "sequence")]
    return real_run([*MODEL, *layout, *chosen["overrides"]])


@functools.cache
def reference(clip: float) -> tuple[list[tuple[float, float]], list[dict[str, Tensor]]]:
    """One process of plain torch in fp32.

    Returns losses and norms, and as dictionaries the weights before and after the first step and
    the routers' biases after STEPS steps.
    """
    run = real_run([*MODEL, f"optim.clip={clip}"])
    torch.manual_seed(0)
    model = build_model(run.model, Groups.single())
    optimizer = build_optimizer(model, run.optim, torch.device("cpu"))
    rows, losses = Rows(ROWS, 0, 1), []
    weights = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    for step in range(STEPS + 1):
        output = model(**next(rows))
        optimizer.zero_grad()
        output.loss.backward()
        limit = run.optim.clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, run.steps, run.schedule)
        optimizer.step()
        model.balance(Groups.single())
        losses.append((output.nll.item(), norm.item()))
        if step == 0:
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if step == STEPS - 1:
            biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("bias")}
    return losses, [*weights, biases]


def train(chosen: Case, groups: Groups) -> dict[str, Any]:
    """Losses and norms of a layout, and how far its gradients are from the reference's.

    refitted: the grids refitted after these steps, and loss and norm of the step that follows.
    errors: for each parameter |g - g'| / |g'| of the first step's gradient, the worst over ranks
    (the first step of SGD moves a weight along its gradient, up to the weight's rounding). biases:
    the largest difference of the routers' biases before the refit, which the reference has not.
    """
    run = run_of(chosen)
    torch.manual_seed(0)
    model = build_model(run.model, groups)
    shards = module_shards(model)
    _, (before, after, biases) = reference(run.optim.clip)

    def own(name: str, whole: Tensor) -> Tensor:
        return shards[name].cut(whole) if name in shards else whole

    for name, p in model.named_parameters():
        assert torch.equal(p, own(name, before[name])), f"{name} starts differently"
    engine = build_engine(model, run, groups)
    rows = Rows(run.batch.micro, groups.dp.rank, groups.dp.size)
    # bf16 has rounded it.
    start = {name: master_weight(p).cpu() for name, p in model.named_parameters()}
    found, errors = [], {}
    for step in range(STEPS + 1):
        batches = [next(rows) for _ in range(engine.accumulation)]
        loss, norm = engine.train_step(batches, step)
        mean = float(all_reduce_sum(loss.clone(), groups.world)) / groups.world.size
        found.append((mean, float(norm)))
        if step == STEPS - 1:
            drift = {
                name: float((b.cpu() - biases[name]).abs().max())
                for name, b in model.named_buffers()
                if name in biases
            }
            refitted = refit_grids(engine, batches[0])
        if step == 0:
            for name, p in model.named_parameters():
                moved = master_weight(p).cpu() - start[name]
                expected = own(name, after[name]) - own(name, before[name])
                rounding = 1e-7 * start[name].norm()
                gap = ((moved - expected).norm() - rounding).clamp(min=0) / expected.norm()
                errors[name] = float(gap)
    everywhere = all_gather_object((errors, drift), groups.world)
    assert all(set(r) == set(refitted) for r in all_gather_object(refitted, groups.world))
    return {
        "steps": found[:STEPS],
        "refitted": [sorted(refitted), found[STEPS]],
        "errors": {name: max(e[name] for e, _ in everywhere) for name in errors},
        "biases": {name: max(d[name] for _, d in everywhere) for name in drift},
    }


def main() -> None:
    worker, arguments, result_path = sys.argv[1:]
    assert worker == "matrix"
    device = connect(toy_run())
    result: dict[str, Any] = {}
    layouts = Layouts(device)
    for chosen in json.loads(arguments)["cases"]:
        groups = layouts.groups(run_of(chosen).parallel)
        result[name_of(chosen)] = train(chosen, groups)
        if groups.is_main:
            print(name_of(chosen), result[name_of(chosen)]["steps"], flush=True)
    if torch.distributed.get_rank() == 0:
        losses = {str(clip): reference(clip)[0] for clip in (0.0, 0.5)}
        Path(result_path).write_text(json.dumps({"cases": result, "reference": losses}))
    disconnect()


if __name__ == "__main__":
    main()

"""Legs of runs: load a checkpoint of any layout, train on, save; started by `test_reshape`."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from kalmagrove.config import CheckpointError, Run
from kalmagrove.engine import build_engine, connect, disconnect, resume, save
from kalmagrove.engine.checkpoint_files import (
    INDEX_FILE,
    STATE_FILE,
    checksum,
    read_state,
    write_json,
)
from kalmagrove.engine.checkpoint_tools import convert, newest
from kalmagrove.engine.compat import gathered, master_weight
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups, all_gather_object, all_reduce_sum, barrier
from tests.dist.matrix import MODEL
from tests.dist.serving import Layouts
from tests.dist.toy import Recorder, Rows, Toy, real_run, toy_run

STEPS = 6
Leg = dict[str, Any]  # toy: sections, or real: overrides; from, into, until, seed, counts; alter


def run_of(leg: Leg) -> Run:
    resumed = leg.get("from") or "never"
    if "toy" in leg:
        return toy_run(**{"steps": STEPS, "checkpoint": {"resume": resumed}, **leg["toy"]})
    overrides = [f"steps={STEPS}", f"checkpoint.resume={resumed}", *leg["real"]]
    return real_run([*MODEL, "optim=adamw", "optim.lr=0.01", *overrides])


def travel(leg: Leg, run: Run, groups: Groups) -> dict[str, Any]:
    """One leg: losses by step, and what the model and the optimizer hold at its beginning."""
    torch.manual_seed(leg.get("seed", 0))
    model = Toy() if "toy" in leg else build_model(run.model, groups)
    engine = build_engine(model, run, groups)
    rows = Rows(run.batch.micro, groups.dp.rank, groups.dp.size)
    try:
        state = resume(engine, rows, Recorder(groups), run, Path(leg["into"]))
    except CheckpointError as error:
        return {"error": all_gather_object(str(error), groups.world)}
    facts = {
        "start": state.step,
        "rounded": all(_is_rounded(p) for p in model.parameters()),
        "counts": all_gather_object(_count(model), groups.world),
        "random": all_gather_object(torch.rand(()).item(), groups.world),
    }
    losses: dict[int, float] = {}
    while state.step < leg["until"]:
        batches = [next(rows) for _ in range(engine.accumulation)]
        loss, _ = engine.train_step(batches, state.step)
        state.step += 1
        mean = all_reduce_sum(loss.clone(), groups.world) / groups.world.size
        losses[state.step] = float(mean)
    if "counts" in leg:  # as after a step that was not finite
        for name, buffer in model.named_buffers():
            if name.endswith(".load"):
                buffer.fill_(groups.world.rank + 1)
    save(engine, rows, Recorder(groups), state)
    return {**facts, "losses": losses}


def alter(folder: Path, source: Path) -> None:
    """Other checkpoints made of one: merged, without states, with a part left out."""
    convert(source, folder / "merged" / source.name)
    convert(source, folder / "weights" / source.name, weights_only=True)
    torn = folder / "torn" / source.name
    shutil.copytree(source, torn)
    tree = json.loads((torn / INDEX_FILE).read_text())
    del tree["blocks.0.u_MRD"]["parts"][1]
    (torn / INDEX_FILE).write_text(json.dumps(tree))
    state = read_state(torn)
    state["files"][INDEX_FILE] = checksum(torn / INDEX_FILE)
    write_json(torn / STATE_FILE, state)


def _is_rounded(parameter: torch.nn.Parameter) -> bool:
    """Whether the model uses what the optimizer holds."""
    master = master_weight(parameter)
    with gathered(parameter) as whole:
        return torch.equal(whole, master.to(whole.dtype))


def _count(model: torch.nn.Module) -> float:
    return sum(float(b.sum()) for name, b in model.named_buffers() if name.endswith(".load"))


def main() -> None:
    worker, arguments, result_path = sys.argv[1:]
    assert worker == "legs"
    device = connect(toy_run())
    layouts, result = Layouts(device), {}
    for leg in json.loads(arguments)["legs"]:
        if "alter" in leg:
            if torch.distributed.get_rank() == 0:
                alter(Path(leg["into"]), newest(Path(leg["alter"])))
            torch.distributed.barrier()
            continue
        run = run_of(leg)
        groups = layouts.groups(run.parallel)
        print(leg["into"], flush=True)
        result[Path(leg["into"]).name] = travel(leg, run, groups)
        barrier(groups.world)
    if torch.distributed.get_rank() == 0:
        Path(result_path).write_text(json.dumps(result))
    disconnect()


if __name__ == "__main__":
    main()

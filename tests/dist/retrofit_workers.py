"""What the processes of the tests of `kalmagrove retrofit` run: runs of it, one after the other."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kalmagrove.cli.compose import compose_tree
from kalmagrove.cli.retrofit import retrofit_on_this_rank
from kalmagrove.config import KalmaGroveError
from kalmagrove.config.attempts import Attempt
from kalmagrove.config.retrofit_run import retrofit_of
from kalmagrove.engine import connect, disconnect
from kalmagrove.parallel import Groups, barrier

FROZEN = "model.layers.0.mlp.up_proj.weight"


def retrofits(common: list[str], runs: dict[str, Any]) -> dict[str, str]:
    """Do `runs`, each a dictionary with `words`; returns what those that failed said.

    start: a run whose checkpoint of step 3 another one begins with, as if it had been interrupted
    there. change: first change a weight of this base that does not train.
    """
    said = {}
    for name, job in runs.items():
        run = retrofit_of(compose_tree("retrofit", [*common, f"name={name}", *job["words"]]))
        world = Groups.init(run.parallel, connect(run)).world
        if world.rank == 0:
            prepare(Path(run.dir), name, job)
        barrier(world)
        try:
            retrofit_on_this_rank(run, Attempt.now(), stay=True)
        except KalmaGroveError as error:
            said[name] = str(error)
    return said


def prepare(runs: Path, name: str, job: dict[str, Any]) -> None:
    if "start" in job:
        step = Path("checkpoints", "step-000003")
        shutil.copytree(runs / job["start"] / step, runs / name / step)
    if "change" in job:
        path = Path(job["change"], "model.safetensors")
        weights = load_file(path)
        weights[FROZEN] += 0.01
        save_file(weights, path, {"format": "pt"})


if __name__ == "__main__":
    worker, arguments, result_path = sys.argv[1:]
    assert worker == "retrofits"
    result = retrofits(**json.loads(arguments))
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(result))
    disconnect()

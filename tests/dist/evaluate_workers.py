"""What the processes of the evaluation test run."""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kalmagrove.config import Suite
from kalmagrove.evaluate.harness import evaluate
from kalmagrove.evaluate.subject import open_model
from kalmagrove.parallel import Group

SUITE = Suite(name="some", tasks=("bbh/navigate", "bbh/snarks", "bbh_generate/navigate"))


def scores(group: Group, folder: str, files: str, corpus: str, out: str) -> dict[str, Any]:
    """Results of a first evaluation, and of a second one that finds all answers."""
    subject = open_model(folder, "cpu")
    settings: dict[str, Any] = {"corpus": corpus, "progress": False, "chat": False}
    first, second = (
        evaluate(subject, SUITE, files=files, out=out, group=group, **settings) for _ in range(2)
    )
    return {"first": first, "second": second, "size": group.size}


if __name__ == "__main__":
    _, arguments, result_path = sys.argv[1:]
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    group = Group.of(dist.group.WORLD)
    result = scores(group, **json.loads(arguments))
    if group.rank == 0:
        Path(result_path).write_text(json.dumps(result))
    dist.destroy_process_group()

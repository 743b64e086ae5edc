"""What worker modules share: the command line that `harness` calls, and changes of layout."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kalmagrove.config import Parallel
from kalmagrove.parallel import Groups


def serve(workers: Mapping[str, Callable[..., Any]]) -> None:
    """Run the worker that the command line names over gloo, without DeepSpeed."""
    worker, arguments, result_path = sys.argv[1:]
    dist.init_process_group("gloo")
    result = workers[worker](**json.loads(arguments))
    if dist.get_rank() == 0:
        Path(result_path).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


class Layouts:
    """The groups of the layout asked for; those of the one before are ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._now: tuple[Parallel, Groups] | None = None

    def groups(self, parallel: Parallel) -> Groups:
        if self._now is None or self._now[0] != parallel:
            if self._now is not None:
                Groups.reset()
            self._now = parallel, Groups.init(parallel, self._device)
        return self._now[1]

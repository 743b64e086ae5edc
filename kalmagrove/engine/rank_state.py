"""What a checkpoint keeps of each rank by itself: random states, and router counts in progress.

Stored by `checkpoint` in the rank's own file, next to its part of the weights.
"""

import json
import random

import numpy as np
import torch

from kalmagrove.engine.engine import Engine
from kalmagrove.engine.fragments import counters
from kalmagrove.engine.tensor_files import Stored, TensorReader
from kalmagrove.engine.tensor_index import key_of

RANK = "rank"  # the tensors' place in the file: "rank/torch", "rank/blocks.0.ffn.router.load"


def rank_state(engine: Engine) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata for the file of this rank."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state()}
    if engine.groups.device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state()
    tensors |= counters(engine.module)
    metadata = {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, np.asarray(keys).tolist(), *rest]),
    }
    stored = {key_of(RANK, name): Stored.of(tensor.clone()) for name, tensor in tensors.items()}
    return stored, metadata


@torch.no_grad()
def load_rank_state(engine: Engine, reader: TensorReader, files: list[str], same: bool) -> None:
    """Take over what this rank saved, or, if the layout is not the `same`, what comes close.

    Random states are then those of the rank with this number, or of the last one. Counts are only
    used summed over the world: all go to the first rank.

    Args:
        files: of all ranks that saved.
    """
    rank = engine.groups.world.rank
    file = files[min(rank, len(files) - 1)]
    metadata = reader.metadata(file)
    version, numbers, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(json.loads(metadata["numpy"])))
    torch.set_rng_state(reader.whole(file, key_of(RANK, "torch")))
    if engine.groups.device.type == "cuda" and key_of(RANK, "cuda") in reader.keys(file):
        torch.cuda.set_rng_state(reader.whole(file, key_of(RANK, "cuda")))
    for name, buffer in counters(engine.module).items():
        sources = [file] if same else files if rank == 0 else []
        buffer.zero_()
        for source in sources:
            buffer += reader.whole(source, key_of(RANK, name)).to(buffer.device)

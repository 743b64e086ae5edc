"""Open a trained model from a run's or checkpoint's folder, without DeepSpeed."""

from pathlib import Path

import torch

from kalmagrove.config import CheckpointError, ConfigError, load
from kalmagrove.data.tokenizer import Tokenizer
from kalmagrove.data.tokenizer import load as load_tokenizer
from kalmagrove.engine import find_checkpoints, load_weights, read_state
from kalmagrove.nn import Transformer, build_model
from kalmagrove.parallel import Groups


def load_trained(folder: Path, device: str = "auto") -> tuple[Transformer, Tokenizer]:
    """The model in evaluation mode, fp32 on CPU and bf16 on GPU, and its tokenizer.

    Args:
        folder: of a run (its newest whole checkpoint is taken) or of one checkpoint.
        device: a torch device, or auto: cuda if there is one.

    Raises:
        CheckpointError: if there is no whole checkpoint, or its tokenizer is missing or another.
        ConfigError: if this machine lacks the device.
    """
    folder = folder.expanduser().resolve()
    found = find_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"run={folder} holds no checkpoint; name the folder of a run (runs/NAME) or of a "
            "checkpoint (runs/NAME/checkpoints/step-000100)"
        )
    chosen = find_device(device)
    state = read_state(found[0])
    run = load(state["run"])
    model = build_model(run.model, Groups.single(chosen))
    load_weights(folder, model)
    model.to(chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32)
    place = found[0].parent.parent / "tokenizer"
    if not place.is_dir():
        raise CheckpointError(f"{place} is missing; a checkpoint stays inside its run's folder")
    tokenizer = load_tokenizer(run.data.tokenizer.kind, place)
    # The fingerprint of the data that was trained on begins with its tokenizer's.
    if not state["batches"]["data"].startswith(tokenizer.fingerprint[:16]):
        raise CheckpointError(f"{place} is not the tokenizer that {found[0]} was trained with")
    return model.eval(), tokenizer


def find_device(name: str) -> torch.device:
    """The torch device; auto: cuda if there is one. Raises ConfigError if this machine lacks it."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError("device", name, f"is not here: {gpus} visible GPUs", "use device=auto")
    return device

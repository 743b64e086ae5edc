"""Saving and resuming: atomic, verified, rotated checkpoints under `RUN/checkpoints/step-000100/`.

Called by `fit` (save) and by the commands (`resume`, `load_weights`). The folder holds DeepSpeed's
files, `rank-R.pt` (random states and buffers of a rank), `model.safetensors` (whole weights, for
anything that is not training) and `state.json` (position, configuration, layout, checksums),
written last. It must be on a file system that all ranks see.
"""

import logging
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kalmagrove.config import CheckpointError, NonFiniteError, Run
from kalmagrove.engine.checkpoint_files import (
    FORMAT,
    STATE_FILE,
    WEIGHTS_FILE,
    checksum,
    differences,
    faults,
    find_checkpoints,
    parameter_digest,
    read_state,
    remove_unfinished,
    rotate,
    set_aside,
    step_folder,
    sync,
    write_json,
)
from kalmagrove.engine.compat import gathered, load_trusted
from kalmagrove.engine.engine import Engine
from kalmagrove.parallel import any_rank, barrier, broadcast_object

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Batches and meters, as far as a checkpoint is concerned. State is plain data (JSON)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class State:
    """Where a run stands."""

    folder: Path  # of the checkpoints
    step: int = 0  # finished steps
    tokens: int = 0  # target positions read, over all ranks
    saved: int | None = None  # step of the newest checkpoint
    resumed: Path | None = None  # the checkpoint the run went on from

    @property
    def newest(self) -> Path | None:
        return None if self.saved is None else step_folder(self.folder, self.saved)


def save(engine: Engine, batches: Stateful, meters: Stateful, state: State) -> tuple[Path, float]:
    """Write the checkpoint of `state.step`; returns its folder and the seconds it took. Collective.

    Everything goes to `step-N.tmp`, is forced to the disk, and is renamed when complete: a kill at
    any moment leaves the checkpoints before it intact.

    Raises:
        NonFiniteError: the weights hold NaN or infinity; nothing is written.
        CheckpointError: a rank could not write (full disk); the unfinished folder is removed.
    """
    begun = time.perf_counter()
    if not engine.weights_are_finite():
        raise NonFiniteError(
            f"the weights at step {state.step} are not finite and are not saved; "
            f"the last good checkpoint is {state.newest or 'none'}; try a lower optim.lr"
        )
    final = step_folder(state.folder, state.step)
    partial = final.with_name(final.name + ".tmp")
    error = _write(engine, batches, meters, state, partial)
    if any_rank(error is not None, engine.groups.world, engine.groups.device):
        reasons = _gather(engine, str(error) if error else None)
        if engine.groups.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        barrier(engine.groups.world)
        reason = next(r for r in reasons if r)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {reason}; "
            f"the last good checkpoint is {state.newest or 'none'}; free space or change dir"
        )
    if engine.groups.is_main:
        if final.exists():  # a resumed run writes the same step again
            final.rename(final.with_name(final.name + ".old"))
        partial.rename(final)
        sync(state.folder)
        remove_unfinished(state.folder)
        rotate(state.folder, engine.run.checkpoint.keep)
    barrier(engine.groups.world)
    state.saved = state.step
    return final, time.perf_counter() - begun


def _write(
    engine: Engine, batches: Stateful, meters: Stateful, state: State, folder: Path
) -> Exception | None:
    """Write this rank's files into `folder`. All ranks pass every collective, whatever fails."""
    files = engine.deepspeed.checkpoint_engine
    files.begin()
    if engine.groups.is_main:
        files.makedirs(str(folder.parent), exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        files.makedirs(str(folder))
    barrier(engine.groups.world)
    engine.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    files.save(_rank_state(engine), str(_rank_file(folder, engine)))
    weights = _whole_weights(engine)
    if engine.groups.is_main and files.error is None:
        try:
            save_file(weights, folder / WEIGHTS_FILE)
            files.written[WEIGHTS_FILE] = checksum(folder / WEIGHTS_FILE)
            sync(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            files.error = error
    written = _gather(engine, files.written)
    tree = {
        **_describe(engine),
        "step": state.step,
        "tokens": state.tokens,
        "nonfinite_total": engine.nonfinite_total,
        "nonfinite_in_row": engine.nonfinite_in_row,
        "batches": batches.state_dict(),
        "meters": meters.state_dict(),
        "files": {name: entry for part in written for name, entry in part.items()},
    }
    if engine.groups.is_main and files.error is None:
        try:
            write_json(folder / STATE_FILE, tree)
            sync(folder)
        except OSError as error:
            files.error = error
    failure: Exception | None = files.error
    return failure


def _gather(engine: Engine, value: Any) -> list[Any]:
    """`value` of every rank, on every rank."""
    world = engine.groups.world
    if world.size == 1:
        return [value]
    box: list[Any] = [None] * world.size
    dist.all_gather_object(box, value, group=world.handle)
    return box


def _describe(engine: Engine) -> dict[str, Any]:
    """What a checkpoint must share with the run that loads it."""
    groups = engine.groups
    return {
        "format": FORMAT,
        "run": engine.run.model_dump(mode="json"),
        "layout": {
            "world_size": groups.world.size,
            "dp_size": groups.dp.size,
            "parallel.tp": groups.tp.size,
            "parallel.ep": groups.ep.size,
            "zero.stage": engine.run.zero.stage,
            "precision": str(engine.dtype).removeprefix("torch."),
        },
        "parameters": parameter_digest(engine.module),
    }


def _rank_file(folder: Path, engine: Engine) -> Path:
    return folder / f"rank-{engine.groups.world.rank}.pt"


def _rank_state(engine: Engine) -> dict[str, Any]:
    """Random states, and the buffers: after a skipped step router loads differ over ranks."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if engine.groups.device.type == "cuda" else None,
        "buffers": {name: b.detach().cpu() for name, b in _persistent_buffers(engine.module)},
    }


def _load_rank_state(engine: Engine, saved: dict[str, Any]) -> None:
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None:
        torch.cuda.set_rng_state(saved["cuda"])
    with torch.no_grad():
        for name, buffer in _persistent_buffers(engine.module):
            buffer.copy_(saved["buffers"][name])


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = set(module.state_dict(keep_vars=True))
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def _whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU of rank 0, gathered one by one. Collective under ZeRO 3."""
    whole: dict[str, Tensor] = {}
    keep = engine.groups.is_main
    for name, parameter in engine.module.named_parameters():
        with gathered(parameter) as tensor:
            if keep:
                whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if keep:
        for name, buffer in _persistent_buffers(engine.module):
            whole[name] = buffer.detach().to("cpu", copy=True).contiguous()
    return whole


def resume(engine: Engine, batches: Stateful, meters: Stateful, run: Run, run_dir: Path) -> State:
    """Go on from the newest whole checkpoint of `run_dir`, with a warning for each that is not.

    A run without one begins where `run.checkpoint.resume` says: at step 0 (auto), or from the
    checkpoint's or run's folder it names. So a command given again continues its own run. Only
    never begins at step 0 whatever is there. Unfinished folders of a killed save are removed;
    checkpoints of `run_dir` later than the one continued are renamed to step-N.aside. Collective.

    Raises:
        CheckpointError: nothing whole was found where something should be; the folder named lies
            in `run_dir`; or the checkpoint is of another model, tokenizer or layout, whose
            differing keys are named.
    """
    state = State(folder=run_dir / "checkpoints")
    if engine.groups.is_main:
        remove_unfinished(state.folder)
    if run.checkpoint.resume == "never":
        _set_aside(engine, state, 0)
        return state
    place = state.folder
    candidates = _candidates(engine, place)
    asked = run.checkpoint.resume != "auto"
    if asked:
        named = Path(run.checkpoint.resume)
        if named.resolve().is_relative_to(run_dir.resolve()):
            raise CheckpointError(
                f"checkpoint.resume={named} lies in the run's own folder, whose newest checkpoint "
                "is continued with checkpoint.resume=auto; to go back to an older one, give the "
                "new run another name"
            )
        if candidates:
            if engine.groups.is_main:
                log.info("the run's own checkpoints are continued, not checkpoint.resume=%s", named)
        else:
            place, candidates = named, _candidates(engine, named)
    for folder in candidates:
        bad = _faults(engine, folder)
        if not bad:
            return _load(engine, batches, meters, state, folder)
        if engine.groups.is_main:
            log.warning("checkpoint %s is damaged and passed over: %s", folder, "; ".join(bad))
    if asked or candidates:
        raise CheckpointError(
            f"checkpoint.resume={run.checkpoint.resume}: there is no whole checkpoint in {place}; "
            "give the folder of another checkpoint or run, or checkpoint.resume=never to begin anew"
        )
    return state


def _candidates(engine: Engine, place: Path) -> list[Path]:
    """The checkpoints that rank 0 sees, on every rank."""
    found = find_checkpoints(place) if engine.groups.is_main else []
    return broadcast_object(found, engine.groups.world)


def _faults(engine: Engine, folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint; each rank reads its share of them."""
    world = engine.groups.world
    found = _gather(engine, faults(folder, world.rank, world.size))
    return [fault for part in found for fault in part]


def _set_aside(engine: Engine, state: State, newer_than: int) -> None:
    if engine.groups.is_main:
        for folder in set_aside(state.folder, newer_than):
            log.warning("a later checkpoint is set aside as %s", folder)
    barrier(engine.groups.world)


def _load(engine: Engine, batches: Stateful, meters: Stateful, state: State, folder: Path) -> State:
    saved = read_state(folder)
    here = {**_describe(engine), "batches": batches.state_dict()}
    differing = differences(saved, here)
    if differing:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this run: {'; '.join(differing)}; use "
            "checkpoint.resume=never, another name, or the settings it was made with"
        )
    engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    engine.restore_hyperparameters()
    _load_rank_state(engine, load_trusted(_rank_file(folder, engine)))
    engine.nonfinite_total = saved["nonfinite_total"]
    engine.nonfinite_in_row = saved["nonfinite_in_row"]
    batches.load_state_dict(saved["batches"])
    meters.load_state_dict(saved["meters"])
    state.step, state.tokens, state.resumed = saved["step"], saved["tokens"], folder
    own = folder.resolve() == step_folder(state.folder, state.step).resolve()
    state.saved = state.step if own else None
    _set_aside(engine, state, state.step if own else 0)
    return state


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Fill `model` from a checkpoint's or run's folder; returns the checkpoint's `state.json`.

    Needs neither torch.distributed nor DeepSpeed, whatever the ZeRO stage was.

    Raises:
        CheckpointError: nothing whole is there, or it holds another model.
    """
    for folder in find_checkpoints(path):
        bad = faults(folder, only=WEIGHTS_FILE)
        if bad:
            log.warning("checkpoint %s is damaged and passed over: %s", folder, "; ".join(bad))
            continue
        weights = load_file(folder / WEIGHTS_FILE)
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        other = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if own != other:
            names = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))
            shown = [f"{n}: checkpoint {other.get(n)}, model {own.get(n)}" for n in names[:5]]
            raise CheckpointError(f"{folder} holds another model: {'; '.join(shown)}")
        model.load_state_dict(weights)
        return read_state(folder)
    raise CheckpointError(f"no whole checkpoint in {path}; give the folder of a run or checkpoint")

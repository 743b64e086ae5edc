"""Saving and resuming: atomic, verified, rotated checkpoints under `RUN/checkpoints/step-000100/`.

Called by `fit` (save) and by the commands (`resume`, `load_weights`). A checkpoint can be loaded by
any number of ranks in any layout, ZeRO stage and precision. Its folder must be on a file system
that all ranks see, and holds

- `shard-R.safetensors`: what rank R alone saves of the fp32 weights and the optimizer's states,
  flat, and its random states;
- `index.json`: which part of which tensor is where;
- `model.safetensors`: whole weights, for anything that is not training;
- `state.json`: position, configuration, layout, checksums; written last.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file
from torch import nn

from kalmagrove.config import CheckpointError, NonFiniteError, Training
from kalmagrove.engine.checkpoint_files import (
    FORMAT,
    INDEX_FILE,
    WEIGHTS_FILE,
    differences,
    faults,
    find_checkpoints,
    part_faults,
    read_index,
    read_state,
    remove_unfinished,
    rotate,
    set_aside,
    shard_file,
    step_folder,
    sync,
    write_state,
)
from kalmagrove.engine.engine import Engine
from kalmagrove.engine.fragments import collect, misfits, parameter_digest, refresh, restore
from kalmagrove.engine.rank_state import load_rank_state, rank_state
from kalmagrove.engine.room import checkpoint_bytes, need_room
from kalmagrove.engine.tensor_files import FileWriter, Stored, TensorReader
from kalmagrove.engine.tensor_index import Index, coverage_faults, merge, to_json
from kalmagrove.engine.weights import whole_weights
from kalmagrove.parallel import all_gather_object, any_rank, barrier, broadcast_object

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
    unsaved: int = 0  # saves that failed since
    resumed: Path | None = None  # the checkpoint the run went on from
    saving: "Saving | None" = None  # the save under way, in the background

    @property
    def newest(self) -> Path | None:
        return None if self.saved is None else step_folder(self.folder, self.saved)


def save(engine: Engine, batches: Stateful, meters: Stateful, state: State) -> tuple[Path, float]:
    """Write the checkpoint of `state.step`; returns its folder and the seconds it took. Collective.

    Everything goes to `step-N.tmp`, is forced to the disk, and is renamed when complete: a kill at
    any moment leaves the checkpoints before it intact.

    Raises:
        NonFiniteError: the weights hold NaN or infinity; nothing is written.
        CheckpointError: there is no room, or a rank could not write; the unfinished folder is
            removed, and older ones are as they were.
    """
    return Saving(engine, batches, meters, state, background=False).finish(state)


class Saving:
    """The checkpoint of one step, from what is to be written to its name. Collective, as `save`.

    In the background what a rank writes is copied to the host's memory, and a thread writes it
    while training goes on; everything that ranks agree on is left to `finish`.

    Raises:
        NonFiniteError: as `save`.
    """

    def __init__(
        self,
        engine: Engine,
        batches: Stateful,
        meters: Stateful,
        state: State,
        *,
        background: bool,
    ) -> None:
        self.step, self._engine, self._begun = state.step, engine, time.perf_counter()
        engine.progress.at("checkpoint")
        if not engine.weights_are_finite():
            raise NonFiniteError(
                f"the weights at step {state.step} are not finite and are not saved; "
                f"the last good checkpoint is {state.newest or 'none'}; try a lower optim.lr"
            )
        self._final = step_folder(state.folder, state.step)
        self._partial = self._final.with_name(self._final.name + ".tmp")
        self._files = FileWriter(self._partial)
        _make_room(engine, self._files)
        parts, self._index = _collect(engine)
        self._thread: threading.Thread | None = None
        if background:
            self._files.attempt(lambda: _copy(parts))
            self._thread = threading.Thread(
                target=self._write, args=(parts,), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            for part in parts:
                engine.progress.at("checkpoint")
                self._files.tensors(*part)
        self._tree = {
            **_describe(engine),
            "step": state.step,
            "tokens": state.tokens,
            "nonfinite_total": engine.nonfinite_total,
            "nonfinite_in_row": engine.nonfinite_in_row,
            "batches": batches.state_dict(),
            "meters": meters.state_dict(),
        }

    def _write(self, parts: "list[Written]") -> None:
        try:
            for part in parts:
                self._files.tensors(*part)
        except Exception as error:  # nobody else would hear of it
            self._files.error = error

    def done(self) -> bool:
        """Whether every rank has written its files. Collective."""
        writing = self._thread is not None and self._thread.is_alive()
        return not any_rank(writing, self._engine.groups.world, self._engine.groups.device)

    def finish(self, state: State) -> tuple[Path, float]:
        """Wait for the files, give the checkpoint its name and remove old ones; see `save`."""
        engine, main, world = self._engine, self._engine.groups.is_main, self._engine.groups.world
        engine.progress.at("checkpoint")
        if self._thread is not None:
            self._thread.join()
        self._vouch()
        error = self._files.error
        reasons = all_gather_object(str(error) if error else None, world)
        if not any(reasons):
            problem = _publish(self._partial, self._final) if main else None
            reasons = [broadcast_object(problem, world)]
        if any(reasons):
            if main:
                shutil.rmtree(self._partial, ignore_errors=True)
            barrier(world)
            rank, reason = next((rank, r) for rank, r in enumerate(reasons) if r)
            reason = f"on rank {rank}: {reason}" if rank else reason
            raise CheckpointError(
                f"checkpoint {self._final} could not be written: {reason}; "
                f"the last good checkpoint is {state.newest or 'none'}; free space on that disk, "
                "or check that it can be written"
            )
        if main:
            try:
                remove_unfinished(state.folder)
                rotate(state.folder, engine.run.checkpoint.keep)
            except OSError as problem:
                log.warning("old checkpoints in %s could not be removed: %s", state.folder, problem)
        barrier(world)
        state.saved, state.unsaved = self.step, 0
        return self._final, time.perf_counter() - self._begun

    def _vouch(self) -> None:
        """Write what all ranks have written, and `state.json` last."""
        files = self._files
        reports = all_gather_object((files.written, self._index), self._engine.groups.world)
        if not self._engine.groups.is_main:
            return
        files.attempt(lambda: _write_index(files, [index for _, index in reports]))
        entries = {**files.written, **{k: v for part, _ in reports for k, v in part.items()}}
        files.attempt(lambda: write_state(self._partial, {**self._tree, "files": entries}))
        files.attempt(lambda: sync(self._partial))


def _publish(partial: Path, final: Path) -> str | None:
    """Give a complete checkpoint its name; returns what kept that from happening."""
    try:
        if final.exists():  # a resumed run writes the same step again
            final.rename(final.with_name(final.name + ".old"))
        partial.rename(final)
        sync(final.parent)
    except OSError as problem:
        return str(problem)
    return None


def _make_room(engine: Engine, files: FileWriter) -> None:
    """An empty folder on a disk that holds the checkpoint. All ranks pass every collective."""
    folder, needed = files.folder, checkpoint_bytes(engine)
    if engine.groups.is_main:
        files.attempt(lambda: folder.parent.mkdir(parents=True, exist_ok=True))
        shutil.rmtree(folder, ignore_errors=True)
        files.attempt(lambda: need_room(folder.parent, needed))
        files.attempt(folder.mkdir)
    barrier(engine.groups.world)


# A file's name, its tensors, and metadata of its header.
Written = tuple[str, dict[str, Stored], Mapping[str, str]]


def _collect(engine: Engine) -> tuple[list[Written], Index]:
    """The files of this rank, as they are now on the device; and its contribution to the index."""
    file = shard_file(engine.groups.world.rank)
    tensors, index = collect(engine, file)
    own, metadata = rank_state(engine)
    parts: list[Written] = [(file, tensors | own, metadata)]
    engine.progress.at("checkpoint")
    weights = whole_weights(engine)
    if engine.groups.is_main:
        whole = {name: Stored.of(tensor) for name, tensor in weights.items()}
        parts.append((WEIGHTS_FILE, whole, {}))
    return parts, index


def _copy(parts: list[Written]) -> None:
    """Put what is still on the device, or is the training's own, into the host's memory."""
    try:
        for _, tensors, _ in parts:
            for name, stored in tensors.items():
                tensors[name] = Stored.of(stored.read().detach().to("cpu", copy=True))
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"the host's memory does not hold a copy ({error}); use checkpoint.background=false"
        ) from None


def _write_index(files: FileWriter, indices: list[Index]) -> None:
    """What all ranks have written, if it is everything: else it could not be loaded again."""
    index = merge(indices)
    wrong = coverage_faults(index)
    if wrong:
        raise CheckpointError(f"its parts do not make up the model: {'; '.join(wrong[:5])}")
    files.json(INDEX_FILE, to_json(index))


def _describe(engine: Engine) -> dict[str, Any]:
    """What made a checkpoint: the layout is free to change, the rest must be that of the run."""
    groups = engine.groups
    return {
        "format": FORMAT,
        "run": engine.run.model_dump(mode="json"),
        "layout": {
            "world": groups.world.size,
            "tp": groups.tp.size,
            "ep": groups.ep.size,
            "cp": groups.cp.size,
            "dp": groups.dp.size,
            "zero.stage": engine.run.zero.stage,
            "precision": str(engine.dtype).removeprefix("torch."),
        },
        "parameters": parameter_digest(engine.module),
        "frozen": engine.frozen,
    }


def resume(
    engine: Engine, batches: Stateful, meters: Stateful, run: Training, run_dir: Path
) -> State:
    """Go on from the newest whole checkpoint of `run_dir`, with a warning for each that is not.

    A run without one begins where `run.checkpoint.resume` says: at step 0 (auto), or from the
    checkpoint's or run's folder it names. So a command given again continues its own run. Only
    never begins at step 0 whatever is there. Unfinished folders of a killed save are removed;
    checkpoints of `run_dir` later than the one continued are renamed to step-N.aside. Collective.

    Raises:
        CheckpointError: nothing whole was found where something should be; the folder named lies
            in `run_dir`; the checkpoint is of another model or tokenizer, whose differing keys
            are named; or its parts are not exactly those of the model.
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
    found = all_gather_object(faults(folder, world.rank, world.size), world)
    return list(dict.fromkeys(fault for part in found for fault in part))


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
    if saved["layout"] != here["layout"] and engine.groups.is_main:
        old, new = (
            " ".join(f"{key}={value}" for key, value in tree["layout"].items())
            for tree in (saved, here)
        )
        log.info("checkpoint of %s is reshaped to %s", old, new)
    _load_tensors(engine, folder, saved, same=saved["layout"] == here["layout"])
    engine.nonfinite_total = saved["nonfinite_total"]
    engine.nonfinite_in_row = saved["nonfinite_in_row"]
    batches.load_state_dict(saved["batches"])
    meters.load_state_dict(saved["meters"])
    state.step, state.tokens, state.resumed = saved["step"], saved["tokens"], folder
    own = folder.resolve() == step_folder(state.folder, state.step).resolve()
    state.saved = state.step if own else None
    _set_aside(engine, state, state.step if own else 0)
    return state


def _load_tensors(engine: Engine, folder: Path, saved: dict[str, Any], same: bool) -> None:
    """Everything that is not in `state.json`. Nothing is changed before all of it is checked."""
    reader, world = TensorReader(folder), engine.groups.world
    index: Index = {}
    anew: list[str] = []

    def check() -> list[str]:
        index.update(read_index(folder))
        found = coverage_faults(index) or misfits(engine, index)
        return found or part_faults(index, reader, world.rank, world.size)

    def load() -> list[str]:
        anew.extend(restore(engine, index, reader))
        files = [shard_file(rank) for rank in range(saved["layout"]["world"])]
        load_rank_state(engine, reader, files, same)
        return []

    _agree(engine, folder, check)
    _agree(engine, folder, load)
    refresh(engine)
    if anew and engine.groups.is_main:
        log.warning(
            "checkpoint %s holds no optimizer state of %d tensors; theirs begins anew",
            folder,
            len(anew),
        )


def _agree(engine: Engine, folder: Path, look: Callable[[], list[str]]) -> None:
    """Raise on all ranks if `look` found something wrong on one, or failed there."""
    try:
        found = look()
    except (OSError, CheckpointError) as error:
        found = [str(error)]
    reports = all_gather_object(found, engine.groups.world)
    wrong = list(dict.fromkeys(fault for part in reports for fault in part))
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"checkpoint {folder} cannot be loaded: {'; '.join(wrong[:5])}{more}; use another "
            "one, or checkpoint.resume=never to begin anew"
        )


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

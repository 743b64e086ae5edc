"""The training loop: step, report, evaluate, save, until the run is done or asked to stop.

Called last by the training command, with everything built. It knows no data format, no console and
no price: batches are iterated, meters are told.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kalmagrove.config import (
    BudgetReached,
    CheckpointError,
    DataError,
    Interrupted,
    NonFiniteError,
    RankLost,
    Training,
)
from kalmagrove.engine.checkpoint import Saving, State, save
from kalmagrove.engine.engine import Batch, Engine
from kalmagrove.engine.profile import StepProfiler
from kalmagrove.engine.refit import refit_grids
from kalmagrove.engine.signals import StopRequest
from kalmagrove.engine.watchdog import Watchdog
from kalmagrove.parallel import Groups, all_reduce_sum, any_rank, barrier
from kalmagrove.track.records import GridRefit, StepRecord

log = logging.getLogger(__name__)


class Batches(Protocol):
    """An endless iterator of micro-batches that can be saved."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Observer(Protocol):
    """What `fit` tells; all ranks call every method in the same order."""

    def start(self, step: int, tokens: int) -> None: ...

    def step(self, record: StepRecord) -> None: ...

    def pause(self) -> None: ...

    def evaluated(self, step: int, tokens: int, nats: float, val_tokens: int) -> None: ...

    def saving(self, step: int, tokens: int) -> None: ...

    def checkpointed(
        self, step: int, tokens: int, path: Path, seconds: float, saved: int | None = None
    ) -> None: ...

    def unsaved(self, step: int, tokens: int, reason: str) -> None: ...

    def skipped(self, step: int, reason: str) -> None: ...

    def over_budget(self) -> tuple[str, str] | None: ...

    def refitted(self, step: int, tokens: int, grids: Mapping[str, GridRefit]) -> None: ...

    def stop(self, status: str, **facts: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run that reached its last step ended. `val_nats` is nats per held-out token."""

    status: Literal["done"]
    step: int
    tokens: int
    val_nats: float
    nonfinite: int  # steps skipped since step 0
    checkpoint: Path


def fit(
    engine: Engine,
    batches: Batches,
    val_batches: Iterable[Batch],
    meters: Observer,
    state: State,
    run: Training,
) -> Outcome:
    """Train from `state.step` to `run.steps`. All ranks call it.

    Launchers end all processes of a run as soon as one fails, so no rank leaves before rank 0 has
    closed `meters` (except for an error of one rank alone, whom the others do not wait for).

    Args:
        val_batches: the held-out micro-batches, the same number on every rank; iterated anew each
            time.

    Raises:
        Interrupted: SIGINT, SIGTERM or the stop file; the finished step is saved.
        BudgetReached: a cap of `run.budget` leaves no room for a step; what is done is saved.
        NonFiniteError: `engine.max_nonfinite` steps in a row gave no finite update, or the weights
            are not finite when they are to be saved.
        RankLost: another rank died.
        CheckpointError: two saves in a row failed, or the last one of the run did.
    """
    meters.start(state.step, state.tokens)
    profiler = StepProfiler(run.profile, state.folder.parent / "profile", engine.groups, state.step)

    def hung(what: str) -> None:
        meters.stop("hung", step=state.step, reason=what)

    watchdog = Watchdog(engine.progress, run.launch, engine.groups, state.folder.parent, hung)
    # Until the end: SIGTERM must not cut off the summary.
    with StopRequest(run.launch.reserve) as stop:
        try:
            with watchdog:
                val_nats = _train(engine, batches, val_batches, meters, state, run, stop, profiler)
        except BaseException as error:
            if getattr(error, "collective", False):
                with contextlib.suppress(CheckpointError):
                    _settle(engine, meters, state)
            lost = _rank_lost(engine, state, error)
            _close(engine, meters, state, lost or error)
            if lost is not None:
                raise lost from error
            raise
        finally:
            profiler.close()
        try:
            meters.stop("done", step=state.step)
        finally:
            barrier(engine.groups.world)
    assert state.newest is not None, "the last step is saved"
    return Outcome("done", state.step, state.tokens, val_nats, engine.nonfinite_total, state.newest)


def _rank_lost(engine: Engine, state: State, error: BaseException) -> RankLost | None:
    """What an error of torch.distributed means."""
    if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
        return None
    place, said = engine.progress.place, str(error).strip().split("\n")[0]
    return RankLost(
        f"another rank has ended or does not answer, in {place.phase} of step {place.step} "
        f"({said.partition(' This is typically')[0]}); "
        f"the last good checkpoint is {state.newest or 'none'}"
    )


def _close(engine: Engine, meters: Observer, state: State, error: BaseException) -> None:
    """Close the run after `error`, which stays the one that is raised."""
    try:
        if isinstance(error, Interrupted):
            meters.stop("stopped", step=state.step)
        elif isinstance(error, BudgetReached):
            meters.stop("budget", step=state.step, reason=str(error))
        else:
            meters.stop("failed", step=state.step, reason=f"{type(error).__name__}: {error}")
    except Exception as problem:  # a full disk, often what `error` is about
        log.error("the run's end could not be written down: %s", problem)
    if getattr(error, "collective", False):
        barrier(engine.groups.world)


def _train(
    engine: Engine,
    batches: Batches,
    val_batches: Iterable[Batch],
    meters: Observer,
    state: State,
    run: Training,
    stop: StopRequest,
    profiler: StepProfiler,
) -> float:
    val_nats = None
    if state.step < run.steps:
        spent = meters.over_budget()
        if any_rank(spent is not None, engine.groups.world, engine.groups.device):
            raise _over_budget(spent, state, run)
    while state.step < run.steps:
        with profiler.step(state.step + 1):
            _step(engine, batches, meters, state, run)
        if state.step == profiler.last:
            meters.pause()
            profiler.close()
            meters.pause()  # that was neither training nor anything else: idle
        last, val_nats = state.step == run.steps, None
        if last or state.step % run.eval.every == 0:
            val_nats = _evaluate(engine, val_batches, meters, state)
        if state.saving is not None and state.saving.done():
            _settle(engine, meters, state)
        if last or state.step % run.checkpoint.every == 0:
            _save(engine, batches, meters, state, must=last)
        if not last:
            spent = meters.over_budget()
            what = stop.agreed(engine.groups, spent is not None)
            if what != "go on" and state.saved != state.step:
                _save(engine, batches, meters, state, must=True)
            if what == "over budget":
                raise _over_budget(spent, state, run)
            if what == "stop":
                raise Interrupted(
                    f"stopped by {stop.reason or 'another rank'} after step {state.step} of "
                    f"{run.steps}; saved in {state.newest}; {_continued_by(state, run)} continues"
                )
    if val_nats is None:  # resumed at the last step
        val_nats = _evaluate(engine, val_batches, meters, state)
    if state.saved != state.step:
        _save(engine, batches, meters, state, must=True)
    return val_nats


def _over_budget(spent: tuple[str, str] | None, state: State, run: Training) -> BudgetReached:
    """spent: what rank 0 says, the only one that knows: why, and what continues the run."""
    why, more = spent or ("the budget is used up", "a higher cap")
    saved = f"saved in {state.newest}" if state.newest else "nothing to save"
    return BudgetReached(
        f"{why}, at step {state.step} of {run.steps}; {saved}; "
        f"{_continued_by(state, run)} with {more} continues"
    )


def _continued_by(state: State, run: Training) -> str:
    if run.checkpoint.resume == "never":
        return f"the same command with name={state.folder.parent.name} checkpoint.resume=auto"
    return "the same command"


def _step(engine: Engine, batches: Batches, meters: Observer, state: State, run: Training) -> None:
    engine.timer.begin()
    engine.progress.at("data", state.step + 1)
    micro_batches = [next(batches) for _ in range(engine.accumulation)]
    engine.timer.lap("data")
    loss, grad_norm = engine.train_step(micro_batches, state.step)
    engine.progress.at("report")
    lr = engine.lr(state.step)
    state.step += 1
    state.tokens += run.batch.tokens
    meters.step(
        StepRecord(
            step=state.step,
            tokens=state.tokens,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=engine.skipped,
            seconds=engine.timer.seconds,
            model_metrics=engine.metrics,
        )
    )
    if engine.skipped:
        reason = engine.nonfinite_reason()
        meters.skipped(state.step, reason)
        _give_up(engine, state, run, reason)
    elif run.engine.refit_every and state.step % run.engine.refit_every == 0:
        grids = refit_grids(engine, micro_batches[0])
        if grids:
            meters.refitted(state.step, state.tokens, grids)


def _give_up(engine: Engine, state: State, run: Training, reason: str) -> None:
    """Raise if too many steps in a row were not finite."""
    if engine.nonfinite_in_row < run.engine.max_nonfinite:
        return
    raise NonFiniteError(
        f"steps {state.step - engine.nonfinite_in_row + 1} to {state.step} gave no finite update "
        f"({reason}); engine.max_nonfinite={run.engine.max_nonfinite} in a row end a run. "
        f"Try a lower optim.lr (now {run.optim.lr}), a longer schedule.warmup (now "
        f"{run.schedule.warmup}), or engine.precision=fp32; the last good checkpoint is "
        f"{state.newest or 'none'}"
    )


def _evaluate(
    engine: Engine, val_batches: Iterable[Batch], meters: Observer, state: State
) -> float:
    meters.pause()
    nats, val_tokens = evaluate(engine, val_batches)
    meters.evaluated(state.step, state.tokens, nats, val_tokens)
    return nats


def evaluate(engine: Engine, val_batches: Iterable[Batch]) -> tuple[float, int]:
    """`mean_nats` of the engine's model."""
    return mean_nats(engine.eval_loss, val_batches, engine.groups)


def mean_nats(
    eval_loss: Callable[[Batch], tuple[Tensor, Tensor]],
    val_batches: Iterable[Batch],
    groups: Groups,
) -> tuple[float, int]:
    """Mean cross-entropy in nats per target token over all ranks' batches, and their number of
    target tokens. All ranks call it.

    Args:
        eval_loss: of a batch the summed cross-entropy and the number of target tokens, on
            `groups.device`; see `Engine.eval_loss`.
    """
    nats = torch.zeros((), dtype=torch.float64, device=groups.device)
    count = torch.zeros((), dtype=torch.int64, device=groups.device)
    for batch in val_batches:
        batch_nats, batch_count = eval_loss(batch)
        nats += batch_nats
        count += batch_count
    all_reduce_sum(nats, groups.dp_cp)
    all_reduce_sum(count, groups.dp)
    if not int(count):
        raise DataError("the held-out split has no target token; try a larger data.val_fraction")
    return float(nats) / groups.cp.size / int(count), int(count)


def _save(engine: Engine, batches: Batches, meters: Observer, state: State, *, must: bool) -> None:
    """Save. A failure is noted and made good by the next save; two in a row end the run, as does
    one of a save that `must` be: work that cannot be saved is not worth its price. Such a one is
    not left to the background.
    """
    _settle(engine, meters, state)
    if state.saved == state.step:
        return
    meters.pause()
    try:
        if engine.run.checkpoint.background and not must:
            state.saving = Saving(engine, batches, meters, state, background=True)
            meters.saving(state.step, state.tokens)
            return
        path, seconds = save(engine, batches, meters, state)
    except CheckpointError as error:
        _unsaved(engine, meters, state, error, must)
        return
    meters.checkpointed(state.step, state.tokens, path, seconds)


def _settle(engine: Engine, meters: Observer, state: State) -> None:
    """Conclude the save under way in the background, if there is one: wait for it."""
    saving, state.saving = state.saving, None
    if saving is None:
        return
    meters.pause()
    try:
        path, seconds = saving.finish(state)
    except CheckpointError as error:
        _unsaved(engine, meters, state, error, must=False)
        return
    meters.checkpointed(state.step, state.tokens, path, seconds, saving.step)


def _unsaved(
    engine: Engine, meters: Observer, state: State, error: CheckpointError, must: bool
) -> None:
    if must or state.unsaved:
        raise error
    state.unsaved += 1
    if engine.groups.is_main:
        log.error("%s. Training goes on; if the next save fails too, the run ends", error)
    meters.unsaved(state.step, state.tokens, str(error))

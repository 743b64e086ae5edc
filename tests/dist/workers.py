"""What the processes of the distributed tests run; started by `harness`."""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kalmagrove.config import (
    BudgetReached,
    CheckpointError,
    KalmaGroveError,
    NonFiniteError,
    Run,
)
from kalmagrove.engine import build_engine, connect, disconnect, fit, load_weights, resume, save
from kalmagrove.engine.compat import gathered, local_weights, master_weight
from kalmagrove.engine.refit import refit_grids
from kalmagrove.nn import build_model
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.parallel import Groups, all_reduce_sum, barrier
from kalmagrove.track import build_meters
from tests.dist.toy import ROWS, Recorder, Rows, Toy, real_run, toy_run


def make(run: Run, groups: Groups, seed: int = 0) -> tuple[Any, Rows]:
    torch.manual_seed(seed)
    engine = build_engine(Toy(), run, groups)
    return engine, Rows(run.batch.micro, groups.dp.rank, groups.dp.size)


def real_model(groups: Groups, overrides: list[str], stages: list[int]) -> dict[str, Any]:
    """The real Transformer at several ZeRO stages: losses, norms and router biases."""
    result = {}
    for stage in stages:
        run = real_run([*overrides, f"zero.stage={stage}"])
        torch.manual_seed(0)
        engine = build_engine(build_model(run.model, groups), run, groups)
        rows = Rows(run.batch.micro, groups.dp.rank, groups.dp.size)
        found = []
        for step in range(4):
            loss, norm = engine.train_step([next(rows) for _ in range(engine.accumulation)], step)
            mean = float(all_reduce_sum(loss.clone(), groups.dp)) / groups.dp.size
            found.append((mean, float(norm)))
        result[str(stage)] = found
    return result


def bf16_sums(groups: Groups, overrides: dict[str, list[str]]) -> dict[str, Any]:
    """On all ranks: whether gradients are added up as DeepSpeed itself would, to the last bit; the
    steps differ; and the engine is made without notes on memory, for which DeepSpeed collects
    garbage.
    """
    result, told = {}, io.StringIO()
    for name, more in overrides.items():
        run = real_run([*more, "engine.precision=bf16", "zero.stage=1"])
        Groups.reset()
        own = Groups.init(run.parallel, groups.device)
        found = []
        for patched in (True, False):
            with contextlib.redirect_stdout(told):
                engine, rows = _real_engine(run, own)
            assert engine.accumulation == 2
            optimizer = engine.deepspeed.optimizer
            if not patched:
                del optimizer.update_hp_grads  # DeepSpeed's method shows again
            steps = []
            for step in range(3):
                _, norm = engine.train_step([next(rows) for _ in range(2)], step)
                steps.append(float(norm))
            state = [v for s in optimizer.optimizer.state.values() for v in s.values()]
            weights = [*local_weights(engine.deepspeed), *engine.module.parameters()]
            found.append([t.detach() for t in (*weights, *state, torch.tensor(steps))])
        silent = "Virtual Memory" not in told.getvalue()
        result[name] = _everywhere([same(*found), len(set(steps)) == len(steps), silent], own)
    return result


def losses(run: Run, groups: Groups, steps: int) -> list[tuple[float, float]]:
    """(loss averaged over ranks, gradient norm) of the first steps of a new engine."""
    engine, rows = make(run, groups)
    found = []
    for step in range(steps):
        loss, norm = engine.train_step([next(rows) for _ in range(engine.accumulation)], step)
        mean = float(all_reduce_sum(loss.clone(), groups.dp)) / groups.dp.size
        found.append((mean, float(norm)))
    return found


def equality(groups: Groups, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Losses of every variant."""
    return {name: losses(toy_run(**sections), groups, 6) for name, sections in variants.items()}


def snapshot(engine: Any) -> list[torch.Tensor]:
    """Copies of weights, optimizer state and buffers."""
    optimizer = engine.deepspeed.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    state = [v for s in inner.state.values() for v in s.values() if torch.is_tensor(v)]
    weights = [*local_weights(engine.deepspeed), *engine.module.parameters()]
    biases = [b.bias for b in engine.module.blocks]
    return [t.detach().clone() for t in (*weights, *state, *biases)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def nonfinite(groups: Groups, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A bad loss or gradient in the first micro-batch, on the last rank, between good steps."""
    result = {}
    for name, sections in variants.items():
        run = toy_run(**sections)
        engine, rows = make(run, groups)
        reference, other_rows = make(run, groups)
        facts: dict[str, Any] = {"skipped": [], "unchanged": [], "reasons": [], "next_equal": []}

        def good(which: Any, source: Rows, step: int) -> tuple[float, float]:
            loss, norm = which.train_step([next(source) for _ in range(which.accumulation)], step)
            return float(loss), float(norm)

        good(engine, rows, 0), good(reference, other_rows, 0)
        for flag in ("bad_loss", "bad_gradient"):
            before = snapshot(engine)
            micro_batches = [next(rows) for _ in range(engine.accumulation)]
            last = groups.dp.rank == groups.dp.size - 1
            engine.train_step(Breaking(micro_batches, engine.module, flag, last), 1)
            facts["skipped"].append(engine.skipped)
            facts["unchanged"].append(same(before, snapshot(engine)))
            facts["reasons"].append(engine.nonfinite_reason())
            for block in (*engine.module.blocks, *reference.module.blocks):
                block.load.zero_()  # counted in the skipped step too
            for _ in range(engine.accumulation):
                next(other_rows)
            facts["next_equal"].append(good(engine, rows, 1) == good(reference, other_rows, 1))
            facts["next_equal"].append(same(snapshot(engine), snapshot(reference)))
        facts["total"] = engine.nonfinite_total
        result[name] = _everywhere(facts, groups)
    return result


class Breaking(list):
    """Micro-batches that break the model, on one rank, while the first of them is computed."""

    def __init__(self, batches: list[Any], module: Toy, flag: str, here: bool) -> None:
        super().__init__(batches)
        self.module, self.flag, self.here = module, flag, here

    def __iter__(self) -> Any:
        for i, batch in enumerate(super().__iter__()):
            setattr(self.module, self.flag, self.here and i == 0)
            yield batch
        setattr(self.module, self.flag, False)


def _everywhere(value: Any, groups: Groups) -> list[Any]:
    box = [None] * groups.world.size
    torch.distributed.all_gather_object(box, value)
    return box


def roundtrip(groups: Groups, folder: str, variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train and save; then resume a differently initialised engine halfway and compare."""
    result = {}
    for name, sections in variants.items():
        run_dir = Path(folder) / name
        run = toy_run(**{"checkpoint": {"every": 2, "keep": 2}, "eval": {"every": 3}, **sections})
        engine, rows = make(run, groups)
        whole = Recorder(groups)
        state = resume(engine, rows, whole, run, run_dir)
        outcome = fit(engine, rows, validation(groups), whole, state, run)
        expected, random_numbers = snapshot(engine), torch.rand(3).tolist()
        left = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        barrier(groups.world)

        fresh = Toy()
        saved = load_weights(run_dir, fresh)
        exported = float(fresh.eval()(**next(iter(validation(groups)))).loss)
        engine.module.eval()
        own = float(engine.eval_loss(next(iter(validation(groups))))[0])

        barrier(groups.world)
        if groups.is_main:
            shutil.rmtree(run_dir / "checkpoints" / "step-000006")
        barrier(groups.world)
        engine, rows = make(run, groups, seed=1)
        torch.manual_seed(99)
        part = Recorder(groups)
        state = resume(engine, rows, part, run, run_dir)
        again = fit(engine, rows, validation(groups), part, state, run)
        result[name] = {
            "whole": whole.steps,
            "part": part.steps,
            "events": part.events,
            "left": left,
            "equal": _everywhere(same(expected, snapshot(engine)), groups),
            "random_equal": random_numbers == torch.rand(3).tolist(),
            "val": [outcome.val_nats, again.val_nats],
            "exported": [exported, own],
            "saved_step": saved["step"],
        }
    return result


def validation(groups: Groups) -> list[dict[str, Any]]:
    rows = Rows(2, groups.dp.rank, groups.dp.size)
    rows.samples = 1000 * ROWS
    return [{**next(rows), "normalizer": 1.0} for _ in range(2)]


def refusals(groups: Groups, folder: str) -> dict[str, Any]:
    """Damaged, foreign and unwritable checkpoints."""
    run_dir, result = Path(folder), {}
    run = toy_run(checkpoint={"every": 2, "keep": 3})
    engine, rows = make(run, groups)
    state = resume(engine, rows, Recorder(groups), run, run_dir)
    fit(engine, rows, validation(groups), Recorder(groups), state, run)
    barrier(groups.world)

    def attempt(into: Path = run_dir, **sections: Any) -> list[Any]:
        other = toy_run(**{"checkpoint": {"every": 2, "keep": 3}, **sections})
        engine, rows = make(other, groups)
        try:
            state = resume(engine, rows, Recorder(groups), other, into)
            return _everywhere(state.step, groups)
        except CheckpointError as error:
            return _everywhere(str(error), groups)

    whole = {"resume": str(run_dir / "checkpoints" / "step-000006")}
    result["model"] = attempt(model={"d_model": 16, "logit_z_loss": 0.5})
    result["layout"] = attempt(run_dir.parent / "other", zero={"stage": 2}, checkpoint=whole)
    result["optim"] = attempt(optim={"kind": "adamw"})
    result["longer"] = attempt(steps=9, optim={"lr": 0.1})
    nothing = {"resume": str(run_dir.parent / "elsewhere")}
    result["nothing"] = attempt(run_dir.parent / "empty", checkpoint=nothing)
    result["own_first"] = attempt(checkpoint=nothing)
    result["own_path"] = attempt(
        checkpoint={"resume": str(run_dir / "checkpoints" / "step-000002")}
    )
    victim = run_dir / "checkpoints" / "step-000006"
    if groups.is_main:
        shard = sorted(victim.glob("shard-*"))[-1]
        os.truncate(shard, shard.stat().st_size - 10)
        (run_dir / "checkpoints" / "step-000008.tmp").mkdir()
    barrier(groups.world)
    result["asked_damaged"] = attempt(run_dir.parent / "empty", checkpoint={"resume": str(victim)})
    result["fallback"] = attempt()
    result["left"] = sorted(p.name for p in (run_dir / "checkpoints").iterdir())

    engine, rows = make(run, groups)
    state = resume(engine, rows, Recorder(groups), run, run_dir)
    for rank in range(groups.world.size):
        state.step += 1
        with small_files(groups.world.rank == rank):
            try:
                save(engine, rows, Recorder(groups), state)
                message = "written"
            except CheckpointError as error:
                message = str(error)
        result[f"full_disk_{rank}"] = _everywhere(message, groups)
        result[f"left_{rank}"] = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
        barrier(groups.world)
    fork = run_dir.parent / "fork"
    path = {"resume": str(run_dir / "checkpoints" / "step-000002"), "every": 2}
    run = toy_run(steps=4, checkpoint=path)
    engine, rows = make(run, groups)
    state = resume(engine, rows, Recorder(groups), run, fork)
    result["path"] = _everywhere(state.step, groups)
    fit(engine, rows, validation(groups), Recorder(groups), state, run)
    result["path_again"] = attempt(fork, checkpoint=path)
    result["after_path"] = [
        sorted(p.name for p in (folder / "checkpoints").iterdir()) for folder in (run_dir, fork)
    ]
    barrier(groups.world)
    result["never"] = attempt(checkpoint={"resume": "never"})
    return result


@contextlib.contextmanager
def small_files(here: bool) -> Iterator[None]:
    """On this rank, no file can grow past 1 kB: writes fail in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train(
    groups: Groups, folder: str, sections: dict[str, Any], whole: str | None = None
) -> dict[str, Any]:
    """One run as a command makes it, slow enough to be killed; then another, into `whole`."""
    run_dir = Path(folder)
    run = toy_run(**{"checkpoint": {"every": 5}, **sections})
    engine, rows = make(run, groups)
    closed = run_dir / "closed"
    closed.unlink(missing_ok=True)

    class SlowToClose(Recorder):
        def stop(self, status: str, **facts: Any) -> None:
            super().stop(status, **facts)
            if groups.is_main:
                time.sleep(0.3)
                closed.touch()

    meters = SlowToClose(groups)

    class Slow(Rows):
        def __next__(self) -> dict[str, Any]:
            time.sleep(0.01)
            return super().__next__()

    rows = Slow(run.batch.micro, groups.dp.rank, groups.dp.size)
    state = resume(engine, rows, meters, run, run_dir)
    try:
        fit(engine, rows, validation(groups), meters, state, run)
    except KalmaGroveError as error:
        print(error)
        os._exit(error.exit_code if closed.exists() else 1)
    assert closed.exists(), "this rank left before rank 0 had closed the run"
    result = {"steps": meters.steps, "events": meters.events}
    if whole:
        result["whole"] = train(groups, whole, sections)["steps"]
    return result


def gives_up(groups: Groups, folder: str) -> dict[str, Any]:
    """Every step from the third on is bad: `fit` ends with advice, a checkpoint stays."""
    run = toy_run(steps=20, checkpoint={"every": 1}, engine={"max_nonfinite": 3})
    engine, rows = make(run, groups)
    meters = Recorder(groups)

    class Bad(Rows):
        def __next__(self) -> dict[str, Any]:
            engine.module.bad_loss = self.samples >= 2 * ROWS and groups.dp.rank == 0
            return super().__next__()

    rows = Bad(run.batch.micro, groups.dp.rank, groups.dp.size)
    state = resume(engine, rows, meters, run, Path(folder))
    try:
        fit(engine, rows, validation(groups), meters, state, run)
        message = "no error"
    except NonFiniteError as error:
        message = str(error)
    finite = all(bool(torch.isfinite(w).all()) for w in local_weights(engine.deepspeed))
    next(engine.module.parameters()).data.fill_(float("nan"))
    local_weights(engine.deepspeed)[0].data.fill_(float("nan"))
    try:
        save(engine, rows, meters, state)
        poisoned = "written"
    except NonFiniteError as error:
        poisoned = str(error)
    return {"message": message, "events": meters.events, "finite": finite, "poisoned": poisoned}


def budget(groups: Groups, folder: str, stage: int) -> dict[str, Any]:
    """A dollar a core-second until it is used up, again with the same cap, and with a higher one.

    Only the first rank knows what is spent.
    """
    found: dict[str, Any] = {}
    price = {"name": "test", "usd_per_core_hour": 3600.0, "basis": "test"}
    track = {"wandb": "disabled", "console": "off"}
    for name, cap in (("first", 6.0), ("same", 6.0), ("more", 12.0)):
        run = toy_run(
            steps=10**6, zero={"stage": stage}, price=price, track=track, budget={"usd": cap},
            checkpoint={"every": 10**6}, eval={"every": 10**6},
        )  # fmt: skip
        engine, rows = make(run, groups)
        meters = build_meters(
            run, Path(folder), groups, params_total=1, params_active=1, flops_per_token=1.0,
            started=time.monotonic(),
        )  # fmt: skip
        state = resume(engine, rows, meters, run, Path(folder))
        began = state.step
        try:
            fit(engine, rows, validation(groups), meters, state, run)
            said = "no error"
        except BudgetReached as error:
            said = str(error)
        found[name] = _everywhere([began, state.step, state.saved, said], groups)
    return found


def refits(
    groups: Groups, folder: str, variants: dict[str, list[str]], resumed: list[str]
) -> dict[str, Any]:
    """What a refit leaves behind; of `resumed` variants also the losses, of a resumed run too."""
    result: dict[str, Any] = {}
    for name, overrides in variants.items():
        result[name] = {"refit": _everywhere(_refit_and_step(groups, overrides), groups)}
        if name in resumed:
            run_dir = Path(folder) / f"{name}-{groups.world.size}"
            result[name] |= _refit_and_resume(groups, run_dir, overrides)
    return result


def _real_engine(run: Run, groups: Groups, seed: int = 0) -> tuple[Any, Rows]:
    torch.manual_seed(seed)
    engine = build_engine(build_model(run.model, groups), run, groups)
    return engine, Rows(run.batch.micro, groups.dp.rank, groups.dp.size)


def _grids(engine: Any) -> dict[str, Any]:
    """Coefficients as the model and as the optimizer has them, and ranges."""
    found: dict[str, Any] = {"model": [], "optimizer": [], "ranges": []}
    for edge in engine.module.modules():
        if isinstance(edge, EdgeActivation):
            with gathered(edge.coef) as coef:
                found["model"] += coef.detach().float().flatten().tolist()
            master = master_weight(edge.coef).to(edge.coef.dtype)
            found["optimizer"] += master.float().flatten().tolist()
            found["ranges"] += edge.range.flatten().tolist()
    return found


def _refit_and_step(groups: Groups, overrides: list[str]) -> dict[str, Any]:
    """A refit between two steps that change next to nothing."""
    run = real_run([*overrides, "optim.lr=1e-30"])
    engine, rows = _real_engine(run, groups)
    grids, moved = [], {}
    for step in range(2):
        micro_batches = [next(rows) for _ in range(engine.accumulation)]
        engine.train_step(micro_batches, step)
        grids.append(_grids(engine))
        if step == 0:
            moved = refit_grids(engine, micro_batches[0])
            grids.append(_grids(engine))
    return {"grids": grids, "moved": {name: [g.before, g.after] for name, g in moved.items()}}


def _refit_and_resume(groups: Groups, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """Losses of a whole run, and of a resumed one from a checkpoint between two refits."""
    run = real_run([*overrides, "steps=5", "checkpoint.every=3", "engine.refit_every=2"])
    result: dict[str, Any] = {}
    for name, seed in (("whole", 0), ("part", 1)):
        engine, rows = _real_engine(run, groups, seed)
        meters = Recorder(groups)
        state = resume(engine, rows, meters, run, run_dir)
        fit(engine, rows, validation(groups), meters, state, run)
        result[name] = meters.steps
        result[f"{name}_refits"] = [e[1:] for e in meters.events if e[0] == "refitted"]
        barrier(groups.world)
        if groups.is_main:
            shutil.rmtree(run_dir / "checkpoints" / "step-000005")
        barrier(groups.world)
    return result


def serve(workers: dict[str, Any]) -> None:
    """Run the worker that the command line names on ranks of DeepSpeed; or `several` of them one
    after the other, as starting processes takes longer than most of them.
    """

    def several(groups: Groups, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {name: workers[name](groups, **arguments) for name, arguments in jobs.items()}

    worker, arguments, result_path = sys.argv[1:]
    device = connect(toy_run())
    groups = Groups.init(toy_run().parallel, device)
    result = {"several": several, **workers}[worker](groups, **json.loads(arguments))
    if groups.is_main:
        Path(result_path).write_text(json.dumps(result))
    disconnect()


WORKERS: dict[str, Any] = {
    "equality": equality,
    "real_model": real_model,
    "bf16_sums": bf16_sums,
    "nonfinite": nonfinite,
    "roundtrip": roundtrip,
    "refusals": refusals,
    "train": train,
    "gives_up": gives_up,
    "budget": budget,
    "refits": refits,
}

if __name__ == "__main__":
    serve(WORKERS)

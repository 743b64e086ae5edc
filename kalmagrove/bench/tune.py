"""Time the tile candidates of our Triton kernels: `kalmagrove bench kernels --tune`.

Processes that share the GPU compile them side by side into Triton's cache; then each is checked and
all that are right take turns on the clock. Prints the best as JSON; nothing is changed.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kalmagrove.bench.cases import cases
from kalmagrove.bench.check import poisoned, relative
from kalmagrove.bench.environment import environment
from kalmagrove.bench.spec import Case
from kalmagrove.bench.stages import Stage, stages_of
from kalmagrove.bench.timing import Task, measure
from kalmagrove.config import KalmaGroveError

TUNED = ("projection", "polynomial", "edge_topk")
CALLS = 3  # a burst
ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # error of a right candidate, relative
WORKERS = 12  # that compile; each holds inputs of one case and its results, some 4 GB


def run(
    *,
    device: str = "cuda",
    tiny: bool = False,
    ops: Sequence[str] = (),
    rounds: int = 10,
    seconds: float | None = None,
    out: Path | None = None,
) -> int:
    """Measure all stages of the ops; 1 if a tile that is in a table now is wrong.

    seconds: begin no case after that.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise KalmaGroveError("there is no GPU; try --device cpu --tiny with TRITON_INTERPRET=1")
    if where.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KalmaGroveError("--tune on a CPU needs TRITON_INTERPRET=1, and its times say nothing")
    begun = time.monotonic()
    chosen = [
        case
        for case in cases(tiny=tiny)
        if case.op in TUNED and (not ops or case.op in ops) and "rows" not in case.shape
    ]
    if where.type == "cuda":
        _compile_all(chosen, tiny)
    records: list[dict[str, Any]] = []
    for case in chosen:
        if seconds is not None and time.monotonic() - begun > seconds:
            print(f"out of time, not tuned: {case}")
            continue
        for stage in stages_of(case, where, _dtype(where)):
            found = tune_stage(stage, where, rounds, tiny)
            records += found
            print(_line(stage, found), flush=True)
        _write(out, records)
    print(json.dumps(best(records), indent=1))
    print(f"{time.monotonic() - begun:.0f} s" + (f", written to {out}" if out else ""))
    return int(any(r["current"] and r["check"] != "ok" for r in records))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def tune_stage(
    stage: Stage, device: torch.device, rounds: int, tiny: bool = False
) -> list[dict[str, Any]]:
    """A record a candidate, the current tile first; `ms` is None where it is wrong."""
    tiles = _tiles(stage, tiny)
    exact = stage.exact()
    checks = [_check(stage, tile, exact) for tile in tiles]
    del exact
    tasks = {i: _task(stage, tile) for i, tile in enumerate(tiles) if checks[i] == "ok"}
    measure(list(tasks.values()), rounds, device)
    return [
        {
            "op": stage.op,
            "stage": stage.name,
            "kind": stage.kind,
            "tile": _fields(tile),
            "current": i == 0,
            "ms": round(tasks[i].median, 5) if i in tasks else None,
            "check": checks[i],
        }
        for i, tile in enumerate(tiles)
    ]


def _task(stage: Stage, tile: Any) -> Task:
    def burst(_: Any) -> None:
        for _ in range(CALLS):
            stage.run(tile)

    return Task(burst, CALLS)


def _tiles(stage: Stage, tiny: bool) -> list[Any]:
    """The current tile, then the others; of tiny ones two, which show that it works."""
    others = [tile for tile in stage.candidates if tile != stage.current]
    return [stage.current, *(others[:1] if tiny else others)]


def _check(stage: Stage, tile: Any, exact: tuple[torch.Tensor, ...]) -> str:
    try:
        with poisoned():
            found = stage.run(tile)
        allowed = ALLOWED.get(found[0].dtype, 1e-2)
        errors = [relative(f, e) for f, e in zip(found, exact, strict=True)]
    except Exception as error:  # too much shared memory, for one
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    wrong = [error for error in errors if not error <= max(allowed, 1e-4)]
    return f"off by {max(wrong):.2g}" if wrong else "ok"


def _fields(tile: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(tile) and not isinstance(tile, type):
        return dataclasses.asdict(tile)
    return dict(tile if isinstance(tile, dict) else tile._asdict())


def best(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By op, stage and kind: the fastest tile, its time, and that of the current tile."""
    found: dict[str, Any] = {}
    for record in records:
        stage = found.setdefault(record["op"], {}).setdefault(record["stage"], {})
        entry = stage.setdefault(record["kind"], {"ms": None, "current_ms": None})
        if record["current"]:
            entry["current_ms"] = record["ms"]
        if record["ms"] is not None and (entry["ms"] is None or record["ms"] < entry["ms"]):
            entry |= {"ms": record["ms"], "tile": record["tile"]}
    return found


def _line(stage: Stage, records: list[dict[str, Any]]) -> str:
    times = sorted(record["ms"] for record in records if record["ms"] is not None)
    now = records[0]["ms"]
    wrong = [f"  {r['tile']}: {r['check']}" for r in records if r["check"] != "ok"]
    shown = f"best {times[0]:.4f} of {len(times)}" if times else "none is right"
    return "\n".join([f"{stage}: now {now} ms, {shown}", *wrong])


def _write(out: Path | None, records: list[dict[str, Any]]) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    header = environment() | {"suite": "tiles", "date": time.strftime("%Y-%m-%d")}
    out.write_text(json.dumps({"header": header, "records": records}, indent=1) + "\n")


def _compile_all(chosen: list[Case], tiny: bool) -> None:
    """Run every candidate once in some process, so that Triton's cache on disk has it."""
    begun = time.monotonic()
    workers = min(WORKERS, max(1, (os.cpu_count() or 1) - 2))
    jobs: list[Future[int]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for case in chosen:
            # One case after the other, so that a process makes inputs of few cases.
            jobs += [pool.submit(_compile, case, share, workers, tiny) for share in range(workers)]
        wait(jobs)
    done = sum(job.result() for job in jobs if not isinstance(job.exception(), BrokenProcessPool))
    print(f"{done} tiles compiled in {time.monotonic() - begun:.0f} s", flush=True)


def _compile(case: Case, share: int, shares: int, tiny: bool) -> int:
    """Every `shares`-th tile of the case; errors show again where they are checked."""
    device = torch.device("cuda")
    done = 0
    stages = stages_of(case, device, _dtype(device))
    every = [(stage, tile) for stage in stages for tile in _tiles(stage, tiny)]
    for stage, tile in every[share::shares]:
        try:
            stage.run(tile)
            torch.cuda.synchronize(device)
            done += 1
        except Exception:
            continue
    del stages, every
    torch.cuda.empty_cache()
    return done

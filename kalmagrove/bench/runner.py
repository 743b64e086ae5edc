"""Measure a suite of implementations against their peers: `kalmagrove bench kernels`, `ada`.

For every case: random inputs, a check of each implementation, then all that passed take turns on
the clock. What fails its check has no time. Device memory holds one case at a time.
"""

import gc
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kalmagrove.bench import report
from kalmagrove.bench.check import Verdict, check, expected
from kalmagrove.bench.environment import environment
from kalmagrove.bench.spec import (
    Case,
    Cost,
    Function,
    Implementation,
    Inputs,
    Suite,
    first,
    leaves,
)
from kalmagrove.bench.timing import (
    Ceilings,
    Recorder,
    Task,
    ceilings,
    launch_ms,
    measure,
    no_waiting,
    peak_extra_bytes,
    sets_for,
)
from kalmagrove.config import ConfigError, KalmaGroveError

Record = dict[str, Any]

METHOD = (
    "median and minimum over rounds; a sample is a burst of one call on each of `calls` input sets "
    "from an idle device, divided by `calls`, implementations in turns. graph=false includes the "
    "host. Forward passes record what autograd needs. bwd is timed on fresh graphs, one backward "
    "each; with graph=true it is the difference of the medians of fwd+bwd and fwd."
)


def run(
    suite: Suite,
    *,
    device: str = "cuda",
    tiny: bool = False,
    ops: Sequence[str] = (),
    implementations: Sequence[str] = (),
    rounds: int = 10,
    seed: int = 0,
    seconds: float | None = None,
    out: Path | None = None,
    plots: Path | None = None,
) -> int:
    """Measure, print, write; 0, or 1 if an implementation of ours failed its check.

    Args:
        ops, implementations: names to keep; all if empty.
        seconds: begin no case after that.
    """
    where = _device(device, tiny, suite)
    named = [i.name for table in (suite.ours, suite.peers) for each in table.values() for i in each]
    _known("--ops", ops, suite.functions)
    _known("--impl", implementations, named)
    begun = time.monotonic()
    chosen = [case for case in suite.cases(tiny=tiny) if not ops or case.op in ops]
    top = ceilings(where)
    header = _header(suite, where, top, rounds, seed)
    records: list[Record] = []
    report.print_header(header)
    for case in chosen:
        if seconds is not None and time.monotonic() - begun > seconds:
            header["skipped"].append(str(case))
            continue
        listed = [
            implementation
            for implementation in suite.ours[case.op] + suite.peers[case.op]
            if not implementations or implementation.name in implementations
        ]
        if not listed:
            continue
        found = measure_case(case, suite.functions[case.op], listed, where, top, rounds, seed)
        records += [record | report.of_header(header) for record in found]
        report.print_case(case, found)
        header["seconds"] = round(time.monotonic() - begun, 1)
        if out is not None:
            report.write(out, header, records)  # after every case: a crash loses one
    report.print_end(header, out)
    if plots is not None:
        report.plot(plots, header, records)
    return int(any(r["ours"] and r["check"].startswith("failed") for r in records))


def _known(option: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(option, name, f"must be one of {', '.join(dict.fromkeys(known))}")


def _device(name: str, tiny: bool, suite: Suite) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        command = f"kalmagrove bench {suite.name} --device cpu --tiny"
        raise KalmaGroveError(f"there is no GPU; try {command}")
    if name == "cpu" and not tiny:
        raise KalmaGroveError("--device cpu needs --tiny: the full shapes would take hours")
    return torch.device(name)


def _header(suite: Suite, device: torch.device, top: Ceilings, rounds: int, seed: int) -> Record:
    cuda = device.type == "cuda"
    return environment() | {
        "suite": suite.name,
        "date": time.strftime("%Y-%m-%d"),
        "device": device.type,
        "driver": report.driver() if cuda else None,
        "dtype": str(_dtype(device)).removeprefix("torch."),
        "ceilings": top._asdict(),
        "launch_ms": launch_ms(device),
        "rounds": rounds,
        "seed": seed,
        "method": METHOD,
        "claims": cuda,  # times on a CPU are none
        "skipped": [],
    }


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure_case(
    case: Case,
    function: Function,
    implementations: Sequence[Implementation],
    device: torch.device,
    top: Ceilings,
    rounds: int,
    seed: int,
) -> list[Record]:
    """Records of all passes of all implementations; one without a time for each that is refused.

    function: what those without a function of their own compute.
    """
    generator = torch.Generator(device).manual_seed(seed)
    recorder = Recorder() if device.type == "cuda" else None
    records: list[Record] = []
    timed: list[tuple[Record, Task]] = []
    for computed, members in _by_function(function, implementations).items():
        sets = _input_sets(case, computed, generator, device)
        floors = _floors(computed.costs(case.shape, sets[0]), top)
        for implementation, verdict in _verdicts(case, computed, members, sets[0], device):
            record = _base(case, implementation, verdict)
            try:
                tasks = []
                if verdict.check == "ok":
                    tasks = _tasks(record, implementation, case, sets, floors, recorder, device)
            except torch.OutOfMemoryError as error:
                record["check"] = f"failed: several input sets: {str(error).splitlines()[0]}"
            timed += tasks
            records += [] if tasks else [record]
    measure([task for _, task in timed], rounds, device)
    records += [_with_times(record, task) for record, task in timed]
    records += _graph_backwards(records)
    del timed, recorder
    _release(device)
    order = [implementation.name for implementation in implementations]
    return sorted(records, key=lambda record: order.index(record["impl"]))


def _verdicts(
    case: Case,
    function: Function,
    members: Sequence[Implementation],
    inputs: Inputs,
    device: torch.device,
) -> list[tuple[Implementation, Verdict]]:
    """Raises KalmaGroveError where one leaves the device unusable."""
    truth = expected(case, function, inputs)
    found = []
    for implementation in members:
        verdict = check(case, implementation, truth)
        if verdict.check != "ok" and not _alive(device):
            raise KalmaGroveError(f"{implementation.name} broke the GPU at {case}: {verdict.check}")
        found.append((implementation, verdict))
    return found


def _floors(costs: dict[str, Cost], top: Ceilings) -> dict[str, float]:
    floors = {name: top.floor_ms(*cost) for name, cost in costs.items()}
    return floors | {"fwd+bwd": sum(floors.values())}


def _tasks(
    base: Record,
    implementation: Implementation,
    case: Case,
    sets: list[Inputs],
    floors: dict[str, float],
    recorder: Recorder | None,
    device: torch.device,
) -> list[tuple[Record, Task]]:
    """A record and a task for every pass, from the host and replayed; memory is measured here."""
    found = []
    for name, task in _passes(implementation, case, sets).items():
        record = base | {"pass": name, "graph": False, "method": "direct"}
        record |= {"calls": task.calls, "floor_ms": floors[name]}
        record["peak_extra_bytes"] = peak_extra_bytes(task, device)
        found.append((record, task))
        if recorder is not None and name != "bwd":
            found += _captured(record, task, recorder, device)
    return found


def _by_function(
    function: Function, implementations: Sequence[Implementation]
) -> dict[Function, list[Implementation]]:
    groups: dict[Function, list[Implementation]] = {}
    for implementation in implementations:
        groups.setdefault(implementation.function or function, []).append(implementation)
    return groups


def _input_sets(
    case: Case, function: Function, generator: torch.Generator, device: torch.device
) -> list[Inputs]:
    def fresh() -> Inputs:
        return function.inputs(case.shape, generator, _dtype(device))

    one = fresh()
    return [one, *(fresh() for _ in range(sets_for(list(one.values()), device) - 1))]


def _base(case: Case, implementation: Implementation, verdict: Verdict) -> Record:
    return {
        "op": case.op,
        "impl": implementation.name,
        "ours": implementation.backend is not None,
        "shape": case.shape,
        "pass": None,
        "graph": None,
        "median_ms": None,
        "min_ms": None,
        "peak_extra_bytes": None,
        "floor_ms": None,
        "of_floor": None,
        "check": verdict.check,
        "errors": verdict.errors,
    }


def _passes(implementation: Implementation, case: Case, sets: list[Inputs]) -> dict[str, Task]:
    """One task a pass: the forward pass alone where there is nothing to differentiate by."""
    wanted = [list(leaves(inputs).values()) for inputs in sets]

    def forward(_: Any) -> None:
        for inputs in sets:
            implementation.run(inputs, case.shape)

    def outcomes() -> list[torch.Tensor]:
        return [first(implementation.run(inputs, case.shape)) for inputs in sets]

    def backward(ys: list[torch.Tensor]) -> None:
        for i, inputs in enumerate(sets):
            torch.autograd.grad(ys[i], wanted[i], inputs["dy"])

    def both(_: Any) -> None:
        for i, inputs in enumerate(sets):
            y = first(implementation.run(inputs, case.shape))
            torch.autograd.grad(y, wanted[i], inputs["dy"])

    calls = len(sets)
    if not wanted[0]:
        return {"fwd": Task(forward, calls)}
    return {
        "fwd": Task(forward, calls),
        "bwd": Task(backward, calls, prepare=outcomes),
        "fwd+bwd": Task(both, calls),
    }


def _captured(
    record: Record, task: Task, recorder: Recorder, device: torch.device
) -> list[tuple[Record, Task]]:
    """The pass as a graph, or nothing and the reason in the record."""
    try:
        with no_waiting(device):
            task.timed(task.prepare())
        replay = recorder.capture(task)
    except RuntimeError as error:
        record["not_captured"] = str(error).splitlines()[0][:200]
        return []
    return [(record | {"graph": True, "peak_extra_bytes": None}, replay)]


def _with_times(record: Record, task: Task) -> Record:
    times = {"median_ms": task.median, "min_ms": min(task.samples)}
    return _of_floor(record | {name: round(ms, 6) for name, ms in times.items()})


def _of_floor(record: Record) -> Record:
    return record | {"of_floor": round(record["median_ms"] / record["floor_ms"], 3)}


def _graph_backwards(records: list[Record]) -> list[Record]:
    """bwd as the difference of the replayed passes."""
    replayed: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["graph"]:
            replayed.setdefault(record["impl"], {})[record["pass"]] = record
    return [
        _of_floor(
            passes["fwd+bwd"]
            | {"pass": "bwd", "method": "difference"}
            | {
                name: round(passes["fwd+bwd"][name] - passes["fwd"][name], 6)
                for name in ("median_ms", "min_ms", "floor_ms")
            }
        )
        for passes in replayed.values()
        if {"fwd", "fwd+bwd"} <= set(passes)
    ]


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _alive(device: torch.device) -> bool:
    """False after an error of the device that nothing in this process can clear."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

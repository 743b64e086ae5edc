"""Which layout trains a model fastest on the processes there are: `kalmagrove bench layouts`.

Each layout trains the same model on the same random tokens for a few steps, in one run of the same
processes; a profiler looks at one more step. Beside it, NCCL's all-to-all alone.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from kalmagrove.bench import trace
from kalmagrove.config import Run
from kalmagrove.config.counts import parameter_count
from kalmagrove.engine import build_engine, connect, disconnect
from kalmagrove.engine.engine import Batch, Engine
from kalmagrove.nn import build_model
from kalmagrove.nn.dispatch import Balanced
from kalmagrove.parallel import Groups, all_gather_object, all_reduce_max, all_reduce_sum, barrier
from kalmagrove.track import communication_estimate, flops_per_token, memory_estimate
from kalmagrove.track.phases import ALLTOALL

WARMUP = 2
EXCHANGED = [2**20 * size for size in (1, 4, 16, 64, 256)]  # bytes a rank sends in all


class Layout(NamedTuple):
    """A layout to try: `aside` is whether a shared grove may run beside the all-to-all."""

    name: str
    overrides: list[str]
    aside: bool = True


def candidates(ranks: int) -> list[Layout]:
    """The plain layouts of so many ranks, each dimension taken as far as it goes."""
    n = ranks
    listed = [Layout(f"dp {n}, ZeRO {stage}", [f"zero.stage={stage}"]) for stage in (1, 2, 3)]
    if n > 1:
        listed += [
            Layout(f"ep {n}", [f"parallel.ep={n}"]),
            Layout(f"ep {n}, nothing beside it", [f"parallel.ep={n}"], aside=False),
            Layout(f"tp {n}", [f"parallel.tp={n}"]),
            Layout(f"tp {n}, sequence", [f"parallel.tp={n}", "parallel.sequence=true"]),
            Layout(
                f"tp {n}, ep {n}, sequence",
                [f"parallel.tp={n}", f"parallel.ep={n}", "parallel.sequence=true"],
            ),
            Layout(f"cp {n}", [f"parallel.cp={n}"]),
        ]
    return listed


def run_all(
    runs: list[tuple[Layout, Run | str]], steps: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure every layout in this process and its fellows.

    Args:
        runs: with each layout its run, `model.vocab_size` known; or why there is none.
        steps: timed ones, after two that are not.
        keep: given on rank 0 all that is known so far, after each layout.
    """
    first = next(run for _, run in runs if isinstance(run, Run))
    device = connect(first)
    count = parameter_count(first.model)
    result = {
        "ranks": dist.get_world_size(),
        "parameters": count.total,
        "active_parameters": count.active,
        "tokens_per_step": first.batch.tokens,
        "alltoall": exchange_alone(device) if dist.get_world_size() > 1 else [],
    }

    def one(run: Run, groups: Groups, layout: Layout) -> dict[str, Any]:
        return measure(run, groups, steps, layout.aside)

    for records in in_turn(runs, device, one):
        if dist.get_rank() == 0:
            print(line(records[-1]), flush=True)
            keep(result | {"layouts": records})
    disconnect()


def in_turn(
    runs: list[tuple[Layout, Run | str]],
    device: torch.device,
    measured: Callable[[Run, Groups, Layout], dict[str, Any]],
) -> Iterator[list[dict[str, Any]]]:
    """The records of all layouts so far, after each: what was measured, or why it failed."""
    records: list[dict[str, Any]] = []
    made = False
    for layout, run in runs:
        record: dict[str, Any] = {"layout": layout.name, "overrides": layout.overrides}
        if isinstance(run, str):
            record["failed"] = run
        else:
            if made:
                Groups.reset()
            groups, made = Groups.init(run.parallel, device, run.launch.timeout), True
            try:
                record |= measured(run, groups, layout)
            except RuntimeError as error:  # out of memory, mostly; ranks are alike
                record["failed"] = str(error).splitlines()[0]
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        records.append(record)
        yield records


def line(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"{record['layout']:28} {record['failed']}"
    text = f"{record['layout']:28} {record['tokens_per_second']:12,.0f} tokens/s"
    text += f"  loss {record['losses'][0]:.4f}"
    if "peak_bytes" in record:
        text += f"  {record['peak_bytes'] / 1e9:.1f} GB"
    if split := record.get("split"):
        shares = ("compute", "exposed", "hidden", "idle")
        text += "  " + ", ".join(f"{name} {split[name] / split['span']:.0%}" for name in shares)
    return text


def measure(run: Run, groups: Groups, steps: int, aside: bool) -> dict[str, Any]:
    """Train `steps` timed steps, then a profiled one."""
    cuda = groups.device.type == "cuda"
    torch.manual_seed(run.seed)
    with ExitStack() as patched:
        if not aside:
            patched.enter_context(mock.patch.object(Balanced, "overlaps", False))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        engine = build_engine(build_model(run.model, groups), run, groups)
        batches = random_batches(run, groups)
        numbers = count()

        def step() -> tuple[float, float]:
            micro = [next(batches) for _ in range(engine.accumulation)]
            barrier(groups.world)
            engine.timer.begin()
            begun = time.perf_counter()
            loss, _ = engine.train_step(micro, next(numbers))
            if cuda:
                torch.cuda.synchronize()
            seconds = torch.tensor(time.perf_counter() - begun, device=groups.device)
            mean = all_reduce_sum(loss.clone(), groups.world) / groups.world.size
            return float(all_reduce_max(seconds, groups.world)), float(mean)

        taken = [step() for _ in range(WARMUP)]
        before = engine.timer.seconds()
        taken += [step() for _ in range(steps)]
        after = engine.timer.seconds()
        phases = {phase: (after[phase] - before[phase]) / steps for phase in after}  # this rank's
        seconds = [s for s, _ in taken[WARMUP:]]
        record = {
            "step_seconds": [round(s, 5) for s in seconds],
            "phase_seconds": {phase: round(s, 5) for phase, s in phases.items()},
            "tokens_per_second": run.batch.tokens / statistics.median(seconds),
            "losses": [loss for _, loss in taken],
            "model_flops_per_second": flops_per_token(run.model, run.data.seq_len).training
            * run.batch.tokens
            / statistics.median(seconds),
            **traffic_of(engine, groups, phases),
            **predictions(run, groups, "bf16" if engine.dtype == torch.bfloat16 else "fp32"),
        }
        if cuda:
            used = (
                torch.cuda.max_memory_allocated() - held
            )  # DeepSpeed keeps some of the last one's
            peak = torch.tensor(used, device=groups.device)
            record["peak_bytes"] = int(all_reduce_max(peak, groups.world))
            record |= profiled(lambda: step()[0], groups)
    return record


def random_batches(run: Run, groups: Groups) -> Iterator[Batch]:
    """Rows of random tokens: the same ones in every layout, each read by its data-parallel rank."""
    assert run.model.vocab_size is not None
    generator = torch.Generator().manual_seed(run.seed)
    micro, seq_len, dp = run.batch.micro, run.data.seq_len, groups.dp
    while True:
        shape = (dp.size * micro, seq_len + 1)
        rows = torch.randint(run.model.vocab_size, shape, generator=generator)
        own = rows[dp.rank * micro : (dp.rank + 1) * micro]
        yield {
            "tokens": own[:, :-1].contiguous(),
            "targets": own[:, 1:].contiguous(),
            "normalizer": float(micro * seq_len),
        }


def traffic_of(engine: Engine, groups: Groups, phases: Mapping[str, float]) -> dict[str, Any]:
    """All-to-alls, mean over ranks: bytes to other ranks in the last step, and seconds a step.

    Args:
        phases: seconds a step, of this rank.
    """
    metrics = engine.metrics()
    if "alltoall_bytes" not in metrics:
        return {}
    sent = float(metrics["alltoall_bytes"])
    pair = torch.tensor([sent, phases[ALLTOALL]], dtype=torch.float64, device=groups.device)
    sent, seconds = (all_reduce_sum(pair, groups.world) / groups.world.size).tolist()
    return {"alltoall_bytes": sent, "alltoall_seconds": seconds}


def predictions(run: Run, groups: Groups, precision: str) -> dict[str, Any]:
    """What the dry run says about a rank: bytes of memory, and bytes sent in a step."""
    ranks = groups.world.size
    memory = {row.component: row.bytes for row in memory_estimate(run, ranks, precision)}
    sent = {row.kind: row.bytes for row in communication_estimate(run, ranks, precision)}
    return {"predicted_memory": memory, "predicted_sent": sent}


def profiled(step: Callable[[], float], groups: Groups) -> dict[str, Any]:
    """One step under the profiler: where this rank's time went, what NCCL did, one exchange close
    up.

    The profiler slows the host, so `idle` is an upper bound where `profiled_seconds` is larger than
    the timed steps. exchange_seconds: of each send-receive kernel that of the rank that came last
    to it, so without the others' waiting; summed.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        kernels = trace.read_trace(path)
    record = {
        "profiled_seconds": seconds,
        "split": trace.split(kernels),
        "collectives": trace.collectives(kernels),
    }
    exchanges = [i for i, k in enumerate(kernels) if k.communicates and trace.ALL_TO_ALL in k.name]
    own = [kernels[i].end - kernels[i].begin for i in exchanges]
    everywhere = all_gather_object(own, groups.world)
    if exchanges and len({len(times) for times in everywhere}) == 1:
        record["exchange_seconds"] = sum(map(min, zip(*everywhere, strict=True))) / 1e6
    large = sorted(exchanges, key=lambda i: kernels[i].begin - kernels[i].end)[
        : len(exchanges) // 3
    ]
    if large:
        middle = sorted(large)[len(large) // 2]
        record["window"] = trace.window(kernels, middle, before=40, after=80)
    return record


def exchange_alone(device: torch.device, repeats: int = 20) -> list[dict[str, float]]:
    """An even all-to-all of all ranks with nothing beside it: median seconds by bytes sent.

    bytes: a rank sends to the others together; bytes_per_second: these over the seconds.
    """
    ranks, found = dist.get_world_size(), []
    for size in EXCHANGED if device.type == "cuda" else EXCHANGED[:1]:
        numbers = size // 2 // max(1, ranks - 1) * ranks
        x = torch.randn(numbers, device=device).to(torch.bfloat16)
        y = torch.empty_like(x)
        times = []
        for _ in range(repeats + 3):
            dist.barrier()
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            dist.all_to_all_single(y, x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        seconds, sent = statistics.median(times[3:]), 2 * numbers * (ranks - 1) / ranks
        found.append({"bytes": sent, "seconds": seconds, "bytes_per_second": sent / seconds})
    return found

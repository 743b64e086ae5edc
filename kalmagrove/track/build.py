"""Opens what measures a run: its price, its counters of energy, and `Meters` with them."""

import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console as RichConsole

from kalmagrove.config import ConfigError, Training
from kalmagrove.config.attempts import Attempt, process_age
from kalmagrove.track.cost import Cost
from kalmagrove.track.devices import peak_tflops
from kalmagrove.track.energy import Energy
from kalmagrove.track.gather import Groups
from kalmagrove.track.meters import Meters
from kalmagrove.track.sinks import check_packages
from kalmagrove.track.summary import Facts


def build_meters(
    run: Training,
    run_dir: Path,
    groups: Groups,
    *,
    params_total: int,
    params_active: int,
    flops_per_token: float,
    forward_flops_per_token: float | None = None,
    hardware_flops_per_token: float | None = None,
    val_bytes_per_token: float | None = None,
    val_split_tokens: int | None = None,
    baselines: Mapping[str, float | None] | None = None,
    energy: Energy | None = None,
    attempt: Attempt | None = None,
    started: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    screen: RichConsole | None = None,
) -> Meters:
    """Open the run folder's ledger and console. A collective call: every rank makes it.

    Args:
        groups: a `kalmagrove.parallel.Groups`.
        flops_per_token: model FLOPs of a training step, for the utilisation (`track.flops`).
        forward_flops_per_token: those of an evaluation; None: unknown.
        hardware_flops_per_token: what is computed for it, what is computed twice too.
        val_bytes_per_token: held-out UTF-8 bytes per predicted token.
        val_split_tokens: predicted tokens of the held-out split.
        baselines: `unigram_nats` and `bigram_nats` of the held-out split.
        energy: counts since the run began to use some; None: from now on.
        attempt: this start, since which the devices cost; None: since this process began.
        started: the `clock`'s reading when the run began to cost, if `attempt` does not say it.
        screen: where the console shows; None: stdout.

    Raises:
        ConfigError: if a sink is asked for whose package is missing, or if dollars are capped or
            energy is priced and cannot be told.
    """
    check_packages(run.track)
    threads = torch.tensor(torch.get_num_threads(), device=groups.device)
    world = groups.world
    if world.size > 1:
        dist.all_reduce(threads, op=dist.ReduceOp.SUM, group=world.handle)
    cost = Cost.of(run.price, groups.device.type, world.size, int(threads.item()))
    facts = Facts(
        run=run.run_name,
        params_total=params_total,
        params_active=params_active,
        flops_per_token=flops_per_token,
        forward_flops_per_token=forward_flops_per_token,
        hardware_flops_per_token=hardware_flops_per_token,
        peak_tflops=_peak(run, groups.device),
        world_size=world.size,
        devices=cost.devices,
        unit=cost.unit,
        price=run.price.name,
        usd_per_device_hour=cost.usd_per_device_hour,
        device=groups.device,
        baselines=baselines or {},
        val_bytes_per_token=val_bytes_per_token,
        val_split_tokens=val_split_tokens,
    )
    energy = energy or Energy.of(groups.device)
    _check_prices(run, groups, cost, energy)
    if started is None:
        started = clock() - (process_age() if attempt is None else attempt.age)
    return Meters(
        run,
        run_dir,
        groups,
        facts,
        cost,
        energy,
        attempt=attempt.name if attempt else None,
        started=started,
        clock=clock,
        now=now,
        screen=screen,
    )


def _peak(run: Training, device: torch.device) -> float | None:
    """TFLOP/s of one GPU at most: the price's, or that of its name."""
    if device.type != "cuda":
        return None
    return run.price.peak_tflops or peak_tflops(torch.cuda.get_device_name(device))


def _check_prices(run: Training, groups: Groups, cost: Cost, energy: Energy) -> None:
    """Collective over all ranks, which raise together."""
    if run.budget.usd is not None and cost.usd_per_device_hour is None:
        raise ConfigError(
            "budget.usd",
            run.budget.usd,
            f"needs a price of a {cost.unit}, and price={run.price.name} has none",
            f"set price.usd_per_{cost.unit}_hour",
        )
    if cost.usd_per_kwh is None:
        return
    unknown = torch.tensor(int(math.isnan(sum(energy.used().values()))), device=groups.device)
    if groups.world.size > 1:
        dist.all_reduce(unknown, op=dist.ReduceOp.MAX, group=groups.world.handle)
    if unknown.item():
        raise ConfigError(
            "price.usd_per_kwh",
            cost.usd_per_kwh,
            "needs a counter of energy (NVML or RAPL), which a machine of the run does not have",
            "use null",
        )

"""The observer of a training: measures, prices and writes down what the loop reports.

`kalmagrove.engine.fit` calls it on every rank. Between lines it only adds on the device; every
`track.every` steps it fetches once, reduces over all ranks, and rank 0 writes one ledger line,
which console and W&B show. The mean over all ranks is right for any layout: a rank with a piece of
the rows has that piece's share of their loss, ranks with slices of one layer have the same loss.
(Shares of edges are means of the ranks' own shares; with expert parallelism these are of other
groves, however few tokens they have.)
"""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from rich.console import Console as RichConsole
from torch import Tensor

from kalmagrove.config import ConfigError, Training
from kalmagrove.track.budget import Pace, Watch
from kalmagrove.track.charts import COMM
from kalmagrove.track.console import Console
from kalmagrove.track.cost import Cost, Spent, Stored, process_age
from kalmagrove.track.devices import peak_tflops
from kalmagrove.track.energy import Energy, counter_of
from kalmagrove.track.ledger import Event, History, Ledger, Line
from kalmagrove.track.model_metrics import grove_shares, pack_metrics, split_metrics, to_scalars
from kalmagrove.track.phases import Phases
from kalmagrove.track.records import GridRefit, StepRecord
from kalmagrove.track.redact import scrub
from kalmagrove.track.sinks import Sink, check_packages, open_sinks
from kalmagrove.track.stragglers import Stragglers, rank_figures
from kalmagrove.track.summary import Facts, bits_per_byte, results_table, summarize, write_summary

log = logging.getLogger(__name__)


class Group(Protocol):
    """What is needed of a `kalmagrove.parallel.Group`."""

    @property
    def handle(self) -> dist.ProcessGroup | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...


class Groups(Protocol):
    """What is needed of `kalmagrove.parallel.Groups`."""

    @property
    def world(self) -> Group: ...
    @property
    def device(self) -> torch.device: ...


@dataclass
class Window:
    """Sums since the last ledger line. `loss` lies on the device."""

    loss: Tensor
    counted: int = 0  # steps in `loss`
    skipped: int = 0
    steps: int = 0
    train_seconds: float = 0.0  # without evaluations and checkpoints

    def add(self, record: StepRecord) -> None:
        self.steps += 1
        if record.skipped:
            self.skipped += 1  # its loss is not finite: one such would hide all others
        else:
            self.loss += record.loss.detach()
            self.counted += 1


class Meters:
    """See the module. Made by `build_meters`; all ranks make the same calls in the same order."""

    def __init__(
        self,
        run: Training,
        run_dir: Path,
        groups: Groups,
        facts: Facts,
        cost: Cost,
        energy: Energy,
        *,
        started: float,
        clock: Callable[[], float],
        now: Callable[[], datetime],
        screen: RichConsole | None,
    ) -> None:
        self._run, self._dir, self._groups = run, run_dir, groups
        self._facts, self._cost, self._energy = facts, cost, energy
        self._clock, self._started = clock, started
        self._main = groups.world.rank == 0
        self._before = Spent()  # what earlier sessions cost
        self._lost = 0.0  # device-seconds of lost work, all sessions
        self._joules_before: float | None = 0.0  # of earlier sessions
        self._joules: float | None = None  # at the last line
        self._used: float | None = 0.0  # joules of this session
        self._phases, self._stored = Phases(started), Stored(run_dir, started)
        self._measured: Mapping[str, float] = {}  # seconds of training by phase, at the last look
        self._split: Mapping[str, float] = {}  # and at the last line of steps
        self._failed = False
        self._alltoall = 0.0  # seconds of this session, part of forward and backward
        self._resumed: dict[str, Any] | None = None
        self._step = self._tokens = 0
        self._val_loss: float | None = None
        self._grad_norm: Tensor | float | None = None
        self._record: StepRecord | None = None
        self._window = self._new_window()
        self._window_tokens = 0
        self._shares: dict[str, list[float]] = {}  # of the groves, at the last line
        self._mark = clock()
        self._pace: tuple[int, float] | None = None  # step and time from which speed is reckoned
        self._stopped = False
        self._sinks: list[Sink] = []
        self._stragglers = Stragglers(groups.world.rank, groups.world.size)
        history = History(())
        if self._main:
            self._ledger = Ledger(run_dir / "ledger.jsonl", clock=clock, now=now)
            history = self._ledger.history()
            self._before, self._lost = history.spent, history.lost.device_seconds
            self._joules_before = history.joules
            title = f"{facts.run}  {facts.params_total / 1e6:,.1f}M parameters"
            if facts.params_active != facts.params_total:
                title += f", {facts.params_active / 1e6:,.1f}M active"
            self._console = Console(
                run.track.console, title, run.steps, run_dir / "console.log", screen
            )
        self._recent, self._watch = Pace(history), Watch(run.budget, history)

    # What the loop calls

    def start(self, step: int, tokens: int) -> None:
        """Open the session: after a resume, before the first step."""
        self._step, self._tokens = step, tokens
        self._window, self._window_tokens = self._new_window(), tokens
        self._pace = None
        self._phases.add("startup", self._clock() - self._started)
        if self._main:
            self._look_at_storage()
            self._open_session(step, tokens)
            self._console.start(step)
        self._note_energy(self._energy.used())
        self._mark = self._clock()

    def step(self, record: StepRecord) -> None:
        """Count a step; writes a line every `track.every` steps and at the last."""
        self._record, self._step, self._tokens = record, record.step, record.tokens
        begun, first = self._mark, self._pace is None
        self._window.add(record)
        self._alltoall += float(record.model_metrics.get("alltoall_seconds", 0.0))
        if not record.skipped:
            self._grad_norm = record.grad_norm
        if record.step % self._run.track.every == 0 or record.step >= self._run.steps:
            self._flush()
        else:
            self._count_training()
            if self._main:
                self._console.progress(record.step)
        if not first:
            self._recent.add(self._mark - begun)
        self._warn()

    def evaluated(self, step: int, tokens: int, nats: float, val_tokens: int) -> None:
        """Note a held-out loss, in nats per token, and of how many tokens it is the mean."""
        seconds = self._recent.evaluation = self._pause("evaluation")
        self._val_loss = nats
        if self._main and not math.isfinite(nats):
            log.warning("the held-out loss at step %s is %s", step, nats)
        self._note(
            "eval",
            step,
            tokens,
            val_loss=nats,
            val_bits_per_byte=bits_per_byte(nats, self._facts.val_bytes_per_token),
            val_tokens=val_tokens,
            seconds=round(seconds, 3),
        )

    def checkpointed(self, step: int, tokens: int, path: Path, seconds: float) -> None:
        """Note a saved checkpoint. Closes the averages: a resumed run's lines will be the same."""
        self._recent.checkpoint = self._pause("checkpoint")
        if self._main:
            self._look_at_storage()
        if self._window.steps:
            self._flush()
        facts: dict[str, Any] = {"path": self._place(path), "seconds": round(seconds, 3)}
        if self._shares:
            facts["shares"] = self._shares
        self._note("checkpoint", step, tokens, **facts)

    def unsaved(self, step: int, tokens: int, reason: str) -> None:
        """Note a save that failed; what was written of it is gone."""
        self._pause("checkpoint")
        self._note("unsaved", step, tokens, reason=reason)

    def skipped(self, step: int, reason: str) -> None:
        """Note a step without an update."""
        self._note("skip", step, self._tokens, reason=reason)

    def refitted(self, step: int, tokens: int, grids: Mapping[str, GridRefit]) -> None:
        """Note spline grids that were moved to their data, by layer and grove."""
        facts = {name: asdict(grid) for name, grid in grids.items()}
        self._note("refit", step, tokens, grids=facts)

    def stop(self, status: str, **facts: Any) -> None:
        """Close the run: last line, summary.json and results table. A second call does nothing.

        Args:
            status: done | stopped | budget | failed | hung. After the last two no other rank is
                waited for.
            facts: JSON values for the last line and the summary; `step`, if given, is the last one.
        """
        if self._stopped:
            return
        self._stopped, self._failed = True, status in ("failed", "hung")
        self._step = facts.pop("step", self._step)
        facts = {key: scrub(fact) if isinstance(fact, str) else fact for key, fact in facts.items()}
        if not self._failed:
            if self._window.steps:
                self._flush()
            self._measure_energy()
        if not self._main:
            return
        if status == "budget":
            facts["budget"] = self._watch.met
        self._console.stop()
        self._note(
            "stop",
            self._step,
            self._tokens,
            status=status,
            unit=self._cost.unit,
            joules=self._joules,
            **facts,
        )
        summary = summarize(self._ledger.history(), self._facts, status=status, **facts)
        write_summary(self._dir, summary)
        if summary["val_loss_nats"] is not None and status == "done":
            self._console.show(results_table(summary))
        for sink in self._sinks:
            if said := sink.close(summary, exit_code=int(self._failed)):
                self._console.note(said)
        self._console.close()
        self._ledger.close()

    @property
    def spent(self) -> Spent:
        """Up to this moment, earlier sessions and lost work included. Exact on rank 0."""
        now = self._clock()
        stored = self._stored.byte_seconds(now)
        return self._before.plus(self._cost, now - self._started, self._used, stored)

    def over_budget(self) -> str | None:
        """Which cap leaves no room for another step and what follows it; None: there is room.

        Rank 0 alone can say: None on the others.
        """
        if not self._main or not self._watch.caps:
            return None
        step, recent = self._step + 1, self._recent
        ahead = recent.step + recent.checkpoint
        if step == self._run.steps or step % self._run.eval.every == 0:
            ahead += recent.evaluation
        then, more = self._spent_after(ahead), self._run.batch.tokens
        return self._watch.reached(self.spent, then, self._tokens, more)

    def state_dict(self) -> dict[str, Any]:
        """The ledger's position and the cost so far, for a checkpoint."""
        spent = self.spent
        return {
            "lines": self._ledger.lines if self._main else 0,
            "bytes": self._ledger.bytes if self._main else 0,
            "device_seconds": spent.device_seconds,
            "wall_seconds": spent.wall_seconds,
            "lost_device_seconds": self._lost,
            "usd": None if spent.usd is None else float(round(spent.usd, 6)),
            "joules": self._joules,
            "val_loss": self._val_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint; call before `start`, which reckons what was lost since."""
        self._resumed = dict(state)
        self._val_loss = state["val_loss"]

    # How it does it

    def _open_session(self, step: int, tokens: int) -> None:
        """Write `start` or `resume`, with what was lost since the checkpoint that is continued."""
        reached = self._ledger.history().reached
        old = self._resumed
        if old and old["device_seconds"] > self._before.device_seconds:
            # The checkpoint knows more: another folder's, or a kill right after the save.
            usd = None if old["usd"] is None else Decimal(str(old["usd"]))
            told = old["device_seconds"] / self._cost.devices  # by checkpoints of older versions
            wall = old.get("wall_seconds", told)
            self._before = Spent(old["device_seconds"], usd, wall)
            self._lost = old["lost_device_seconds"]
            self._joules_before = old["joules"]
        lasted = self._before.device_seconds - self._lost
        if old:
            lasted = old["device_seconds"] - old["lost_device_seconds"]
        elif step == 0:
            lasted = 0.0
        lost = max(0.0, self._before.device_seconds - self._lost - lasted)
        self._lost += lost
        self._note(
            "resume" if step else "start",
            step,
            tokens,
            lost_steps=max(0, reached[0] - step),
            lost_tokens=max(0, reached[1] - tokens),
            lost_device_seconds=round(lost, 3),
            run=self._facts.run,
            world_size=self._facts.world_size,
            devices=self._cost.devices,
            unit=self._cost.unit,
            price=self._price_text(),
            usd_per_device_hour=self._cost.usd_per_device_hour,
            usd_per_kwh=self._cost.usd_per_kwh,
            usd_per_gb_month=self._cost.usd_per_gb_month,
            flops_per_token=self._facts.flops_per_token,
        )
        config, history = self._run.model_dump(mode="json"), self._ledger.history().effective()
        self._sinks = open_sinks(self._run.track, self._dir, self._facts.run, config, history)

    def _place(self, path: Path) -> str:
        """Relative to the run folder, which may be moved."""
        return str(path.relative_to(self._dir) if path.is_relative_to(self._dir) else path)

    def _price_text(self) -> str:
        rate = self._cost.usd_per_device_hour
        if rate is None:
            return "unknown"
        return f"${rate:g} a {self._cost.unit}-hour ({self._run.price.name})"

    def _flush(self) -> None:
        """Write the line of the steps since the last one. Collective over all ranks."""
        assert self._record is not None
        record, window = self._record, self._window
        figures = self._fetch(record, window)
        self._count_training()  # after the fetch, which waits for the device
        rate = (record.tokens - self._window_tokens) / max(window.train_seconds, 1e-9)
        left = self._seconds_left(record.step)
        self._window, self._window_tokens = self._new_window(), record.tokens
        if not self._main:
            return
        whole = None if left is None else self._spent_after(left)
        interval = self._left_interval(record.step, left)
        usd_interval = [
            None if end is None else _dollars(self._spent_after(end)) for end in interval
        ]
        before, self._split = self._split, self._training_seconds()
        self._note(
            "step",
            record.step,
            record.tokens,
            lr=record.lr,
            val_loss=self._val_loss,
            averaged=window.counted,
            skipped=window.skipped,
            tokens_per_s=round(rate, 3),
            train_seconds=round(window.train_seconds, 6),
            step_seconds=round(window.train_seconds / window.steps, 6),
            seconds_split={k: round(s - before.get(k, 0.0), 6) for k, s in self._split.items()},
            alltoall_seconds=round(self._alltoall, 6),
            seconds_left=None if left is None else round(left, 1),
            seconds_left_interval=[None if end is None else round(end, 1) for end in interval],
            usd_projected=_dollars(whole),
            usd_interval=usd_interval,
            tokens_per_s_device=round(rate / self._cost.devices, 3),
            mfu=self._facts.utilisation(self._facts.flops_per_token, rate),
            hfu=self._facts.utilisation(self._facts.hardware_flops_per_token, rate),
            **figures,
        )

    def _fetch(self, record: StepRecord, window: Window) -> dict[str, Any]:
        """One transfer from the device: mean loss, gradient norm, metrics; and peak memory."""
        device = self._groups.device
        norm = float("nan") if self._grad_norm is None else self._grad_norm
        means, largest = split_metrics(record.model_metrics)
        layout, packed = pack_metrics(
            {
                "loss": window.loss,
                "counted": torch.tensor(float(window.counted)),
                "grad_norm": torch.as_tensor(norm),
                "joules": torch.tensor(self._energy.used(), dtype=torch.float64),
                "rank_seconds": self._stragglers.own(record.seconds(), window.steps),
                **{f"model/{name}": value for name, value in means.items()},
            },
            device,
        )
        memory = torch.tensor(peak_memory(device))
        reserved = torch.tensor(reserved_memory(device))
        top_layout, top = pack_metrics(
            {"peak_memory": memory, "reserved_memory": reserved, **largest}, device
        )
        world = self._groups.world
        if world.size > 1:
            dist.all_reduce(packed, op=dist.ReduceOp.SUM, group=world.handle)
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=world.handle)
        values, tops = layout.unpack((packed / world.size).cpu()), top_layout.unpack(top.cpu())
        loss, counted = values.pop("loss").item(), values.pop("counted").item()
        grad_norm = values.pop("grad_norm").item()
        self._note_energy(values.pop("joules").item() * world.size)
        ranks = rank_figures(values.pop("rank_seconds") * world.size)
        memory, reserved = tops.pop("peak_memory"), tops.pop("reserved_memory")
        values = {name.removeprefix("model/"): value for name, value in values.items()}
        self._shares = grove_shares(values)
        model = to_scalars(values | tops)
        if model.get("aux_loss") == 0:
            del model["aux_loss"]  # the model has none
        comm = {name: model.pop(name) for name in COMM if name in model}
        return {
            "loss": loss / counted if counted else None,
            "grad_norm": grad_norm,
            "joules": self._joules,
            "peak_memory": int(memory.item()),
            "reserved_memory": int(reserved.item()) or None,
            "load_cv": model.get("load_cv"),
            "out_of_range": model.get("out_of_range"),
            "model": model,
            "comm": comm,
            **ranks,
        }

    def _measure_energy(self) -> None:
        """Collective over all ranks."""
        world, device = self._groups.world, self._groups.device
        joules = torch.tensor(self._energy.used(), dtype=torch.float64, device=device)
        if world.size > 1:
            dist.all_reduce(joules, op=dist.ReduceOp.SUM, group=world.handle)
        self._note_energy(joules.item())

    def _note_energy(self, joules: float) -> None:
        """Take up what all ranks used in this session; NaN if one of them could not say."""
        before = math.nan if self._joules_before is None else self._joules_before
        total = before + joules
        self._used = joules if math.isfinite(joules) else None
        self._joules = round(total, 3) if math.isfinite(total) else None

    def _note(self, event: Event, step: int, tokens: int, **facts: Any) -> Line | None:
        """One event to ledger, console and W&B; rank 0 only."""
        if not self._main:
            return None
        facts["phases"] = self._phases.read(self._clock(), self._training_seconds())
        line = self._ledger.write(event, step, tokens, self.spent, **facts)
        self._console.line(line)
        for sink in self._sinks:
            sink.log(line)
        return line

    def _count_training(self) -> None:
        now = self._clock()
        self._window.train_seconds += now - self._mark
        self._mark = now
        if self._pace is None:  # the first step compiles and warms up: it says little of the others
            self._pace = self._step, now

    def _pause(self, phase: str) -> float:
        """Seconds since the last call that were not training but `phase`."""
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        self._phases.add(phase, seconds)
        return seconds

    def _training_seconds(self) -> Mapping[str, float]:
        """Of this session so far, by phase. A device that failed may never answer: not asked."""
        if self._record and not self._failed:
            self._measured = self._record.seconds()
        return self._measured

    def _look_at_storage(self) -> None:
        if self._cost.usd_per_gb_month is not None:
            self._stored.look(self._clock())

    def _spent_after(self, seconds: float) -> Spent:
        """What will have been spent in `seconds`, at the power used so far."""
        spent, age = self.spent, max(self._clock() - self._started, 1e-9)
        joules = None if self._used is None else self._used / age * seconds
        return spent.plus(self._cost, seconds, joules, self._stored.bytes * seconds)

    def _left_interval(self, step: int, left: float | None) -> tuple[float | None, float | None]:
        """Ends of the 90% interval of `left`; None: unknown."""
        margin = self._recent.margin(self._run.steps - step)
        if left is None or margin is None:
            return None, None
        return max(0.0, left - margin), left + margin

    def _warn(self) -> None:
        """Note when another share of a cap is used."""
        if not self._main or not self._watch.caps:
            return

        def project() -> list[Spent | None]:
            left = self._seconds_left(self._step)
            ends = (left, *self._left_interval(self._step, left))
            return [None if end is None else self._spent_after(end) for end in ends]

        last = self._run.steps * self._run.batch.tokens
        for notice in self._watch.notices(self.spent, self._tokens, project, last):
            self._note("budget", self._step, self._tokens, **asdict(notice))

    def _seconds_left(self, step: int) -> float | None:
        """By the session's mean pace, evaluations and checkpoints included."""
        remaining = self._run.steps - step
        if remaining <= 0:
            return 0.0
        if self._pace is None or step <= self._pace[0]:
            return None
        first, since = self._pace
        return (self._clock() - since) / (step - first) * remaining

    def _new_window(self) -> Window:
        return Window(torch.zeros((), dtype=torch.float64, device=self._groups.device))


def _dollars(spent: Spent | None) -> float | None:
    return None if spent is None or spent.usd is None else float(round(spent.usd, 6))


def build_meters(
    run: Training,
    run_dir: Path,
    groups: Groups,
    *,
    params_total: int,
    params_active: int,
    flops_per_token: float,
    hardware_flops_per_token: float | None = None,
    val_bytes_per_token: float | None = None,
    val_split_tokens: int | None = None,
    baselines: Mapping[str, float | None] | None = None,
    started: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    screen: RichConsole | None = None,
) -> Meters:
    """Open the run folder's ledger and console. A collective call: every rank makes it.

    Args:
        groups: a `kalmagrove.parallel.Groups`.
        flops_per_token: model FLOPs of a training step, for the utilisation (`track.flops`).
        hardware_flops_per_token: what is computed for it, what is computed twice too.
        val_bytes_per_token: held-out UTF-8 bytes per predicted token.
        val_split_tokens: predicted tokens of the held-out split.
        baselines: `unigram_nats` and `bigram_nats` of the held-out split.
        started: the `clock`'s reading when the run began to cost; None: this process's start.
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
    energy = Energy(counter_of(groups.device))
    _check_prices(run, groups, cost, energy)
    if started is None:
        started = clock() - process_age()
    return Meters(
        run,
        run_dir,
        groups,
        facts,
        cost,
        energy,
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
    unknown = torch.tensor(int(math.isnan(energy.used())), device=groups.device)
    if groups.world.size > 1:
        dist.all_reduce(unknown, op=dist.ReduceOp.MAX, group=groups.world.handle)
    if unknown.item():
        raise ConfigError(
            "price.usd_per_kwh",
            cost.usd_per_kwh,
            "needs a counter of energy (NVML or RAPL), which a machine of the run does not have",
            "use null",
        )


def reserved_memory(device: torch.device) -> int:
    """Bytes: the most that torch took from a GPU, its cache included; 0 on CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def peak_memory(device: torch.device) -> int:
    """Bytes: the most torch held on a GPU, or this process of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024

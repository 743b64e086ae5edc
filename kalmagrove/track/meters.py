"""The observer of a training: measures, prices and writes down what the loop reports.

`kalmagrove.engine.fit` calls it on every rank. Between lines it only adds on the device; every
`track.every` steps `Gather` fetches once and reduces over all ranks, and rank 0 writes one ledger
line, which console and W&B show.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from torch import Tensor

from kalmagrove.config import Training
from kalmagrove.config.attempts import beats, forget
from kalmagrove.track.bill import Bill
from kalmagrove.track.budget import Pace, Watch
from kalmagrove.track.console import Console
from kalmagrove.track.cost import Cost, Spent
from kalmagrove.track.energy import Energy
from kalmagrove.track.gather import Gather, Groups, Window
from kalmagrove.track.ledger import Event, History, Ledger, Line
from kalmagrove.track.phases import TRAINING, Phases
from kalmagrove.track.records import GridRefit, StepRecord
from kalmagrove.track.redact import scrub
from kalmagrove.track.sinks import Sink, open_sinks
from kalmagrove.track.summary import Facts, bits_per_byte, results_table, summarize, write_summary
from kalmagrove.track.wandb_sink import session_id

log = logging.getLogger(__name__)


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
        attempt: str | None,
        started: float,
        clock: Callable[[], float],
        now: Callable[[], datetime],
        screen: RichConsole | None,
    ) -> None:
        self._run, self._dir, self._groups, self._facts = run, run_dir, groups, facts
        self._clock, self._energy, self._phases = clock, energy, Phases(started)
        self._gather, self._main = Gather(groups), groups.world.rank == 0
        self._measured: Mapping[str, float] = {}  # seconds of training by phase, at the last look
        self._split: Mapping[str, float] = {}  # and at the last line of steps
        self._attempt = attempt
        self._stopped = self._failed = False
        self._resumed: dict[str, Any] | None = None
        self._step = self._tokens = 0
        self._val_loss: float | None = None
        self._grad_norm: Tensor | float | None = None
        self._record: StepRecord | None = None
        self._window, self._window_tokens = Window.on(groups.device), 0
        self._shares: dict[str, list[float]] = {}  # of the groves, at the last line
        self._mark = clock()
        self._sinks: list[Sink] = []
        history = History(())
        if self._main:
            self._ledger = Ledger(run_dir / "ledger.jsonl", clock=clock, now=now)
            history = self._ledger.history()
            title = f"{facts.run}  {facts.params_total / 1e6:,.1f}M parameters"
            if facts.params_active != facts.params_total:
                title += f", {facts.params_active / 1e6:,.1f}M active"
            self._console = Console(
                run.track.console, title, run.steps, run_dir / "console.log", screen
            )
        self._bill = Bill(cost, run_dir, history, started, clock, facts.world_size)
        self._pace = Pace(history, run, facts.val_split_tokens)
        self._watch = Watch(run.budget, history)

    # What the loop calls

    def start(self, step: int, tokens: int) -> None:
        """Open the session: after a resume, before the first step."""
        self._step, self._tokens = step, tokens
        self._window, self._window_tokens = Window.on(self._groups.device), tokens
        self._mark = self._bill.started
        self._end_pause("startup")
        if self._main:
            self._bill.look_at_storage()
            self._open_session(step, tokens)
            self._console.start(step)
        self._end_pause("startup")  # sinks may take seconds to open
        self._bill.use(self._energy.used())

    def step(self, record: StepRecord) -> None:
        """Count a step; writes a line every `track.every` steps and at the last."""
        self._record, self._step, self._tokens = record, record.step, record.tokens
        self._window.add(record)
        if not record.skipped:
            self._grad_norm = record.grad_norm
        if record.step % self._run.track.every == 0 or record.step >= self._run.steps:
            self._flush()
        else:
            self._count_training()
            if self._main:
                self._console.progress(record.step)
        self._warn()

    def pause(self) -> None:
        """Training rests from now on, until `evaluated`, `checkpointed` or `unsaved` says why."""
        self._energy.book("training")
        self._mark = self._clock()

    def evaluated(self, step: int, tokens: int, nats: float, val_tokens: int) -> None:
        """Note a held-out loss, in nats per token, and of how many tokens it is the mean."""
        seconds = self._end_pause("evaluation")
        self._pace.evaluated(step, seconds)
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

    def saving(self, step: int, tokens: int) -> None:
        """A checkpoint is begun, and written while training goes on. Closes the averages."""
        self._pace.waited(step, self._end_pause("checkpoint"))
        if self._window.steps:
            self._flush()

    def checkpointed(
        self, step: int, tokens: int, path: Path, seconds: float, saved: int | None = None
    ) -> None:
        """Note a saved checkpoint. Closes the averages: a resumed run's lines will be the same.

        Args:
            saved: the step of a checkpoint that was written in the background, in `seconds`; its
                `saving` has closed the averages. None: this step, and all waited for it.
        """
        waited = self._end_pause("checkpoint")
        self._pace.waited(step if saved is None else saved, waited)
        self._pace.checkpoint = waited if saved is None else seconds
        if self._main:
            self._bill.look_at_storage()
        if self._window.steps and saved is None:
            self._flush()
        facts: dict[str, Any] = {"path": self._place(path), "seconds": round(seconds, 3)}
        if saved is not None:
            facts["saved"] = saved
        if self._shares:
            facts["shares"] = self._shares
        self._note("checkpoint", step, tokens, **facts)

    def unsaved(self, step: int, tokens: int, reason: str) -> None:
        """Note a save that failed; what was written of it is gone."""
        self._end_pause("checkpoint")
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
            self._energy.book("training")
            self._bill.use(self._gather.joules(self._energy.used()))
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
            unit=self._bill.cost.unit,
            joules=self._bill.joules,
            phase_joules=self._bill.stages,
            **facts,
        )
        position, history = self._ledger.position(), self._ledger.history()
        summary = summarize(history, self._facts, status=status, ledger=position, **facts)
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
        return self._bill.spent

    def over_budget(self) -> tuple[str, str] | None:
        """Why a cap leaves no room for another step and what follows it, and with what the run goes
        on; None: there is room.

        Rank 0 alone can say: None on the others.
        """
        if not self._main or not self._watch.caps:
            return None
        step, pace = self._step + 1, self._pace
        ahead = pace.step + pace.checkpoint
        if step == self._run.steps or step % self._run.eval.every == 0:
            ahead += pace.evaluation
        spent, then = self.spent, self._bill.spent_after(ahead)  # in this order: time goes on
        return self._watch.reached(spent, then, self._tokens, self._run.batch.tokens)

    def state_dict(self) -> dict[str, Any]:
        """The ledger's position and the cost so far, for a checkpoint."""
        return {
            **(self._ledger.position() if self._main else {}),
            "attempt": self._attempt,
            **self._bill.state_dict(),
            "val_loss": self._val_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint; call before `start`, which reckons what was lost since."""
        self._resumed = dict(state)
        self._val_loss = state["val_loss"]

    # How it does it

    def _open_session(self, step: int, tokens: int) -> None:
        """Write `start` or `resume`, with what was lost since the checkpoint that is continued."""
        known, cost = self._ledger.history(), self._bill.cost
        reached = known.reached
        left = [beat for beat in beats(self._dir) if beat.attempt != self._attempt]
        lost, more = self._bill.resume(self._resumed, step, left, self._ledger.position()["ledger"])
        self._note(
            "resume" if step else "start",
            step,
            tokens,
            lost_steps=max(0, reached[0] - step),
            lost_tokens=max(0, reached[1] - tokens),
            lost_device_seconds=round(lost, 3),
            **more,
            attempt=self._attempt,
            run=self._facts.run,
            run_id=session_id(known.lines, self._facts.run, self._dir),
            folder=self._dir.name,
            world_size=self._facts.world_size,
            devices=cost.devices,
            unit=cost.unit,
            price=cost.text(self._run.price.name),
            usd_per_device_hour=cost.usd_per_device_hour,
            usd_per_kwh=cost.usd_per_kwh,
            usd_per_gb_month=cost.usd_per_gb_month,
            flops_per_token=self._facts.flops_per_token,
            forward_flops_per_token=self._facts.forward_flops_per_token,
            params_total=self._facts.params_total,
            params_active=self._facts.params_active,
            unigram_nats=self._facts.baselines.get("unigram_nats"),
            bigram_nats=self._facts.baselines.get("bigram_nats"),
        )
        forget(self._dir, [beat.attempt for beat in left])
        config, history = self._run.model_dump(mode="json"), self._ledger.history().effective()
        self._sinks = open_sinks(self._run.track, self._dir, self._facts.run, config, history)

    def _place(self, path: Path) -> str:
        """Relative to the run folder, which may be moved."""
        return str(path.relative_to(self._dir) if path.is_relative_to(self._dir) else path)

    def _flush(self) -> None:
        """Write the line of the steps since the last one. Collective over all ranks."""
        assert self._record is not None
        record, window, bill = self._record, self._window, self._bill
        self._energy.book("training")
        gathered = self._gather.line(record, window, self._grad_norm, self._energy.used())
        bill.use(gathered.joules)
        self._shares = gathered.shares
        self._count_training()  # after the fetch, which waits for the device
        rate = (record.tokens - self._window_tokens) / max(window.train_seconds, 1e-9)
        self._window, self._window_tokens = Window.on(self._groups.device), record.tokens
        if not self._main:
            return
        left = self._pace.left(record.step, self._clock())
        interval = self._pace.interval(record.step, left)
        before, self._split = self._split, self._training_seconds()
        split = {
            phase: round(self._split[phase] - before.get(phase, 0.0), 6)
            for phase in TRAINING
            if phase in self._split
        }
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
            seconds_split=split,
            seconds_left=None if left is None else round(left, 1),
            seconds_left_interval=[None if end is None else round(end, 1) for end in interval],
            usd_projected=bill.dollars_after(left),
            usd_interval=[bill.dollars_after(end) for end in interval],
            tokens_per_s_device=round(rate / bill.cost.devices, 3),
            mfu=self._facts.utilisation(self._facts.flops_per_token, rate),
            hfu=self._facts.utilisation(self._facts.hardware_flops_per_token, rate),
            joules=bill.joules,
            phase_joules=bill.stages,
            **gathered.figures,
        )

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
        self._pace.train(self._step, now - self._mark, now)
        self._mark = now

    def _end_pause(self, phase: str) -> float:
        """Seconds since the last call that were not training but `phase`."""
        now = self._clock()
        seconds, self._mark = now - self._mark, now
        self._phases.add(phase, seconds)
        self._energy.book(phase)
        return seconds

    def _training_seconds(self) -> Mapping[str, float]:
        """Of this session so far, by phase. A device that failed may never answer: not asked."""
        if self._record and not self._failed:
            self._measured = self._record.seconds()
        return self._measured

    def _warn(self) -> None:
        """Note when another share of a cap is used."""
        if not self._main or not self._watch.caps:
            return

        def project() -> list[Spent | None]:
            left = self._pace.left(self._step, self._clock())
            ends = (left, *self._pace.interval(self._step, left))
            return [None if end is None else self._bill.spent_after(end) for end in ends]

        last = self._run.steps * self._run.batch.tokens
        for notice in self._watch.notices(self.spent, self._tokens, project, last):
            self._note("budget", self._step, self._tokens, **asdict(notice))

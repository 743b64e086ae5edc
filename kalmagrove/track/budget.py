"""The caps of a run: how much of each is used, whether another step fits, what the run will take.

`Meters` asks after every step, on rank 0; `kalmagrove.engine.fit` ends the run. Dollars are those
of the ledger; hours are wall clock while processes run, over all sessions; tokens are those of the
steps that lasted.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from kalmagrove.config import Budget, Training
from kalmagrove.track.cost import Spent, show_usd
from kalmagrove.track.ledger import History

SHARES = (0.5, 0.8, 0.95)  # of a cap, at which a line says so
RECENT = 50  # steps by whose time the next ones are judged
BATCHES = 5  # of recent steps, by whose differences their mean's uncertainty is judged
FORWARD = 1 / 3  # of a step's time, about: the rest is the backward pass
Z90 = 1.645  # of the normal distribution, two-sided


class Pauses:
    """Seconds for which training rests every `every` steps, and at the last of `steps`.

    last: of earlier sessions, which stands for all until there is one in this; None: there is none.
    """

    def __init__(self, every: int, steps: int, last: float | None) -> None:
        self._every, self._steps, self.last = every, steps, last
        self._known: deque[float] = deque(maxlen=RECENT)
        self._step = -1  # of the last one

    def add(self, step: int, seconds: float) -> None:
        """Note one; a second one at the same step is a part of it."""
        if step == self._step:
            self._known[-1] += seconds
        else:
            self._known.append(seconds)
        self._step, self.last = step, self._known[-1]

    def left(self, step: int, guess: float = 0.0) -> tuple[float, float]:
        """Seconds of those to come after the training of `step`, and their variance.

        Args:
            guess: what one takes, if there was none.
        """
        passed = self._due(step if step == self._step else step - 1)
        more = self._due(self._steps) - passed
        mean = fmean(self._known) if self._known else guess if self.last is None else self.last
        return more * mean, _variance(self._known, more)

    def _due(self, step: int) -> int:
        """How many there are up to `step`."""
        return step // self._every + (step == self._steps and step % self._every > 0)


class Pace:
    """What the last steps, evaluations and checkpoints took, and what follows for the rest.

    val_tokens: of the whole held-out split; None: unknown.
    """

    def __init__(self, history: History, run: Training, val_tokens: int | None = None) -> None:
        self._whole = run.steps
        evaluated = min(val_tokens or 0, run.eval.max_tokens or math.inf)
        self._forward = evaluated / run.batch.tokens * FORWARD  # steps that last as long
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._step = 0
        self._since: tuple[int, float] | None = None  # step and time from which it is reckoned
        self._named = 0.0  # seconds since then of steps and pauses; the rest is idle
        lines, evals, saves = (history.series(e) for e in ("step", "eval", "checkpoint"))
        self._before: float = lines[-1]["step_seconds"] if lines else 0.0
        # of the last checkpoint, also if it was written in the background
        self.checkpoint: float = saves[-1]["seconds"] if saves else 0.0
        waited = 0.0 if saves and "saved" in saves[-1] else self.checkpoint
        evaluation = evals[-1]["seconds"] if evals else None
        self._evaluations = Pauses(run.eval.every, run.steps, evaluation)
        self._checkpoints = Pauses(run.checkpoint.every, run.steps, waited)

    def train(self, step: int, seconds: float, now: float) -> None:
        """Note what `step` took. A second call for a step adds to it.

        The session's first one compiles and warms up: it says little of others, and the pace is
        reckoned from its end.
        """
        if self._since is None:
            self._since = step, now
        elif step > self._step:
            self._steps.append(seconds)
            self._named += seconds
        elif self._steps:
            self._steps[-1] += seconds
            self._named += seconds
        self._step = step

    def evaluated(self, step: int, seconds: float) -> None:
        self._evaluations.add(step, seconds)
        self._named += seconds

    def waited(self, step: int, seconds: float) -> None:
        """Training stood still for the checkpoint of `step`, or for a part of it."""
        self._checkpoints.add(step, seconds)
        self._named += seconds

    @property
    def step(self) -> float:
        """Seconds that the next one takes; 0 as long as nothing is known."""
        return median(self._steps) if self._steps else self._before

    @property
    def evaluation(self) -> float:
        """Seconds of the last one; before the first what its tokens let expect."""
        last = self._evaluations.last
        return self._forward * self.step if last is None else last

    def left(self, step: int, now: float) -> float | None:
        """Seconds to the run's end: steps as long as the mean of the last 50, evaluations and
        checkpoints as often as they are due, and as idle between them as this session was so far;
        None: not known yet.
        """
        pauses = sum(seconds for seconds, _ in self._pauses(step))
        remaining = self._whole - step
        if remaining <= 0:
            return pauses
        if self._since is None or not self._steps:
            return None
        first, since = self._since
        idle = max(0.0, now - since - self._named) / max(1, step - first)
        return remaining * (fmean(self._steps) + idle) + pauses

    def interval(self, step: int, left: float | None) -> tuple[float | None, float | None]:
        """Ends of the 90% interval of `left`; None: unknown, as fewer than five steps are known.

        By batch means: steps that follow each other are alike, batches of them less so. Batches are
        taken as independent and normal, and their mean as known from them alone.
        """
        steps, size = list(self._steps), max(1, len(self._steps) // BATCHES)
        batches = [sum(steps[end - size : end]) for end in range(len(steps), size - 1, -size)]
        if left is None or len(batches) < 5:
            return None, None
        variance = _variance(batches, (self._whole - step) / size)
        variance += sum(pauses for _, pauses in self._pauses(step))
        margin = _t90(len(batches) - 1) * math.sqrt(variance)
        return max(0.0, left - margin), left + margin

    def _pauses(self, step: int) -> list[tuple[float, float]]:
        """Seconds that are left of each kind, and their variance."""
        return [self._evaluations.left(step, self.evaluation), self._checkpoints.left(step)]


def _variance(known: Sequence[float], more: float) -> float:
    """Of the sum of `more` like the `known`, around what their mean says of it; 0 if fewer than two
    are known.
    """
    if len(known) < 2:
        return 0.0
    return stdev(known) ** 2 * (more + more**2 / len(known))


def _t90(freedom: int) -> float:
    """Student's t, two-sided 90%: Abramowitz and Stegun 26.7.5, its first terms."""
    z = Z90
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


@dataclass(frozen=True)
class Notice:
    """A share of a cap is used. `whole`, `low`, `high`: what the run takes, in the cap's unit, and
    its 90% interval; None: unknown.
    """

    cap: str
    limit: float
    share: float
    whole: float | None
    low: float | None
    high: float | None


class Watch:
    """Keeps a run to its `budget`."""

    def __init__(self, budget: Budget, history: History) -> None:
        given = {"usd": budget.usd, "hours": budget.hours, "tokens": budget.tokens}
        self.caps: dict[str, float] = {k: cap for k, cap in given.items() if cap is not None}
        last = history.lines[-1] if history.lines else {}
        self.met: dict[str, float] = last.get("budget") or {}  # the cap that ended the run
        self._warned = dict.fromkeys(self.caps, 0.0)

    def reached(self, now: Spent, then: Spent, tokens: int, more: int) -> tuple[str, str] | None:
        """Why a cap leaves no room for a step, and with what the run goes on; None: all do.

        Args:
            then: what will be spent after another step, its evaluation and a checkpoint.
            more: tokens of a step.
        """
        have, want = used(now, tokens), used(then, tokens + more)
        for key, cap in self.caps.items():
            before, after = have[key], want[key]
            if before is None or after is None:
                return (
                    f"budget.{key}={cap:.12g} cannot be kept: what the run has cost is unknown",
                    f"budget.{key}=null",
                )
            if after <= cap and before < cap and self.met.get(key, 0.0) < cap:
                continue
            self.met = {key: cap}
            small = f" ({show(key, cap)})" if key == "hours" and cap < 1 else ""
            said = f"budget.{key}={cap:.12g}{small} is reached: {show(key, before)} spent"
            if before < cap:
                step = show(key, after - before)
                said += f", and another step with what follows it takes {step}"
            return said, "a higher cap"
        return None

    def notices(
        self, spent: Spent, tokens: int, project: Callable[[], Sequence[Spent | None]], last: int
    ) -> list[Notice]:
        """The caps of which another of `SHARES` is used since the last call.

        Args:
            project: what the whole run takes, and the two ends of the interval; None: unknown.
            last: tokens of the whole run.
        """
        found = []
        have = used(spent, tokens)
        for key, cap in self.caps.items():
            share = (have[key] or 0.0) / cap
            passed = max((s for s in SHARES if s <= share), default=0.0)
            if passed > self._warned[key]:
                self._warned[key] = passed
                ends = [None if end is None else used(end, last)[key] for end in project()]
                found.append(Notice(key, cap, share, *ends))
        return found


def used(spent: Spent, tokens: int) -> dict[str, float | None]:
    """In the units of the caps."""
    usd = None if spent.usd is None else float(spent.usd)
    return {"usd": usd, "hours": spent.wall_seconds / 3600, "tokens": float(tokens)}


def show(cap: str, amount: float | None) -> str:
    """An amount in the unit of `cap`, or of a smaller one of time.

    >>> show("usd", 1.5), show("hours", 2.25), show("tokens", 1e6), show("hours", None)
    ('$1.50', '2.25 hours', '1,000,000 tokens', '-')
    >>> show("usd", 0.000523), show("hours", 0.1604), show("hours", 0.0014)
    ('$0.000523', '9.62 min', '5.04 s')
    """
    if amount is None:
        return "-"
    if cap == "tokens":
        return f"{amount:,.0f} tokens"
    if cap == "usd":
        small = 0 < amount < 0.1
        return f"${amount:.{2 - math.floor(math.log10(amount))}f}" if small else show_usd(amount)
    if amount >= 1:
        return f"{amount:,.2f} hours"
    return f"{60 * amount:.3g} min" if amount >= 1 / 60 else f"{3600 * amount:.3g} s"

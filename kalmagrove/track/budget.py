"""The caps of a run: how much of each is used, whether another step fits, what the run will take.

`Meters` asks after every step, on rank 0; `kalmagrove.engine.fit` ends the run. Dollars are those
of the ledger; hours are wall clock while processes run, over all sessions; tokens are those of the
steps that lasted.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, stdev

from kalmagrove.config import Budget
from kalmagrove.track.cost import Spent, show_usd
from kalmagrove.track.ledger import History

SHARES = (0.5, 0.8, 0.95)  # of a cap, at which a line says so
RECENT = 50  # steps by whose time the next ones are judged
Z90 = 1.645  # of the normal distribution, two-sided


class Pace:
    """Seconds of the last steps, evaluations and checkpoints, those of earlier sessions first; and
    what follows for the rest of a run of `steps` steps.

    since: step and time from which this session's mean pace is reckoned; None: before its first.
    """

    def __init__(self, history: History, steps: int) -> None:
        self._whole = steps
        self.since: tuple[int, float] | None = None
        self._steps: deque[float] = deque(maxlen=RECENT)
        lines, evals, saves = (history.series(e) for e in ("step", "eval", "checkpoint"))
        self._before: float = lines[-1]["step_seconds"] if lines else 0.0
        self.evaluation: float = evals[-1]["seconds"] if evals else 0.0
        self.checkpoint: float = saves[-1]["seconds"] if saves else 0.0

    def begin(self, step: int, now: float) -> None:
        """A step is done. The session's first one compiles and warms up: it says little of others,
        and the pace is reckoned from its end.
        """
        if self.since is None:
            self.since = step, now

    def add(self, seconds: float) -> None:
        """Note a step."""
        self._steps.append(seconds)

    @property
    def step(self) -> float:
        """Seconds that the next one takes; 0 as long as nothing is known."""
        return median(self._steps) if self._steps else self._before

    def margin(self, steps: int) -> float | None:
        """Half the width of a 90% interval of the seconds that `steps` more take.

        As if they were independent and like the recent ones, whose mean is known from them alone.
        None while fewer than five are known.
        """
        known = len(self._steps)
        if known < 5:
            return None
        return Z90 * stdev(self._steps) * math.sqrt(steps + steps**2 / known)

    def left(self, step: int, now: float) -> float | None:
        """Seconds to the run's end by the session's mean pace, evaluations and checkpoints
        included; None: not known yet.
        """
        remaining = self._whole - step
        if remaining <= 0:
            return 0.0
        if self.since is None or step <= self.since[0]:
            return None
        first, since = self.since
        return (now - since) / (step - first) * remaining

    def interval(self, step: int, left: float | None) -> tuple[float | None, float | None]:
        """Ends of the 90% interval of `left`; None: unknown."""
        margin = self.margin(self._whole - step)
        if left is None or margin is None:
            return None, None
        return max(0.0, left - margin), left + margin


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

    def reached(self, now: Spent, then: Spent, tokens: int, more: int) -> str | None:
        """Which cap leaves no room for a step, and why; None: all do.

        Args:
            then: what will be spent after another step and its checkpoint.
            more: tokens of a step.
        """
        have, want = used(now, tokens), used(then, tokens + more)
        for key, cap in self.caps.items():
            before, after = have[key], want[key]
            if before is None or after is None:
                return f"budget.{key}={cap:.12g} cannot be kept: what the run has cost is unknown"
            if after <= cap and before < cap and self.met.get(key, 0.0) < cap:
                continue
            self.met = {key: cap}
            return (
                f"budget.{key}={cap:.12g} is reached: {show(key, before)} spent, and another step "
                f"with its checkpoint takes {show(key, after - before)}"
            )
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
    """An amount in the unit of `cap`.

    >>> show("usd", 1.5), show("hours", 2.25), show("tokens", 1e6), show("hours", None)
    ('$1.50', '2.25 hours', '1,000,000 tokens', '-')
    """
    if amount is None:
        return "-"
    if cap == "usd":
        return show_usd(amount)
    return f"{amount:,.2f} hours" if cap == "hours" else f"{amount:,.0f} tokens"

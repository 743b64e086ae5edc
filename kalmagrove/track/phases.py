"""What the wall clock of a session went to: parts that add up to it.

`Meters` writes them, as the first rank sees them, with every ledger line. They begin anew with a
session, so they are exact whatever happened to the one before.
"""

from collections.abc import Mapping

ALLTOALL = "alltoall"
# measured by `kalmagrove.engine.timer`
TRAINING = ("data", "forward", "backward", ALLTOALL, "optimizer")
PHASES = ("startup", *TRAINING, "evaluation", "checkpoint", "idle")
# What an energy counter can tell apart, whose figure moves but a few times in a second: training is
# all phases of steps, and what is idle between them.
STAGES = ("startup", "training", "evaluation", "checkpoint")
LABELS = {ALLTOALL: "all-to-all"}


def label(phase: str) -> str:
    """How it is called where people read it."""
    return LABELS.get(phase, phase)


class Phases:
    """Seconds since `started`, by phase. `idle` is what no other phase has measured."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._own = {"startup": 0.0, "evaluation": 0.0, "checkpoint": 0.0}

    def add(self, phase: str, seconds: float) -> None:
        self._own[phase] += seconds

    def read(self, now: float, training: Mapping[str, float]) -> dict[str, float]:
        """Up to `now`; their sum is the session's wall time."""
        parts = {**self._own, **training}
        parts["idle"] = now - self._started - sum(parts.values())
        return {phase: round(parts.get(phase, 0.0), 6) for phase in PHASES}

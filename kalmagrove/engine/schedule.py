"""The learning rate as a pure function of the step.

`Engine` multiplies every parameter group's own rate by it before each update, so a resumed run
needs no schedule state.
"""

import math

from kalmagrove.config import Schedule


def lr_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Share of the peak rate used by the update that follows `step` finished ones.

    Linear warm-up reaches 1 at step `warmup - 1`; the last update of the run uses `final` (cosine,
    wsd). wsd holds the peak and falls linearly over the last `decay` part (arXiv:2404.06395,
    section 4).

    Args:
        step: 0 for the first update.
        steps: updates in the whole run.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    start = schedule.warmup
    if schedule.kind == "wsd":
        start = max(start, steps - max(1, round(schedule.decay * steps)))
    done = min(max((step + 1 - start) / max(1, steps - start), 0.0), 1.0)
    fall = done if schedule.kind == "wsd" else (1 - math.cos(math.pi * done)) / 2
    return 1.0 - (1.0 - schedule.final) * fall

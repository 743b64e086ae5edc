"""What the training loop tells its observers about one optimizer step.

The loop makes a `StepRecord` after every step, and a `GridRefit` for every spline grid it moved;
`Meters` sums them up and writes the ledger.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as one rank sees it. Tensors stay on their device, un-awaited."""

    step: int  # 1 after the first step
    tokens: int  # target positions read since step 0, over all ranks
    loss: Tensor  # scalar, cross-entropy in nats per token: mean over this rank's micro-batches
    grad_norm: Tensor | float  # global, before clipping
    lr: float
    skipped: bool = False  # a non-finite step: no update was made, and its loss is not averaged
    # of this session's steps so far, by phase; read only when a line is written
    seconds: Callable[[], Mapping[str, float]] = dict
    # of the step's last forward pass, the same names and sizes on every rank; read only when a line
    # is written
    model_metrics: Callable[[], Mapping[str, Tensor]] = dict


@dataclass(frozen=True)
class GridRefit:
    """What moving a grid did, on the data it was moved to."""

    before: float  # share of pre-activations out of range
    after: float
    error: float  # rms change of the edge functions

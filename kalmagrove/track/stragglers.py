"""Which rank the others wait for: each rank's own seconds a step, seen side by side.

`Meters` sends them along with the reduction that it makes for a line anyway. A rank's own seconds
are those of its data and forward passes, without all-to-alls: there, in the backward pass and in
the update ranks wait for one another, so that all of them take as long as the slowest. Where they
talk in the forward pass in other ways (tp, cp, ZeRO 3), only groups of them can be told apart.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OWN = ("data", "forward")
SHOWN = 0.1  # over the mean: from here on the console names the slowest rank


class Stragglers:
    """Of one rank, by the sums of the engine's timer."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._before = 0.0

    def own(self, seconds: Mapping[str, float], steps: int) -> Tensor:
        """[ranks] zeros but for this rank: its seconds a step since the last call.

        Args:
            seconds: of the session so far, by phase.
            steps: since the last call.
        """
        total = sum(seconds.get(phase, 0.0) for phase in OWN)
        found = torch.zeros(self._size, dtype=torch.float64)
        found[self._rank] = (total - self._before) / steps
        self._before = total
        return found


def rank_figures(seconds: Tensor) -> dict[str, Any]:
    """What the ledger says of all ranks' seconds [ranks]."""
    return {
        "rank_seconds_min": round(seconds.min().item(), 6),
        "rank_seconds_mean": round(seconds.mean().item(), 6),
        "rank_seconds_max": round(seconds.max().item(), 6),
        "slowest_rank": int(seconds.argmax()),
    }


def straggler_text(line: Mapping[str, Any]) -> str | None:
    """For the console; None unless one rank stands out.

    >>> straggler_text({"rank_seconds_mean": 0.5, "rank_seconds_max": 0.6, "slowest_rank": 3})
    'rank 3 slow +20%'
    """
    mean = line.get("rank_seconds_mean")
    excess = line["rank_seconds_max"] / mean - 1 if mean else 0.0
    return f"rank {line['slowest_rank']} slow +{excess:.0%}" if excess > SHOWN else None

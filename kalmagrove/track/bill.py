"""What a run has cost so far, all its sessions and lost work included: seconds, dollars, joules.

`Meters` keeps it. Every rank has one; that of rank 0 is exact, the others know of their session
alone.
"""

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from kalmagrove.track.cost import Cost, Spent, Stored
from kalmagrove.track.ledger import History
from kalmagrove.track.phases import STAGES


class Bill:
    """Of a session that began at `started`, on top of what `history` tells of earlier ones.

    lost: device-seconds of lost work, all sessions. joules: of the whole run up to the last `use`,
    None if a part of them is unknown. stages: joules of this session, by stage.
    """

    def __init__(
        self,
        cost: Cost,
        folder: Path,
        history: History,
        started: float,
        clock: Callable[[], float],
    ) -> None:
        self.cost, self.started, self._clock = cost, started, clock
        self.lost = history.lost.device_seconds
        self.joules: float | None = None
        self.stages: dict[str, float | None] = dict.fromkeys(STAGES)
        self._before, self._joules_before = history.spent, history.joules
        self._used: float | None = 0.0  # joules of this session
        self._stored = Stored(folder, started)

    @property
    def spent(self) -> Spent:
        """Up to this moment."""
        now = self._clock()
        stored = self._stored.byte_seconds(now)
        return self._before.plus(self.cost, now - self.started, self._used, stored)

    def spent_after(self, seconds: float) -> Spent:
        """What will have been spent in `seconds`, at the power used so far."""
        spent, age = self.spent, max(self._clock() - self.started, 1e-9)
        joules = None if self._used is None else self._used / age * seconds
        return spent.plus(self.cost, seconds, joules, self._stored.bytes * seconds)

    def dollars_after(self, seconds: float | None) -> float | None:
        """Those of `spent_after`; None: unknown."""
        return None if seconds is None else self.spent_after(seconds).dollars

    def use(self, joules: Mapping[str, float]) -> None:
        """Take up what all ranks used in this session, by stage; NaN if one could not say."""
        used = sum(joules.values())
        before = math.nan if self._joules_before is None else self._joules_before
        known, total = math.isfinite(used), before + used
        self._used = used if known else None
        self.joules = round(total, 3) if math.isfinite(total) else None
        self.stages = {stage: round(j, 3) if known else None for stage, j in joules.items()}

    def look_at_storage(self) -> None:
        """At the size of the run's folder, if that is paid for."""
        if self.cost.usd_per_gb_month is not None:
            self._stored.look(self._clock())

    def resume(self, old: Mapping[str, Any] | None, step: int) -> float:
        """Reckon what was lost since the checkpoint that is continued; returns device-seconds.

        Args:
            old: `state_dict` of the checkpoint; None: there is none.
            step: that the session begins after.
        """
        if old and old["device_seconds"] > self._before.device_seconds:
            # The checkpoint knows more: another folder's, or a kill right after the save.
            usd = None if old["usd"] is None else Decimal(str(old["usd"]))
            told = old["device_seconds"] / self.cost.devices  # by checkpoints of older versions
            self._before = Spent(old["device_seconds"], usd, old.get("wall_seconds", told))
            self.lost, self._joules_before = old["lost_device_seconds"], old["joules"]
        lasted = self._before.device_seconds - self.lost
        if old:
            lasted = old["device_seconds"] - old["lost_device_seconds"]
        elif step == 0:
            lasted = 0.0
        lost = max(0.0, self._before.device_seconds - self.lost - lasted)
        self.lost += lost
        return lost

    def state_dict(self) -> dict[str, Any]:
        spent = self.spent
        return {
            "device_seconds": spent.device_seconds,
            "wall_seconds": spent.wall_seconds,
            "lost_device_seconds": self.lost,
            "usd": spent.dollars,
            "joules": self.joules,
        }

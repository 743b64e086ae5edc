"""What a run has cost so far, all its sessions and lost work included: seconds, dollars, joules.

`Meters` keeps it. Every rank has one; that of rank 0 is exact, the others know of their session
alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmagrove.config.attempts import Beat
from kalmagrove.track.cost import Cost, Spent, Stored
from kalmagrove.track.ledger import History, Killed
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
        processes: int,
    ) -> None:
        self.cost, self.started, self._clock = cost, started, clock
        self._history, self._processes = history, processes
        self.lost = history.lost.device_seconds + history.inherited_lost
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

    def resume(
        self, old: Mapping[str, Any] | None, step: int, left: Sequence[Beat], ledger: str
    ) -> tuple[float, dict[str, Any]]:
        """Take up what was paid for and no line tells of, and reckon what is lost of it.

        Args:
            old: `state_dict` of the checkpoint that is continued; None: there is none.
            step: that the session begins after.
            left: by starts that are over.
            ledger: which one it is that `history` was read from; "": it has no line yet.

        Returns:
            Device-seconds lost since the checkpoint, and what the session's first line has to say:
            `killed`, the time of starts after their last line; `inherited`, what another ledger
            tells of.
        """
        lasted = 0.0 if step == 0 else self._before.device_seconds - self.lost
        killed = [found for beat in left if (found := self._killed(beat)) is not None]
        for one in killed:
            self._before += one.spent
        told: dict[str, Any] = {}
        if old:
            known = _spent(old, self.cost.devices)
            of = old.get("ledger")
            if bool(self._history.lines) if of is None else of == ledger:
                if known.device_seconds > self._before.device_seconds:
                    killed.append(Killed(old.get("attempt"), known - self._before))
                    self._before, self._joules_before = known, old["joules"]
            else:
                told = self._inherit(known, old)
            lasted = old["device_seconds"] - old["lost_device_seconds"]
        if killed:
            told["killed"] = [one.told() for one in killed]
        lost = max(0.0, self._before.device_seconds - self.lost - lasted)
        self.lost += lost
        return lost, told

    def _inherit(self, known: Spent, old: Mapping[str, Any]) -> dict[str, Any]:
        """What the run had cost by another ledger, as far as this one does not say so already."""
        history = self._history
        more = known - history.inherited
        if more.device_seconds <= 0 and history.lines:
            return {}
        lost = max(0.0, old["lost_device_seconds"] - history.inherited_lost)
        self.lost += lost
        self._before += more
        known_joules = history.inherited_joules
        joules = _sum(old["joules"], None if known_joules is None else -known_joules)
        self._joules_before = _sum(self._joules_before, joules)
        return {
            "inherited": {
                **more.told(),
                "lost_device_seconds": round(lost, 3),
                "joules": joules,
            }
        }

    def _killed(self, beat: Beat) -> Killed | None:
        """What a start cost after its last line; None: its end is written, or all is booked."""
        if beat.attempt in self._history.booked:
            return None
        lines = self._history.of_attempt(beat.attempt)
        if not lines:  # it died before its first one: priced as this one
            devices = round(self.cost.devices * beat.processes / self._processes)
            return Killed(beat.attempt, self._priced(self.cost, devices, beat.seconds))
        first, last = lines[0], lines[-1]
        if last.get("status", "failed") not in ("failed", "hung"):
            return None
        seconds = max(0.0, beat.seconds - sum(last["phases"].values()))
        rates = (first["usd_per_device_hour"], first["usd_per_kwh"], first["usd_per_gb_month"])
        cost = Cost(first["devices"], first["unit"], *rates)
        return Killed(beat.attempt, self._priced(cost, cost.devices, seconds))

    def _priced(self, cost: Cost, devices: int, seconds: float) -> Spent:
        """Energy was not measured then: at the mean power of the run so far, as storage is at the
        size of now.
        """
        cost = replace(cost, devices=devices)
        before, paid = self._history.joules, self._history.spent.device_seconds
        joules = None if before is None else before / max(paid, 1e-9) * devices * seconds
        self._joules_before = _sum(self._joules_before, joules)
        return Spent().plus(cost, seconds, joules, self._stored.bytes * seconds)

    def state_dict(self) -> dict[str, Any]:
        spent = self.spent
        return {
            "device_seconds": spent.device_seconds,
            "wall_seconds": spent.wall_seconds,
            "lost_device_seconds": self.lost,
            "usd": spent.dollars,
            "joules": self.joules,
        }


def _spent(old: Mapping[str, Any], devices: int) -> Spent:
    """Of a checkpoint; those of older versions do not tell the wall clock."""
    return Spent.of({"wall_seconds": old["device_seconds"] / devices, **old})


def _sum(joules: float | None, more: float | None) -> float | None:
    return None if joules is None or more is None else round(joules + more, 3)

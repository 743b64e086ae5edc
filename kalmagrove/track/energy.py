"""Energy of this rank's GPU, by NVML's counter (pynvml, of the extra `gpu`); of the processors of
a machine without GPUs, by RAPL's.

Read by `Meters` when a ledger line is written, and where training gives way to an evaluation or a
checkpoint and comes back: never within a step. NVML's counter moves every 20 to 100 ms: a part may
have that much of its neighbour's joules.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from kalmagrove.track.phases import STAGES

Counter = Callable[[], float | None]  # joules since some moment; None: no answer
POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules since it was made, of whatever `counter` counts, by stage; None: of nothing
    measurable.
    """

    def __init__(self, counter: Counter | None) -> None:
        self._counter = counter
        self._last = counter() if counter else None
        self._known = self._last is not None
        self._stages = dict.fromkeys(STAGES, 0.0)

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """This rank's share of what the run uses."""
        return cls(counter_of(device))

    def book(self, stage: str) -> None:
        """What was used since the last call went to `stage`."""
        now = self._counter() if self._counter else None
        self._known = now is not None and self._last is not None
        if now is not None and self._last is not None:
            self._stages[stage] += now - self._last
            self._last = now

    def used(self) -> dict[str, float]:
        """Up to the last `book`, by stage; NaN if there was no answer then."""
        return dict(self._stages) if self._known else dict.fromkeys(self._stages, math.nan)


def gpu_counter(device: torch.device) -> Counter | None:
    """The counter of a GPU (Volta or newer); None on CPU and without pynvml."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # CUDA's numbers depend on CUDA_VISIBLE_DEVICES, NVML's do not.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None

    def joules() -> float | None:
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except pynvml.NVMLError:  # not counted by this GPU, or by part of one (MIG)
            return None

    return joules


def counter_of(device: torch.device) -> Counter | None:
    """What counts this rank's energy: its GPU's, or its machine's processors, which the first
    process of a machine counts for all of them.
    """
    if device.type == "cuda":
        return gpu_counter(device)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return lambda: 0.0
    return cpu_counter(POWERCAP)


def cpu_counter(powercap: Path) -> Counter | None:
    """RAPL's counters of all processor packages, whatever runs on them; None if not readable.

    A counter begins anew at its largest value, some 260 kJ: it must be read more often than that.
    """
    packages = sorted(powercap.glob("intel-rapl:[0-9]")) + sorted(
        powercap.glob("intel-rapl:[0-9][0-9]")
    )
    try:
        largest = [int((package / "max_energy_range_uj").read_text()) for package in packages]
        last = [int((package / "energy_uj").read_text()) for package in packages]
    except (OSError, ValueError):  # root's alone, on most systems
        return None
    if not packages:
        return None
    total = 0

    def joules() -> float | None:
        nonlocal total, last
        try:
            now = [int((package / "energy_uj").read_text()) for package in packages]
        except (OSError, ValueError):
            return None
        grown = zip(now, last, largest, strict=True)
        total += sum(new - old if new >= old else new - old + top for new, old, top in grown)
        last = now
        return total / 1e6

    return joules

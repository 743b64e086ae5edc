"""Energy that this rank's GPU has used, by NVML's counter.

Read by `Meters` whenever a ledger line is written. Needs pynvml, of the extra `gpu`.
"""

import math
from collections.abc import Callable

import torch

Counter = Callable[[], float | None]  # joules since some moment; None: no answer


class Energy:
    """Joules since it was made, of whatever `counter` counts; None: of nothing measurable."""

    def __init__(self, counter: Counter | None) -> None:
        self._counter = counter
        self._first = counter() if counter else None

    def used(self) -> float:
        """NaN where it cannot be measured."""
        now = self._counter() if self._counter else None
        return math.nan if now is None or self._first is None else now - self._first


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

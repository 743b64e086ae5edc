"""Device-seconds and dollars of a run.

`Meters` asks here what a stretch of wall time costs; console, ledger and summary show the answer.
A device is a GPU, or on CPU a core; an unknown price gives None, never 0.
"""

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any, Literal, Self

from kalmagrove.config import Price

CENT = Decimal("0.01")
KWH = 3_600_000  # joules
GB_MONTH = Decimal(10**9) * 2_629_746  # byte-seconds; a month is a twelfth of the Gregorian year


@dataclass(frozen=True)
class Cost:
    """What the run occupies: `devices` GPUs or cores, each at a price an hour (None: unknown).

    Energy and storage have prices of their own if they are not in that one (None: they are).
    """

    devices: int
    unit: Literal["gpu", "core"]
    usd_per_device_hour: float | None
    usd_per_kwh: float | None = None
    usd_per_gb_month: float | None = None

    @classmethod
    def of(cls, price: Price, device_type: str, world_size: int, threads: int) -> Self:
        """Price what a run occupies.

        Args:
            device_type: of the ranks' torch device; "cpu" is charged by the core, else by the GPU.
            threads: CPU threads, summed over all ranks; used on CPU only.
        """
        others = (price.usd_per_kwh, price.usd_per_gb_month)
        if device_type == "cpu":
            return cls(threads, "core", price.usd_per_core_hour, *others)
        return cls(world_size, "gpu", price.usd_per_gpu_hour, *others)

    def text(self, name: str) -> str:
        """The price of a device, called `name`, in words."""
        rate = self.usd_per_device_hour
        return "unknown" if rate is None else f"${rate:g} a {self.unit}-hour ({name})"

    def device_seconds(self, wall_seconds: float) -> float:
        return wall_seconds * self.devices

    def usd(
        self, device_seconds: float, joules: float | None = 0.0, byte_seconds: float = 0.0
    ) -> Decimal | None:
        """Dollars, unrounded; None if the price is unknown, or energy has one and is unknown."""
        if self.usd_per_device_hour is None:
            return None
        usd = Decimal(str(self.usd_per_device_hour)) * Decimal(str(device_seconds)) / 3600
        if self.usd_per_kwh is not None:
            if joules is None:
                return None
            usd += Decimal(str(self.usd_per_kwh)) * Decimal(str(joules)) / KWH
        if self.usd_per_gb_month is not None:
            usd += Decimal(str(self.usd_per_gb_month)) * Decimal(str(byte_seconds)) / GB_MONTH
        return usd


@dataclass(frozen=True)
class Spent:
    """Cumulative cost of a run over all its sessions, lost work included."""

    device_seconds: float = 0.0
    usd: Decimal | None = Decimal(0)  # None once any part had no price
    wall_seconds: float = 0.0

    @property
    def dollars(self) -> float | None:
        """As ledgers have them."""
        return None if self.usd is None else float(round(self.usd, 6))

    def plus(
        self,
        cost: Cost,
        wall_seconds: float,
        joules: float | None = 0.0,
        byte_seconds: float = 0.0,
    ) -> "Spent":
        """After `wall_seconds` more. A part without a price makes the sum unknown."""
        seconds = cost.device_seconds(wall_seconds)
        more = cost.usd(seconds, joules, byte_seconds)
        usd = None if self.usd is None or more is None else self.usd + more
        return Spent(self.device_seconds + seconds, usd, self.wall_seconds + wall_seconds)

    def __add__(self, other: "Spent") -> "Spent":
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Spent(
            self.device_seconds + other.device_seconds,
            usd,
            self.wall_seconds + other.wall_seconds,
        )

    def __sub__(self, other: "Spent") -> "Spent":
        usd = None if self.usd is None or other.usd is None else self.usd - other.usd
        return Spent(
            self.device_seconds - other.device_seconds,
            usd,
            self.wall_seconds - other.wall_seconds,
        )

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """As ledgers have it."""
        usd = None if told["usd"] is None else Decimal(str(told["usd"]))
        return cls(told["device_seconds"], usd, told["wall_seconds"])

    def told(self) -> dict[str, float | None]:
        """As ledgers have it."""
        return {
            "device_seconds": round(self.device_seconds, 3),
            "wall_seconds": round(self.wall_seconds, 3),
            "usd": self.dollars,
        }


class Stored:
    """Byte-seconds of the files in a folder, by their sizes at the last look."""

    def __init__(self, folder: Path, now: float) -> None:
        self._folder, self._since = folder, now
        self._sum, self.bytes = 0.0, 0

    def look(self, now: float) -> None:
        self._sum, self._since = self.byte_seconds(now), now
        self.bytes = sum(_bytes(path) for path in self._folder.rglob("*"))

    def byte_seconds(self, now: float) -> float:
        return self._sum + self.bytes * (now - self._since)


def _bytes(path: Path) -> int:
    """Of a file; 0 of anything else, and of what was removed meanwhile."""
    try:
        found = path.lstat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def show_usd(amount: Decimal | float | None) -> str:
    """Dollars to the cent, rounded half up on the decimal digits.

    >>> show_usd(Decimal("1234.565")), show_usd(0.004), show_usd(0), show_usd(None)
    ('$1,234.57', '<$0.01', '$0.00', '-')
    """
    if amount is None:
        return "-"
    exact = Decimal(str(amount))
    cents = exact.quantize(CENT, rounding=ROUND_HALF_UP)
    return "<$0.01" if exact > 0 and cents == 0 else f"${cents:,}"

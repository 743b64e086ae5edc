"""The run's ledger: an append-only file of JSON lines that is the truth about what happened.

Rank 0's `Meters` writes it; console, W&B, summary and report read from it.

Every line holds `event, time, mono, step, tokens, device_seconds, wall_seconds, usd`; the last
three are cumulative over all sessions of the run, work that a kill threw away included. Lines are
never removed: a session that begins at step S (event `start` or `resume`) makes the lines after S
history that did not last. A line ends with a digest of itself and the one before it, by which
`kalmagrove ledger verify` finds what was changed later.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from kalmagrove.config import KalmaGroveError
from kalmagrove.track.cost import Spent
from kalmagrove.track.redact import scrub

Event = Literal["start", "step", "eval", "checkpoint", "skip", "refit", "budget", "resume", "stop"]
Line = dict[str, Any]
FIRST = ("start", "resume")  # the events that begin a session


@dataclass(frozen=True)
class Lost:
    """Work that was paid for and thrown away, because a session ended after its last checkpoint."""

    steps: int = 0
    tokens: int = 0
    device_seconds: float = 0.0


@dataclass(frozen=True)
class History:
    """All lines of a ledger, oldest first, and what follows from them."""

    lines: tuple[Line, ...]

    def effective(self) -> list[Line]:
        """The lines of the work that lasted: a session replaces what came after its start."""
        kept: list[Line] = []
        for line in self.lines:
            if line["event"] in FIRST:
                kept = [old for old in kept if old["step"] <= line["step"]]
            kept.append(line)
        return kept

    def series(self, event: Event) -> list[Line]:
        """The lasting lines of one kind, by step; of two for the same step the later one."""
        newest = {line["step"]: line for line in self.effective() if line["event"] == event}
        return [newest[step] for step in sorted(newest)]

    @property
    def spent(self) -> Spent:
        """Device-seconds and dollars up to the last line, lost work included."""
        if not self.lines:
            return Spent()
        usd = self.lines[-1]["usd"]
        amount = None if usd is None else Decimal(str(usd))
        return Spent(self.lines[-1]["device_seconds"], amount, self.wall_seconds)

    @property
    def wall_seconds(self) -> float:
        """Of all sessions together. Lines of older versions do not tell it: it is reckoned."""
        if not self.lines or "wall_seconds" in self.lines[-1]:
            return self.lines[-1]["wall_seconds"] if self.lines else 0.0
        total = before = 0.0
        devices = 1
        for line in self.lines:
            devices = line.get("devices", devices)
            total += (line["device_seconds"] - before) / devices
            before = line["device_seconds"]
        return total

    @property
    def goodput(self) -> float | None:
        """Device time of the training steps that lasted, as a part of all that was paid for."""
        lasted = {id(line) for line in self.series("step")}
        devices, seconds, paid = 1, 0.0, self.spent.device_seconds
        for line in self.lines:
            devices = line.get("devices", devices)
            if id(line) in lasted:
                seconds += line["train_seconds"] * devices
        return seconds / paid if paid else None

    @property
    def joules(self) -> float | None:
        """Energy up to the last line that tells it, lost work included; None: not measurable."""
        told = [line["joules"] for line in self.lines if "joules" in line]
        return told[-1] if told else 0.0

    @property
    def reached(self) -> tuple[int, int]:
        """Step and tokens of the last line that tells of training; (0, 0) before the first."""
        last = self.lines[-1] if self.lines else {"step": 0, "tokens": 0}
        return last["step"], last["tokens"]

    @property
    def lost(self) -> Lost:
        """Summed over all sessions."""
        first = [line for line in self.lines if line["event"] in FIRST]
        return Lost(
            sum(line["lost_steps"] for line in first),
            sum(line["lost_tokens"] for line in first),
            sum(line["lost_device_seconds"] for line in first),
        )

    @property
    def sessions(self) -> int:
        return sum(line["event"] in FIRST for line in self.lines)


def read_history(path: Path) -> History:
    """Read a ledger, of a live run too: a last line that is still torn is left out.

    Raises:
        KalmaGroveError: naming the line, if one before the last is not JSON.
    """
    return History(tuple(_parse(path, path.read_bytes())[0]))


class Ledger:
    """A ledger open for appending. Each line reaches the file before `write` returns."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open or create `path`; a last line torn by a kill is cut off."""
        self.path, self._clock, self._now = path, clock, now
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        lines, good = _parse(path, content)
        self._digest = lines[-1].get("digest", "") if lines else ""
        self._file = path.open("ab", buffering=0)  # a line is one write to the system
        if good < len(content):
            self._file.truncate(good)
        if good and content[good - 1 : good] != b"\n":
            self._file.write(b"\n")
        self.lines, self.bytes = len(lines), path.stat().st_size

    def write(self, event: Event, step: int, tokens: int, spent: Spent, **facts: Any) -> Line:
        """Append one line and return it.

        Raises:
            KalmaGroveError: if the file cannot be written (a full disk).
        """
        line = {
            "event": event,
            "time": self._now().isoformat(timespec="milliseconds"),
            "mono": round(self._clock(), 3),
            "step": step,
            "tokens": tokens,
            "device_seconds": round(spent.device_seconds, 3),
            "wall_seconds": round(spent.wall_seconds, 3),
            "usd": None if spent.usd is None else float(round(spent.usd, 6)),
            **facts,
        }
        clean = _finite(line)
        body = json.dumps(clean, allow_nan=False)[:-1]
        digest = line_digest(self._digest, body)
        text = f'{body}, "digest": "{digest}"}}\n'.encode()
        try:
            done = self._file.write(text)
            if done != len(text):
                raise OSError(f"{done} of {len(text)} bytes written")
            if event in ("checkpoint", "stop"):
                os.fsync(self._file.fileno())
        except OSError as error:
            raise KalmaGroveError(
                f"{self.path}: the ledger cannot be written ({error.strerror or error}); "
                "make room and run the same command again"
            ) from error
        self.lines, self.bytes, self._digest = self.lines + 1, self.bytes + len(text), digest
        return clean

    def history(self) -> History:
        return read_history(self.path)

    def series(self, event: Event) -> list[Line]:
        """See `History.series`."""
        return self.history().series(event)

    def close(self) -> None:
        self._file.close()


def line_digest(before: str, body: str) -> str:
    """Of a line's text without its digest, and of the digest `before` it ("": none)."""
    return hashlib.sha256(f"{before}{body}".encode()).hexdigest()[:12]


def _parse(path: Path, content: bytes) -> tuple[list[Line], int]:
    """The lines, and the length of the part of `content` that holds whole lines."""
    lines: list[Line] = []
    good = 0
    raw = content.splitlines(keepends=True)
    for number, text in enumerate(raw, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or "event" not in line:
                raise ValueError("not an event")
        except ValueError:
            if number == len(raw):
                break  # torn by a kill in the middle of a write
            raise KalmaGroveError(
                f"{path}: line {number} is not a ledger line; the file was changed by other means, "
                "restore it or move it away to begin a new one"
            ) from None
        lines.append(line)
        good += len(text)
    return lines, good


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null. A ledger has no secrets."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_finite(item) for item in value]
    return value

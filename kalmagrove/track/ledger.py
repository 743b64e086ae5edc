"""The run's ledger: an append-only file of JSON lines that is the truth about what happened.

Rank 0's `Meters` writes it; console, W&B, summary and report read from it.

Every line holds `event, time, mono, step, tokens, device_seconds, wall_seconds, usd`; the last
three are cumulative over all sessions of the run, work that a kill threw away included. Lines are
never removed: a session that begins at step S (event `start` or `resume`) makes the lines after S
history that did not last. A line ends with a digest of itself and the one before it: what was
changed later is found by `kalmagrove ledger verify`, and left out by all who read, with a warning.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from kalmagrove.config import KalmaGroveError
from kalmagrove.track.cost import Spent
from kalmagrove.track.redact import scrub

log = logging.getLogger(__name__)

Event = Literal[
    "start", "step", "eval", "checkpoint", "unsaved", "skip", "refit", "budget", "resume", "stop"
]
Line = dict[str, Any]
FIRST = ("start", "resume")  # the events that begin a session
EVERY = ("time", "mono", "step", "tokens", "device_seconds", "wall_seconds", "usd", "phases")
DIGEST = re.compile(r'^(?P<body>.*), "digest": "(?P<digest>[0-9a-f]{12})"\}$')


@dataclass(frozen=True)
class Lost:
    """Work that was paid for and thrown away, because a session ended after its last checkpoint."""

    steps: int = 0
    tokens: int = 0
    device_seconds: float = 0.0


@dataclass(frozen=True)
class Killed:
    """What a start cost after its last line, as a later one has booked it. attempt: its name, None
    if it is not known.
    """

    attempt: str | None
    spent: Spent

    def told(self) -> dict[str, Any]:
        return {"attempt": self.attempt, **self.spent.told()}


@dataclass(frozen=True)
class History:
    """All whole lines of a ledger, oldest first, and what follows from them."""

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
        return Spent.of({**self.lines[-1], "wall_seconds": self.wall_seconds})

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
        """Device time of the training steps that lasted, as a part of all that was paid for, what
        another ledger tells of apart.
        """
        lasted = {id(line) for line in self.series("step")}
        devices, seconds = 1, 0.0
        paid = self.spent.device_seconds - self.inherited.device_seconds
        for line in self.lines:
            devices = line.get("devices", devices)
            if id(line) in lasted:
                seconds += line["train_seconds"] * devices
        return seconds / paid if paid > 0 else None

    @property
    def inherited(self) -> Spent:
        """What the run had cost by another ledger, before it went on with this one."""
        return sum((Spent.of(told) for told in self._inherited()), Spent())

    @property
    def inherited_lost(self) -> float:
        """Device-seconds of it that were lost."""
        return sum(told["lost_device_seconds"] for told in self._inherited())

    @property
    def inherited_joules(self) -> float | None:
        told = [told["joules"] for told in self._inherited()]
        return None if None in told else sum(told)

    def _inherited(self) -> list[dict[str, Any]]:
        return [line["inherited"] for line in self.lines if "inherited" in line]

    @property
    def killed(self) -> list[Killed]:
        """Of all starts that died, what later ones have booked."""
        parts = [part for line in self.lines for part in line.get("killed", ())]
        return [Killed(part["attempt"], Spent.of(part)) for part in parts]

    @property
    def booked(self) -> set[str | None]:
        """Names of the starts in `killed`."""
        return {part.attempt for part in self.killed}

    def of_attempt(self, name: str) -> list[Line]:
        """The lines of the session of that start."""
        found: list[Line] = []
        inside = False
        for line in self.lines:
            if line["event"] in FIRST:
                inside = line.get("attempt") == name
            if inside:
                found.append(line)
        return found

    @property
    def joules(self) -> float | None:
        """Energy up to the last line that tells it, lost work included; None: not measurable."""
        told = [line["joules"] for line in self.lines if "joules" in line]
        return told[-1] if told else self.inherited_joules

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

    So are damaged lines, with a warning: no figure of theirs can be trusted.
    """
    found = _parse(path.read_bytes())
    found.warn(path)
    return found.history()


class Ledger:
    """A ledger open for appending. Each line reaches the file before `write` returns."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open or create `path`; a last line torn by a kill is cut off, damaged ones stay."""
        self.path, self._clock, self._now = path, clock, now
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        found = _parse(content)
        found.warn(path)
        self._digest, good = found.digest, found.whole
        self._id = found.id
        self._file = path.open("ab", buffering=0)  # a line is one write to the system
        if good < len(content):
            self._file.truncate(good)
        if good and content[good - 1 : good] != b"\n":
            self._file.write(b"\n")
        self.lines, self.bytes = len(found.lines), path.stat().st_size

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
            "usd": spent.dollars,
            **facts,
        }
        clean = _finite(line)
        body = json.dumps(clean, allow_nan=False)[:-1]
        digest = line_digest(self._digest, body)
        text = f'{body}, "digest": "{digest}"}}\n'.encode()
        try:
            done = self._file.write(text)
            if done != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if event in (*FIRST, "checkpoint", "stop"):
                os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self.bytes)  # half a line would spoil the next one
            raise KalmaGroveError(
                f"{self.path}: the ledger cannot be written ({error.strerror or error}); "
                "make room and run the same command again: it continues from the last checkpoint"
            ) from error
        self._id = self._id or digest
        self.lines, self.bytes, self._digest = self.lines + 1, self.bytes + len(text), digest
        return clean

    def position(self) -> dict[str, Any]:
        """Where it ends, for checkpoints and the summary: what is missing later is found by it.

        ledger: which one it is, the digest of its first line. digest: that of the last one.
        """
        return {
            "ledger": self._id,
            "lines": self.lines,
            "bytes": self.bytes,
            "digest": self._digest,
        }

    def history(self) -> History:
        return _parse(self.path.read_bytes()).history()

    def series(self, event: Event) -> list[Line]:
        """See `History.series`."""
        return self.history().series(event)

    def close(self) -> None:
        self._file.close()


def line_digest(before: str, body: str) -> str:
    """Of a line's text without its digest, and of the digest `before` it ("": none)."""
    return hashlib.sha256(f"{before}{body}".encode()).hexdigest()[:12]


@dataclass
class _Content:
    """What is in a ledger's file.

    damaged: numbers of the lines that are left out, from 1. whole: bytes up to a torn last line.
    digest: of the last whole line; id: of the first; "": it has none.
    """

    lines: list[Line]
    damaged: list[int]
    whole: int = 0
    digest: str = ""
    id: str = ""

    def history(self) -> History:
        """Of the lines; if the one that begins the first session is left out, with what the next
        one tells of it.
        """
        if not self.lines or self.lines[0]["event"] in FIRST:
            return History(tuple(self.lines))
        line = self.lines[0]
        seconds = line["device_seconds"], line.get("wall_seconds") or line["device_seconds"]
        begun = {
            **{key: line[key] for key in line if key in EVERY},
            "event": "start",
            **dict.fromkeys(("lost_steps", "lost_tokens"), 0),
            "lost_device_seconds": 0.0,
            "devices": round(seconds[0] / seconds[1]) if seconds[1] else 1,
            "unit": "device",
            "usd_per_device_hour": None,
            "flops_per_token": None,
        }
        return History((begun, *self.lines))

    def warn(self, path: Path) -> None:
        if self.damaged:
            numbers = ", ".join(map(str, self.damaged[:5]))
            log.warning(
                "%s: %d damaged or changed lines are left out (%s%s), the file is as it was; "
                "see kalmagrove ledger verify %s",
                path, len(self.damaged), numbers, ", ..." if len(self.damaged) > 5 else "", path,
            )  # fmt: skip


def _parse(content: bytes) -> _Content:
    found = _Content([], [])
    raw = content.splitlines(keepends=True)
    before: set[str] | None = {""}  # what the line before may have as its digest; None: unknown
    for number, text in enumerate(raw, start=1):
        line, match = parse_line(text), split_digest(text)
        if line is None and number == len(raw):
            break  # torn by a kill in the middle of a write
        found.whole += len(text)
        fits = line is not None
        if match is None:
            before = None
            found.digest = "" if line else found.digest
        else:
            body, found.digest = match
            found.id = found.id or found.digest
            due = None if before is None else {line_digest(digest, body) for digest in before}
            fits = fits and (due is None or found.digest in due)
            before = {found.digest} if fits else {found.digest, *(due or ())}
        if line is not None and fits:
            found.lines.append(line)
        else:
            found.damaged.append(number)
    return found


def split_digest(text: bytes) -> tuple[str, str] | None:
    """A line's text without its digest, and the digest; None if it has none."""
    match = DIGEST.match(text.decode(errors="replace").rstrip("\n"))
    return (match["body"], match["digest"]) if match else None


def parse_line(text: bytes) -> Line | None:
    """A line of the file; None if it is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "event" in line else None


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

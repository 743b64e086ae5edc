"""What a ledger says of sessions and phases, as tables: for `kalmagrove ledger`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kalmagrove.track.ledger import FIRST, History, Line
from kalmagrove.track.phases import PHASES


@dataclass(frozen=True)
class Session:
    """The lines of one session, and what it cost."""

    lines: tuple[Line, ...]
    wall_seconds: float
    device_seconds: float
    usd: Decimal | None

    @property
    def first(self) -> Line:
        return self.lines[0]

    @property
    def last(self) -> Line:
        return self.lines[-1]

    @property
    def devices(self) -> int:
        return int(self.first["devices"])

    @property
    def ended(self) -> str:
        """done | stopped | budget | failed | hung | open: killed, or still running."""
        return str(self.last["status"]) if self.last["event"] == "stop" else "open"

    @property
    def phases(self) -> dict[str, float]:
        """Seconds, up to its last line; nothing in ledgers of older versions."""
        return dict(self.last.get("phases", {}))


def sessions(history: History) -> list[Session]:
    """All sessions, oldest first."""
    groups: list[list[Line]] = []
    for line in history.lines:
        if line["event"] in FIRST:
            groups.append([])
        if groups:
            groups[-1].append(line)
    found, before = [], History(())
    for lines in groups:
        upto = History((*before.lines, *lines))
        then, now = before.spent, upto.spent
        usd = None if now.usd is None or then.usd is None else now.usd - then.usd
        wall, device = (
            now.wall_seconds - then.wall_seconds,
            now.device_seconds - then.device_seconds,
        )
        found.append(Session(tuple(lines), wall, device, usd))
        before = upto
    return found


@dataclass(frozen=True)
class Part:
    """A phase's share of a run. Dollars are those of the devices while it lasted."""

    phase: str
    seconds: float
    device_seconds: float
    usd: float | None


def parts(history: History) -> list[Part]:
    """Every phase, summed over all sessions whose lines tell of phases."""
    told = [session for session in sessions(history) if session.phases]
    found = []
    for phase in PHASES:
        usd: float | None = 0.0
        for session in told:
            rate = session.first["usd_per_device_hour"]
            hours = session.phases[phase] * session.devices / 3600
            usd = None if usd is None or rate is None else usd + rate * hours
        seconds = sum(session.phases[phase] for session in told)
        device = sum(session.phases[phase] * session.devices for session in told)
        found.append(Part(phase, seconds, device, usd))
    return found


def rows(history: History) -> list[dict[str, Any]]:
    """Every line as one flat row: `phases.forward`, `model.load_cv`. All rows have all columns.

    In addition: session (1, 2, ...), lasted (whether no later session replaced the line) and flops
    (the model's, of all tokens so far).
    """
    lasted = {id(line) for line in history.effective()}
    flat = []
    for number, session in enumerate(sessions(history), start=1):
        per_token = session.first["flops_per_token"]
        for line in session.lines:
            facts = {"session": number, "lasted": id(line) in lasted}
            told = {key: value for key, value in line.items() if key != "digest"}
            flops = per_token * line["tokens"]
            flat.append({**facts, **dict(_flat(told)), "flops": flops})
    columns = dict.fromkeys(key for row in flat for key in row)
    return [{key: row.get(key) for key in columns} for row in flat]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):  # the two ends of an interval
            yield from _flat({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield prefix + key, value

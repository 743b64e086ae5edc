"""What a ledger says of sessions and phases, as tables: for `kalmagrove ledger`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kalmagrove.track.cost import Spent
from kalmagrove.track.ledger import FIRST, History, Line
from kalmagrove.track.phases import PHASES, STAGES

# Within training, which is a stage: its phases and what is idle between them.
WITHIN = tuple(phase for phase in PHASES if phase not in STAGES)
ROWS = ("startup", "training", *WITHIN, "evaluation", "checkpoint")
KILLED = "killed"


@dataclass(frozen=True)
class Session:
    """The lines of one session, and what it cost, up to a kill.

    before: what its first line books of others.
    """

    lines: tuple[Line, ...]
    spent: Spent
    killed: bool = False
    before: tuple["Booked", ...] = ()

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
        """done | stopped | budget | failed | hung | killed | open: still running, or killed."""
        if self.last["event"] == "stop":
            return str(self.last["status"])
        return "killed" if self.killed else "open"

    @property
    def phases(self) -> dict[str, float]:
        """Seconds, up to its last line; nothing in ledgers of older versions."""
        return dict(self.last.get("phases", {}))


@dataclass(frozen=True)
class Booked:
    """What a session's first line books that is of no session.

    what: inherited, from another ledger; or killed, as so many `starts` died before their first
    line. step: that the run had reached.
    """

    what: str
    spent: Spent
    starts: int
    step: int


def sessions(history: History) -> list[Session]:
    """All sessions, oldest first."""
    groups: list[list[Line]] = []
    for line in history.lines:
        if line["event"] in FIRST:
            groups.append([])
        if groups:
            groups[-1].append(line)
    names = {lines[0].get("attempt") for lines in groups} - {None}
    after: dict[str | None, Spent] = {}  # their last lines, by the names of starts
    for part in history.killed:
        after[part.attempt] = after.get(part.attempt, Spent()) + part.spent
    found, before = [], History(())
    for number, lines in enumerate(groups, start=1):
        upto, first = History((*before.lines, *lines)), History((lines[0],))
        spent = upto.spent - before.spent - first.inherited
        for part in first.killed:
            spent -= part.spent
        if (own := lines[0].get("attempt")) is not None:
            spent += after.get(own, Spent())
        killed = number < len(groups)
        found.append(Session(tuple(lines), spent, killed, tuple(_booked(first, names))))
        before = upto
    return found


def _booked(first: History, names: set[str | None]) -> Iterator[Booked]:
    """names: of the starts that have a session."""
    step = first.lines[0]["step"]
    if first.inherited.device_seconds:
        yield Booked("inherited", first.inherited, 0, step)
    if starts := [part.spent for part in first.killed if part.attempt not in names]:
        yield Booked("killed", sum(starts, Spent()), len(starts), step)


@dataclass(frozen=True)
class Part:
    """What a phase or a stage took. None: not known, or not of this one.

    usd: of the devices while it lasted, without energy and storage that have prices of their own.
    joules: of stages only. tokens: trained, lost work included, or evaluated. flops: of the model.
    """

    seconds: float
    device_seconds: float
    usd: float | None = None
    joules: float | None = None
    tokens: int | None = None
    flops: float | None = None

    def plus(self, other: "Part") -> "Part":
        """What is unknown of one of them is unknown of both."""
        both = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        sums: list[Any] = [None if a is None or b is None else a + b for a, b in both]
        return Part(*sums)


def parts(history: History) -> dict[str, Part]:
    """Of the whole run, in the order of `ROWS`: all sessions whose lines tell of phases; and
    `KILLED`, the time of starts after their last line.

    Without those that no line tells of: ledgers of older versions have all-to-alls within the
    forward and the backward pass.
    """
    found: dict[str, Part] = {}
    for session in sessions(history):
        own = Books(session.first)
        for line in session.lines:
            own.add(line)
        for name, part in own.parts().items():
            found[name] = found[name].plus(part) if name in found else part
    told = {name: found[name] for name in ROWS if name in found}
    if found and history.killed:
        spent = sum((part.spent for part in history.killed), Spent())
        told[KILLED] = Part(
            round(spent.wall_seconds, 6), round(spent.device_seconds, 6), spent.dollars
        )
    return told


class Books:
    """The parts of one session, line by line."""

    def __init__(self, first: Line) -> None:
        self._first = first
        self._phases: Mapping[str, float] = {}
        self._joules: Mapping[str, float | None] = {}
        self._trained = 0
        self._evaluated: int | None = 0

    def add(self, line: Line) -> None:
        self._phases = line.get("phases", self._phases)
        self._joules = line.get("phase_joules", self._joules)
        self._trained = max(self._trained, line["tokens"] - self._first["tokens"])
        if line["event"] == "eval":
            more = line.get("val_tokens")
            self._evaluated = (
                None if self._evaluated is None or more is None else self._evaluated + more
            )

    def parts(self) -> dict[str, Part]:
        """Up to the last line that was added; nothing if no line tells of phases."""
        if not self._phases:
            return {}
        seconds = dict(self._phases)
        seconds["training"] = sum(seconds.get(phase, 0.0) for phase in WITHIN)
        devices, rate = self._first["devices"], self._first["usd_per_device_hour"]
        forward = self._first.get("forward_flops_per_token")
        whole = self._first["flops_per_token"]
        tokens = {"training": self._trained, "evaluation": self._evaluated}
        flops = {
            "training": _times(whole, self._trained),
            "forward": _times(forward, self._trained),
            "backward": _times(None if forward is None else whole - forward, self._trained),
            "evaluation": _times(forward, self._evaluated),
        }
        return {
            name: Part(
                round(seconds[name], 6),
                round(seconds[name] * devices, 6),
                None if rate is None else rate * seconds[name] * devices / 3600,
                self._joules.get(name),
                tokens.get(name),
                flops.get(name),
            )
            for name in ROWS
            if name in seconds
        }


def _times(per_token: float | None, tokens: int | None) -> float | None:
    return None if per_token is None or tokens is None else per_token * tokens


HIDDEN = ("digest", "phase_joules")  # not in the export as the line has them
# What the export calls the figures of a part, and which parts have it; seconds are the ledger's own
# `phases`.
COLUMNS: dict[str, tuple[str, Sequence[str]]] = {
    "device_seconds": ("phase_device_seconds", ROWS),
    "usd": ("phase_usd", ROWS),
    "joules": ("phase_joules", STAGES),
    "tokens": ("phase_tokens", ("training", "evaluation")),
    "flops": ("phase_flops", ("training", "forward", "backward", "evaluation")),
}


def rows(history: History) -> list[dict[str, Any]]:
    """Every line as one flat row: `phases.forward`, `model.load_cv`. All rows have all columns.

    In addition: session (1, 2, ...), lasted (whether no later session replaced the line), flops
    (the model's, of all tokens so far), and of the session so far what every phase took:
    `phase_usd.forward`, `phase_joules.training`.
    """
    lasted = {id(line) for line in history.effective()}
    flat = []
    for number, session in enumerate(sessions(history), start=1):
        per_token, books = session.first["flops_per_token"], Books(session.first)
        for line in session.lines:
            books.add(line)
            facts = {"session": number, "lasted": id(line) in lasted}
            told = {key: value for key, value in line.items() if key not in HIDDEN}
            flops = _times(per_token, line["tokens"])
            more = _columns(books.parts(), energy="phase_joules" in line)
            flat.append({**facts, **dict(_flat(told)), "flops": flops, **more})
    columns = dict.fromkeys(key for row in flat for key in row)
    return [{key: row.get(key) for key in columns} for row in flat]


def _columns(found: Mapping[str, Part], energy: bool) -> dict[str, Any]:
    """Those that a part can have: not the tokens of a checkpoint. energy: whether the line tells of
    it.
    """
    return {
        f"{column}.{name}": getattr(part, key) if key != "joules" or energy else None
        for key, (column, known) in COLUMNS.items()
        for name, part in found.items()
        if name in known
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):  # the two ends of an interval
            yield from _flat({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield prefix + key, value

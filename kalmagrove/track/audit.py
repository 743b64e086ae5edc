"""Whether a ledger is whole and adds up: what `kalmagrove ledger verify` says.

Digests tell of lines that were changed, taken out or put in by hand, and of lines taken off the end
what the summary and the newest checkpoint beside the ledger know of it. Who changes all digests
behind them as well is not found. Ledgers of older versions have neither digests nor phases: theirs
are passed over.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kalmagrove.config import KalmaGroveError
from kalmagrove.config.attempts import beats
from kalmagrove.config.files import checkpoints_in, read_json
from kalmagrove.track.ledger import FIRST, History, Line, line_digest, parse_line, split_digest

CUMULATIVE = ("device_seconds", "wall_seconds", "usd")  # over all sessions
WITHIN = ("step", "tokens", "mono")  # in one session
TOLERANCE = 0.01  # of a session's wall clock
SLACK_JOULES = 0.01  # lines have them to the thousandth


def faults(path: Path) -> list[str]:
    """What is wrong, with the numbers of the lines; empty if nothing is.

    Raises:
        KalmaGroveError: if there is no ledger, or nothing in it.
    """
    known = list(_positions(path.parent))  # first: a run that goes on writes meanwhile
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KalmaGroveError(f"{path} cannot be read ({error.strerror})") from None
    if not content:
        raise KalmaGroveError(f"{path} holds no line")
    found: list[tuple[int, str]] = []
    lines: list[tuple[int, Line]] = []
    before = ""
    raw = content.splitlines()
    for number, text in enumerate(raw, start=1):
        line = parse_line(text)
        if line is None:
            torn = number == len(raw)
            what = "is torn: a kill came while it was written" if torn else "is no ledger line"
            found.append((number, what))
            _, before = split_digest(text) or ("", before)
            continue
        wrong = _changed(text, before)
        before = line.get("digest", "")
        if wrong:
            found.append((number, wrong))
        lines.append((number, line))
    found += _wrong(lines)
    found += [(len(raw) + 1, wrong) for wrong in _missing(known, content)]
    return [
        f"line {number} {wrong}" if number <= len(raw) else wrong for number, wrong in sorted(found)
    ]


def unfinished(path: Path) -> str | None:
    """That the last session has no end, and what is not booked of it; None: it has one.

    No fault: the run goes on, or was killed, and the next start books what is missing.
    """
    lines = [line for text in path.read_bytes().splitlines() if (line := parse_line(text))]
    history = History(tuple(lines))
    left = {beat.attempt: beat.seconds for beat in beats(path.parent)}
    first = next((line for line in reversed(lines) if line["event"] in FIRST), {})
    name = first.get("attempt")
    ended = not lines or lines[-1]["event"] == "stop"
    parts = []
    if not ended:
        said = "the last session has no end: it goes on, or was killed"
        if name in left:
            after = max(0.0, left[name] - sum(lines[-1].get("phases", {}).values()))
            parts.append(f"{said} {after:.1f} s after its last line, which the next start books")
        else:
            parts.append(f"{said}, and nothing tells how long after its last line")
    own = history.booked | {line.get("attempt") for line in lines if line["event"] in FIRST}
    others = [seconds for attempt, seconds in left.items() if attempt not in own]
    if others:
        parts.append(
            f"starts that have no line, or none yet: {len(others)}, {sum(others):.1f} s, which the "
            "next one books"
        )
    return "; ".join(parts) or None


def _missing(positions: Iterable[tuple[str, Mapping[str, Any]]], content: bytes) -> Iterator[str]:
    """What was taken off the end, by what lies beside the ledger. Another ledger's is passed over:
    that of the run whose checkpoint is continued, or one that is no longer there.
    """
    raw = content.splitlines()
    digests = [parts[1] for text in raw if (parts := split_digest(text))]
    last = next((line for text in reversed(raw) if (line := parse_line(text))), {})
    for name, known in positions:
        lost = "the ledger's last lines are missing"
        if (ledger := known.get("ledger")) is None:  # of an older version
            if known.get("bytes", 0) > len(content):
                yield f"{name} knows of {known['bytes']:,} bytes: {lost}"
            elif known["device_seconds"] > last.get("device_seconds", 0.0) + 0.002:
                yield f"{name} knows of {known['device_seconds']:,.3f} device-seconds: {lost}"
        elif digests[:1] == [ledger] and known["digest"] not in digests:
            yield f"{name} knows of {known['lines']:,} lines, the last of which is not here: {lost}"


def _positions(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the summary and the newest checkpoint say of the ledger, and where that stands."""
    if summary := read_json(folder / "summary.json"):
        position = summary.get("ledger")
        if position is not None:
            yield "summary.json", position
        elif "device_seconds" in summary:
            yield "summary.json", {"device_seconds": summary["device_seconds"]}
    for newest in checkpoints_in(folder / "checkpoints")[:1]:
        if meters := (read_json(newest / "state.json") or {}).get("meters"):
            yield f"checkpoint {newest.name}", meters


def _changed(text: bytes, before: str) -> str | None:
    """before: the digest of the line before; "" if it has none."""
    parts = split_digest(text)
    if parts is None:
        return "has no digest, but the one before it has" if before else None
    body, digest = parts
    if line_digest(before, body) == digest:
        return None
    return "was changed, or lines before it were taken out or put in"


def _wrong(lines: list[tuple[int, Line]]) -> Iterator[tuple[int, str]]:
    """What does not add up."""
    if lines and lines[0][1]["event"] not in FIRST:
        yield lines[0][0], "begins no session: the ledger's beginning is missing"
    first: Line | None = None
    last: Line = {}
    before: float | None = None  # joules of the sessions before
    for number, line in lines:
        if line["event"] in FIRST:
            for wrong in (*_opening(line, last), *_unended(line, first, last)):
                yield number, wrong
            first, before = line, None
            lost = max(0, last.get("step", 0) - line["step"])
            if line.get("lost_steps") != lost:
                yield number, f"tells of {line.get('lost_steps')} lost steps, but {lost} were lost"
        for key in CUMULATIVE if line is first else (*CUMULATIVE, *WITHIN):
            old, new = last.get(key), line.get(key)
            if key == "usd" and last and old is None and new is not None:
                yield number, "has dollars, but earlier ones are unknown"
            elif old is not None and new is not None and new < old:
                yield number, f"goes back in {key}: {new} after {old}"
        if first is not None:
            for wrong in (*_phases(first, line), *_cost(first, line)):
                yield number, wrong
        if (joules := _joules_before(line)) is not None:
            if before is not None and abs(joules - before) > SLACK_JOULES:
                yield number, f"has stages whose joules are {before - joules:+.3f} J off its own"
            before = joules
        last = line


def _opening(line: Line, last: Line) -> Iterator[str]:
    """Whether all that a session's first line adds to the cost is named there."""
    inherited = line.get("inherited")
    if not last and line["step"] > 0 and inherited is None:
        yield f"begins at step {line['step']}, and of what that had cost the ledger has nothing"
    if "attempt" not in line or "phases" not in line:  # of an older version
        return
    named = [*line.get("killed", ()), *([inherited] if inherited else ())]
    own = sum(line["phases"].values())
    for key, due in (("wall_seconds", own), ("device_seconds", own * line["devices"])):
        due += sum(part[key] for part in named)
        more = line[key] - last.get(key, 0.0)
        if abs(more - due) > TOLERANCE * due + 0.05 * line["devices"]:
            yield f"adds {more:.3f} to {key}, and names {due:.3f} of it"


def _unended(line: Line, first: Line | None, last: Line) -> Iterator[str]:
    """Whether it is known for how long the session before went on, if a kill ended it."""
    name = first.get("attempt") if first else None
    if name is None or last["event"] == "stop":
        return
    if name not in {part["attempt"] for part in line.get("killed", ())}:
        yield "begins a session, but the one before has no end, and what it cost then is not booked"


def _joules_before(line: Line) -> float | None:
    """Those that are not of the line's session; None: it does not say."""
    found = [line.get("joules"), *line.get("phase_joules", {}).values()]
    if len(found) < 2 or any(part is None for part in found):
        return None
    whole, *parts = found
    return whole - sum(parts)


def _phases(first: Line, line: Line) -> Iterator[str]:
    """Whether a line's phases are parts that add up to the session's wall clock."""
    if "phases" not in line or "phases" not in first:
        return
    whole, start = sum(line["phases"].values()), sum(first["phases"].values())
    slack = TOLERANCE * whole + 0.05
    if min(line["phases"].values()) < -slack:
        yield f"has phases longer than the {whole:.3f} s of the session"
    for name, wall in (
        ("clock", line["mono"] - first["mono"]),
        ("wall_seconds", line["wall_seconds"] - first["wall_seconds"]),
    ):
        if abs(whole - start - wall) > slack:
            yield f"has phases of {whole - start:.3f} s where {name} gives {wall:.3f} s"


def _cost(first: Line, line: Line) -> Iterator[str]:
    """Whether device-seconds and dollars follow from the wall clock."""
    if "wall_seconds" not in first or "devices" not in first:
        return
    wall, paid = (line[key] - first[key] for key in ("wall_seconds", "device_seconds"))
    if abs(wall * first["devices"] - paid) > 0.002 * first["devices"]:
        yield f"has {paid:.3f} device-seconds for {wall:.3f} s of {first['devices']} devices"
    others: list[Any] = [first.get("usd_per_kwh"), first.get("usd_per_gb_month")]
    rate, usd, before = first.get("usd_per_device_hour"), line["usd"], first["usd"]
    if rate is None or usd is None or before is None or any(others):
        return
    due = rate * paid / 3600
    if abs(usd - before - due) > 2e-6 + rate * 0.002 / 3600:
        yield f"has ${usd - before:.6f} for {paid:.3f} device-seconds that cost ${due:.6f}"

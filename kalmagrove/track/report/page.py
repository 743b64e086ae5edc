"""The page: everything in one HTML file that asks no other for anything.

`render` is what the command and the server call. Without JavaScript the page is whole; with it a
pointer over a chart reads its values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kalmagrove.config import KalmaGroveError
from kalmagrove.config.files import replace_text
from kalmagrove.track.report import cost, figures, model, trade
from kalmagrove.track.report.looks import READOUT, RELOAD, STYLE
from kalmagrove.track.report.markup import escape, show, table
from kalmagrove.track.report.plan import predicted
from kalmagrove.track.report.ranks import ranks
from kalmagrove.track.report.source import RunData
from kalmagrove.track.report.tables import (
    STATUS,
    compared,
    config_diff,
    flatten,
    headline,
    retrofit_rows,
    setting,
)

TILES = (
    "held-out loss", "bits a byte", "tokens", "throughput", "MFU", "peak memory", "cost",
    "wall time", "goodput", "energy",
)  # fmt: skip


@dataclass(frozen=True)
class Live:
    """Of a served page. every: seconds after which it asks whether it is still the newest.
    version: of what it is made of. starting: runs that have not begun their ledger.
    """

    every: float
    version: str
    starting: Sequence[str] = ()


def render(runs: Sequence[RunData], live: Live | None = None) -> str:
    """The whole page, of one run or of several side by side.

    Args:
        runs: none only of a served page whose runs are all starting.
        live: None: it is a file.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    connect = "'none'" if live is None else "'self'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    script, again, wait = READOUT, "", ""
    if live is not None:
        script += RELOAD.replace("VERSION", live.version).replace("EVERY", f"{live.every * 1000:g}")
        again = f'<noscript><meta http-equiv=refresh content="{live.every:g}"></noscript>'
        wait = "".join(starting(name) for name in live.starting)
        title = title if runs else ", ".join(live.starting)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        '<meta name=color-scheme content="light dark"><link rel=icon href="data:,">',
        f"{again}<title>{escape(title)} - KalmaGrove report</title>",
        f"<style>{STYLE}</style></head><body>",
        header(runs, title) if runs else f"<header><h1>{escape(title)}</h1></header>",
        "<main>",
        wait,
        *(body(runs) if runs else ()),
        "</main><footer>Made by <code>kalmagrove report</code> from the ledgers; what is not known "
        f"is left out or says so.</footer><script>{script}</script></body></html>\n",
    ]
    return "".join(parts)


def write(path: Path, page: str) -> None:
    """Write the page whole or not at all.

    Raises:
        KalmaGroveError: it cannot be written.
    """
    try:
        replace_text(path, page)
    except OSError as error:
        raise KalmaGroveError(
            f"{path} cannot be written ({error.strerror}); name another file with --out"
        ) from error


def header(runs: Sequence[RunData], title: str) -> str:
    newest = max(run.last["time"] for run in runs)
    told = datetime.fromisoformat(newest).strftime("%d %B %Y, %H:%M:%S %Z")
    lead = f"as of {told}"
    if len(runs) == 1:
        status = runs[0].status
        text = STATUS.get(status, status)
        lead = f'<span class="badge b-{escape(status)}">{escape(text)}</span> {escape(lead)}'
    else:
        lead = escape(lead)
    return f"<header><h1>{escape(title)}</h1><p>{lead}</p>{tiles(runs)}</header>"


def starting(name: str) -> str:
    text = f"{name} is starting up: nothing is in its ledger yet. This page waits for it."
    return f"<p role=status>{escape(text)}</p>"


def tiles(runs: Sequence[RunData]) -> str:
    """Of one run its headline figures."""
    if len(runs) > 1:
        return ""
    facts = headline(runs[0])
    boxes = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(facts[name])}</dd></div>" for name in TILES
    )
    return f"<dl class=tiles>{boxes}</dl>"


def body(runs: Sequence[RunData]) -> list[str]:
    """The sections, in the order in which one asks."""
    one = len(runs) == 1
    parts = []
    if not one:
        parts.append(section("Side by side", table(*compared(runs))))
        parts.append(section("Settings that differ", differing(runs)))
    last = [] if one else [trade.trade([trade.outcome(run) for run in runs])]
    parts.append(section("Loss", show([*figures.loss(runs), *last])))
    parts.append(section("Speed and memory", show([*figures.speed(runs), ranks(runs)])))
    inside = [*model.groves(runs), *model.activity(runs), *model.learned(runs)]
    parts.append(section("Inside the model", show(inside)))
    parts.append(section("Cost", show([cost.budget(runs), cost.money(runs), *cost.hours(runs)])))
    parts.append(section("Predicted and actual", "".join(predicted(run) for run in runs)))
    parts.append(section("Sample", "".join(sample(run, one) for run in runs)))
    if any(run.retrofit for run in runs):
        parts.append(section("Retrofit", "".join(retrofit(run) for run in runs if run.retrofit)))
    parts.append(section("Events", "".join(events(run, one) for run in runs)))
    if one:
        facts = [[name, text] for name, text in headline(runs[0]).items()]
        parts.append(section("All figures", table(["", "value"], facts)))
        parts.append(section("Settings", settings(runs[0])))
    return parts


def section(title: str, inner: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inner}</section>"


def differing(runs: Sequence[RunData]) -> str:
    missing = [run.name for run in runs if run.config is None]
    if missing:
        return f"<p>Left out: {escape(', '.join(missing))} has no config.yaml.</p>"
    head, rows = config_diff(runs)
    return table(head, rows) if rows else "<p>None: the runs have the same settings.</p>"


def sample(run: RunData, one: bool) -> str:
    name = "" if one else f"<h3>{escape(run.name)}</h3>"
    if run.sample is None:
        return f"{name}<p>Left out: no sample is written yet (samples/).</p>"
    file, text = run.sample
    return f"{name}<p class=note>samples/{escape(file)}</p><pre tabindex=0>{escape(text)}</pre>"


def events(run: RunData, one: bool) -> str:
    name = "" if one else f"<h3>{escape(run.name)}</h3>"
    rows = cost.sessions(run)
    note = ""
    if len(rows) > 200:
        note = f"<p class=note>The last 200 of {len(rows):,}.</p>"
    return name + note + table(["event", "step", "wall time", ""], rows[-200:])


def retrofit(run: RunData) -> str:
    inner = table(["", "value"], retrofit_rows(run))
    return f"<details><summary>{escape(run.name)}: retrofit.json</summary>{inner}</details>"


def settings(run: RunData) -> str:
    if run.config is None:
        return "<p>Left out: there is no config.yaml.</p>"
    rows = [[key, setting(value)] for key, value in flatten(run.config)]
    inner = table(["setting", "value"], rows)
    return f"<details><summary>config.yaml, {len(rows)} settings</summary>{inner}</details>"

"""What the user sees while a run trains: a live panel on a terminal, plain lines elsewhere.

`Meters` shows every ledger line here, so screen and ledger agree; `console.log` in the run folder
receives the plain lines whatever the screen shows.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kalmagrove.track.budget import show
from kalmagrove.track.cost import show_usd
from kalmagrove.track.stragglers import straggler_text

log = logging.getLogger(__name__)

Mode = Literal["auto", "live", "plain", "off"]


class Console:
    """The screen and log of rank 0."""

    def __init__(
        self, mode: Mode, title: str, steps: int, log: Path, screen: RichConsole | None = None
    ) -> None:
        """Open `log` for appending. Lines that it cannot take are missing there, with a warning.

        Args:
            mode: auto is live on a terminal and plain otherwise; off writes the log only.
            steps: of the whole run.
            screen: where to show; None: stdout.
        """
        self._title, self._steps, self._screen = title, steps, screen or RichConsole()
        if mode == "auto":
            mode = "live" if screen is None and sys.stdout.isatty() else "plain"
        self._mode = mode
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._failed = log.open("ab", buffering=0), False
        self._live: Live | None = None
        self._last: dict[str, Any] = {}
        self._done = 0

    def start(self, step: int) -> None:
        self._done = step
        if self._mode == "live":
            self._live = Live(self._panel(), console=self._screen, refresh_per_second=4)
            self._live.start()

    def progress(self, step: int) -> None:
        """A step without figures: moves the live bar only."""
        self._done = step
        self._refresh()

    def line(self, line: Mapping[str, Any]) -> None:
        """Show one ledger line."""
        self._last.update({key: value for key, value in line.items() if value is not None})
        self._last["usd"] = line["usd"]
        self._done = line["step"]
        text = plain_line(line, self._steps)
        if self._live and line["event"] == "step":
            self._keep(text + "\n")
            self._refresh()
        else:
            self.note(text)

    def note(self, text: str) -> None:
        """One line of text: above the live panel, or as a plain line."""
        self._keep(text + "\n")
        if self._mode != "off":
            self._screen.print(Text(text), soft_wrap=True)

    def show(self, what: RenderableType) -> None:
        """A table: on the screen, and as text in the log."""
        text = StringIO()
        RichConsole(file=text, width=100, no_color=True).print(what)
        self._keep(text.getvalue())
        if self._mode != "off":
            self._screen.print(what)

    def stop(self) -> None:
        """Leave the live panel standing as it is. The log stays open for `note` and `show`."""
        if self._live:
            self._live.update(self._panel(), refresh=True)
            self._live.stop()
            self._live = None

    def close(self) -> None:
        self.stop()
        self._log.close()

    def _keep(self, text: str) -> None:
        """Append to the log, which is a copy: the ledger has it all."""
        try:
            self._log.write(text.encode())
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written (%s)", self._log.name, error.strerror)
            self._failed = True

    def _refresh(self) -> None:
        if self._live:
            self._live.update(self._panel())

    def _panel(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        left = show_seconds(self._last.get("seconds_left"))
        bar.add_row(
            ProgressBar(total=self._steps, completed=self._done),
            f"step {self._done:,}/{self._steps:,}  {left} left",
        )
        grid = Table.grid(padding=(0, 3))
        cells = [(name, show(self._last)) for name, show in PANEL if has(self._last, name)]
        for first in range(0, len(cells), 4):
            row = cells[first : first + 4]
            grid.add_row(*(Text.assemble((name + " ", "dim"), value) for name, value in row))
        return Panel(Group(bar, grid), title=self._title, title_align="left", expand=False)


Show = Callable[[Mapping[str, Any]], str]

# What a name on the panel stands for: the ledger's key, and how it reads.
FIELDS: dict[str, tuple[str, Show]] = {
    "loss": ("loss", lambda r: f"{r['loss']:.3f}"),
    "val": ("val_loss", lambda r: f"{r['val_loss']:.3f}"),
    "speed": ("tokens_per_s", lambda r: f"{r['tokens_per_s']:,.0f} tok/s"),
    "spent": ("usd_projected", lambda r: show_spent(r.get("usd"), r.get("usd_projected"))),
    "lr": ("lr", lambda r: f"{r['lr']:.1e}"),
    "grad": ("grad_norm", lambda r: f"{r['grad_norm']:.2f}"),
    "MFU": ("mfu", lambda r: f"{r['mfu']:.1%}"),
    "memory": ("peak_memory", lambda r: f"{r['peak_memory'] / 2**30:.1f} GiB"),
    "load cv": ("load_cv", lambda r: f"{r['load_cv']:.2f}"),
    "out of range": ("out_of_range", lambda r: f"{r['out_of_range']:.1%}"),
}
PANEL: list[tuple[str, Show]] = [(name, show) for name, (_, show) in FIELDS.items()]


def has(line: Mapping[str, Any], name: str) -> bool:
    return name == "spent" or line.get(FIELDS[name][0]) is not None


def plain_line(line: Mapping[str, Any], steps: int) -> str:
    """One ledger line as text for a log.

    >>> plain_line({"event": "skip", "step": 7, "reason": "loss is nan"}, 300)
    'step     7/300  skipped: loss is nan'
    """
    width = len(f"{steps:,}")
    at = f"step {line['step']:>{max(width, 5)},}/{steps:,}  "
    match line["event"]:
        case "step":
            return at + "  ".join(_step_parts(line))
        case "eval":
            loss = line["val_loss"]
            text = "-" if loss is None else f"{loss:.4f}"
            return f"{at}val {text} nats" + _bits(line) + _took(line)
        case "checkpoint":
            return f"{at}saved {line['path']}" + _took(line)
        case "unsaved":
            return f"{at}NOT SAVED: {line['reason']}"
        case "skip":
            return f"{at}skipped: {line['reason']}"
        case "refit":
            return at + _refit(line["grids"])
        case "budget":
            return at + _budget(line)
        case "resume" | "start":
            return at + _session(line)
        case _:
            spent = show_usd(line["usd"])
            hours = line["device_seconds"] / 3600
            return f"{at}{line['status']}  {spent}  {hours:.4f} {line.get('unit', 'device')}-hours"


def _step_parts(line: Mapping[str, Any]) -> list[str]:
    loss = line.get("loss")
    parts = ["loss -" if loss is None else f"loss {loss:.3f}"]
    if line.get("val_loss") is not None:
        parts.append(f"val {line['val_loss']:.3f}")
    parts.append(FIELDS["speed"][1](line))
    parts.append(f"{show_seconds(line.get('seconds_left'))} left")
    parts.append(show_spent(line.get("usd"), line.get("usd_projected")))
    for name in ("lr", "grad", "MFU"):
        if has(line, name):
            parts.append(f"{name} {FIELDS[name][1](line)}")
    if has(line, "load cv"):
        parts.append(f"load cv {line['load_cv']:.2f}")
    if has(line, "out of range"):
        parts.append(f"out {line['out_of_range']:.1%}")
    if slow := straggler_text(line):
        parts.append(slow)
    return parts


def _session(line: Mapping[str, Any]) -> str:
    verb = "continued" if line["event"] == "resume" else "started"
    text = f"{verb} on {line['devices']} {line['unit']}s, price {line['price']}"
    if line["lost_steps"]:
        text += f"; {line['lost_steps']} steps since the last checkpoint were lost and are paid for"
    return text


def _budget(line: Mapping[str, Any]) -> str:
    cap = line["cap"]
    text = f"{line['share']:.0%} of budget.{cap}={line['limit']:.12g} used"
    if line["whole"] is not None:
        text += f"; the whole run takes {show(cap, line['whole'])}"
    if cap != "tokens" and line["low"] is not None:
        text += f" (90%: {show(cap, line['low'])} to {show(cap, line['high'])})"
    return text


def _refit(grids: Mapping[str, Mapping[str, float]]) -> str:
    worst = {key: max(grid[key] for grid in grids.values()) for key in ("before", "after")}
    names = ", ".join(list(grids)[:4]) + (", ..." if len(grids) > 4 else "")
    noun = "grid" if len(grids) == 1 else f"{len(grids)} grids"
    shares = f"{worst['before']:.1%} -> {worst['after']:.1%}"
    return f"refitted {noun} of layer {names}: out of range {shares}"


def _bits(line: Mapping[str, Any]) -> str:
    bits = line.get("val_bits_per_byte")
    return "" if bits is None else f"  {bits:.4f} bits/byte"


def _took(line: Mapping[str, Any]) -> str:
    return f"  ({line['seconds']:.1f} s)"


def show_spent(usd: float | None, projected: float | None) -> str:
    """Dollars so far and for the whole run: `$0.01 (of $0.03)`."""
    if usd is None:
        return "unknown price"
    return show_usd(usd) + (f" (of {show_usd(projected)})" if projected is not None else "")


def show_seconds(seconds: float | None) -> str:
    """A duration as people read clocks.

    >>> show_seconds(151), show_seconds(3 * 3600 + 62), show_seconds(200_000), show_seconds(None)
    ('2:31', '3:01:02', '2d 07:33', '-')
    """
    if seconds is None:
        return "-"
    total = round(seconds)
    days, rest = divmod(total, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"

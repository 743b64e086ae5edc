"""HTML by plain strings: escaping, numbers as people read them, tables and figures.

`figures` makes `Figure`s out of runs, `page` puts them together. Whatever comes from a run (names,
settings, sample text) passes through `escape`.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROWS = 100  # of a table below a figure
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Figure:
    """One figure of the page; or, with `absent`, why it is not there.

    body, legend and table are HTML; title, says (the text alternative), note and absent are text.
    """

    key: str  # unique on a page
    title: str
    body: str = ""
    says: str = ""
    legend: str = ""
    note: str = ""
    table: str = ""
    wide: bool = False
    absent: str = ""


def escape(text: object) -> str:
    """`text` for any place in HTML; characters that HTML does not allow become U+FFFD."""
    return html.escape(CONTROL.sub("\ufffd", str(text).replace("\r\n", "\n")), quote=True)


def number(value: float | None, digits: int = 4) -> str:
    """
    >>> number(1234567.0), number(0.00012), number(3.75754), number(None), number(512)
    ('1.235M', '0.00012', '3.758', 'unknown', '512')
    """
    if value is None or not math.isfinite(value):
        return "unknown"
    size = abs(value)
    if size >= 1e15:
        return f"{value:.{digits}g}"
    for scale, unit in STEPS:
        if size >= scale * (10 if unit == "k" else 1):
            return f"{value / scale:.{digits}g}{unit}"
    return f"{value:.{max(digits, len(str(int(size))))}g}"


def dollars(value: float | None) -> str:
    """Small amounts with two figures: a test run costs parts of a cent.

    >>> dollars(1234.5), dollars(0.00123), dollars(0), dollars(None)
    ('$1,234.50', '$0.0012', '$0.00', 'unknown')
    """
    if value is None:
        return "unknown"
    return f"${value:,.2f}" if value == 0 or abs(value) >= 0.1 else f"${value:.2g}"


def exact(usd: float) -> str:
    """Dollars that tell neighbouring ticks of cheap runs apart.

    >>> exact(0.0001525), exact(12.5)
    ('$0.000152', '$12.50')
    """
    return f"${usd:.3g}" if 0 < usd < 0.1 else dollars(usd)


def duration(seconds: float | None) -> str:
    """
    >>> duration(7.25), duration(754), duration(10000), duration(200000)
    ('7.2 s', '12 min 34 s', '2 h 46 min', '2 d 7 h')
    """
    if seconds is None:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for big, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {big} {int(seconds % size // part)} {small}"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, first: bool = True) -> str:
    """Cells are text. With `first` the first cell of a row names it."""
    lines = ["<div class=scroll tabindex=0><table><thead><tr>"]
    lines += [f"<th scope=col>{escape(cell)}</th>" for cell in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        cells = [f"<td>{escape(cell)}</td>" for cell in row]
        if first:
            cells[0] = f"<th scope=row>{escape(row[0])}</th>"
        lines.append(f"<tr>{''.join(cells)}</tr>")
    lines.append("</tbody></table></div>")
    return "".join(lines)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 to count - 1, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def data_table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str = "Data") -> str:
    """The numbers of a figure, folded away; of many rows, some."""
    shown = [rows[i] for i in spread(len(rows), ROWS)]
    told = "" if len(shown) == len(rows) else f", {len(shown)} of {len(rows)} rows"
    return f"<details><summary>{name}{told}</summary>{table(head, shown)}</details>"


def show(figures: Sequence[Figure]) -> str:
    """Figures as HTML, and below them which are left out, with the reasons."""
    drawn = "".join(_show(figure) for figure in figures if not figure.absent)
    absent = "".join(
        f"<li><strong>{escape(figure.title)}</strong> is left out: {escape(figure.absent)}.</li>"
        for figure in figures
        if figure.absent
    )
    return f"<div class=grid>{drawn}</div>" + (f"<ul class=absent>{absent}</ul>" if absent else "")


def _show(figure: Figure) -> str:
    """The drawing is named by its title and described by its text alternative."""
    parts = [
        f'<figure class="figure{" wide" if figure.wide else ""}">',
        f'<figcaption><h3 id="{figure.key}">{escape(figure.title)}</h3></figcaption>',
        figure.legend,
        f"<div class=scroll tabindex=0>{figure.body}</div>",
        f'<p class=hidden id="{figure.key}-says">{escape(figure.says)}</p>',
        f"<p class=note>{escape(figure.note)}</p>" if figure.note else "",
        figure.table,
        "</figure>",
    ]
    return "".join(parts)

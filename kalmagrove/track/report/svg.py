"""Charts as SVG text: lines, stacked bars, heat maps, small curves. No dependency, no state.

Colours and dashes are classes (`s0` to `s8`) that the page's style sheet defines for light and
dark. Numbers are those of a fixed drawing box; the page scales it. What is as wide as the page is
drawn a second time for narrow screens, on which its text would be too small.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from kalmagrove.track.report.markup import escape, number

WIDTH, WIDE = 490, 1180
HEIGHTS = {WIDTH: 240, WIDE: 300}
LEFT, TOP, BOTTOM = 62, 14, 46
STYLES = 9
BLANK = -1  # the style of an area without a colour
LOG_ABOVE = 50  # the ratio of the values from which their axis is logarithmic
PLAIN, BOLD = 7.4, 8.2  # widths of letters: on average at most
LABELS = {WIDTH: 14, WIDE: 20}  # characters of a name beside its line
LEVELS = 12  # colours of a heat map

# Stops of cividis, which people with any colour vision read as dark to light.
CIVIDIS = (
    (0, 34, 78), (33, 58, 110), (76, 85, 108), (108, 110, 114), (142, 137, 120),
    (178, 166, 109), (217, 197, 92), (254, 232, 56),
)  # fmt: skip

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line; None and NaN in `y` are gaps. `style` chooses colour and dash."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0
    faint: bool = False  # beside the line it belongs to
    dots: bool = False  # mark every point: they are few

    def points(self) -> list[tuple[float, float]]:
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if y is not None and finite(y) and finite(x)]


@dataclass(frozen=True)
class Axis:
    """What values mean and how they are written."""

    label: str
    text: Format = number
    zero: bool = False  # begins at zero
    log: bool | None = False  # None: if the values span much and it need not begin at zero


@dataclass(frozen=True)
class Scale:
    """From values to places on the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        share = (at / 2 - low / 2) / (high / 2 - low / 2)  # halves: the largest floats fit
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, most)


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, `most` of them or fewer."""
    raw = high / most - low / most
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next((size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999), size * 10)
    if not step or not math.isfinite(step):
        return [low]
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; of a short axis their twos and fives too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1, max(1, (last - first) // 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors if power <= 308]
    return [tick for tick in found if low <= tick <= high]


def scale(values: Sequence[float], axis: Axis, start: float, end: float) -> Scale:
    """Around `values`, which are finite and at least one; a single value gets room on both
    sides.
    """
    low, high = min(values), max(values)
    log = axis.log
    if log is None:
        log = not axis.zero and low > 0 and high / LOG_ABOVE > low
    if log and low > 0:
        return Scale(low, high if high > low else low * 10, start, end, True)
    if axis.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high / 2 - low / 2 < 1e-300:
        room = abs(low) * 0.05 or 1.0
        low, high = (0.0 if axis.zero and low == 0 else low - room), high + room
    return Scale(low, high, start, end)


def padded(values: Sequence[float], axis: Axis) -> list[float]:
    """`values` and a little beyond their ends, so that lines keep off the frame."""
    low, high = min(values), max(values)
    room = (high / 2 - low / 2) * 0.08
    above = high + room if math.isfinite(high + room) else high
    below = low if axis.zero or (low > 0 and low - room <= 0) else low - room
    return [below, above]


def upright(values: Sequence[float], y: Axis, height: float) -> tuple[Scale, Axis, float]:
    """The scale of what is drawn upwards, its axis as it is labelled, and where that stands."""
    y = replace(y, log=scale(values, y, 0, 1).log)
    ys = scale(values if y.log else padded(values, y), y, height - BOTTOM, TOP)
    told = Axis(f"{y.label} (log scale)" if ys.log else y.label, y.text)
    return ys, told, max(LEFT, 30 + PLAIN * max(len(y.text(tick)) for tick in [0.0, *ys.ticks(5)]))


def both(draw: Callable[[int], str]) -> str:
    """What `draw` makes of the page's width, and of half of it for narrow screens."""
    wide, narrow = (
        draw(width).replace('class="chart', f'class="{name} chart', 1)
        for width, name in ((WIDE, "on-wide"), (WIDTH, "on-narrow"))
    )
    return wide + narrow


def line_chart(
    key: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    levels: Sequence[tuple[float, str]] = (),
    width: int = WIDTH,
) -> str:
    """Lines with axes, and their names at their ends where there are several.

    Args:
        series: with one finite point at least, all together.
        levels: values of y to draw a line at, each with its name.
    """
    points = [point for line in series for point in line.points()]
    height, most = HEIGHTS[width], LABELS[width]
    names = [clip(line.name, most) for line in series if not line.faint and line.points()]
    labelled = len(names) > 1
    right = width - (18 + BOLD * max(map(len, names)) if labelled else 20)
    values = [p[1] for p in points] + [value for value, _ in levels]
    ys, told, left = upright(values, y, height)
    xs = scale([p[0] for p in points], x, left, right)
    parts = [frame(xs, ys, x, told)]
    ends = [line.points() for line in series if line.points()]
    for value, text in levels:
        py = ys(value)
        at_left = min(abs(ys(points[0][1]) - py) for points in ends)
        at_right = min(abs(ys(points[-1][1]) - py) for points in ends)
        px, anchor = (right - 4, "end") if at_right >= at_left else (left + 4, "start")
        parts.append(f'<path class=level d="M{left:.1f},{py:.1f}H{right:.1f}"/>')
        parts.append(
            f'<text class=small x="{px:.1f}" y="{py - 4:.1f}" text-anchor={anchor}>'
            f"{escape(text)}</text>"
        )
    labels = []
    for line in sorted(series, key=lambda line: not line.faint):
        parts += drawn(line, xs, ys)
        if labelled and not line.faint and line.points():
            labels.append((ys(line.points()[-1][1]), clip(line.name, most), line.style))
    parts += [
        f'<text class="name t{style % STYLES}" x="{right + 8:.1f}" y="{py + 4:.1f}">'
        f"{escape(name)}</text>"
        for py, name, style in apart(labels, height - BOTTOM)
    ]
    plain = f'data-x="{xs.low!r} {xs.high!r} {left:.1f} {right:.1f}" '
    plain += f'data-y="{ys.low!r} {ys.high!r} {ys.start} {ys.end}" data-log="{int(ys.log)}" '
    return canvas(key, "".join(parts), width, height, f"{plain}data-label={_quoted(x.label)}")


def _quoted(text: str) -> str:
    return f'"{escape(text)}"'


def canvas(key: str, inner: str, width: float, height: float, more: str = "") -> str:
    """The drawing, named and described by the figure's title and text alternative."""
    kind = "chart" if width >= WIDTH else "chart slim"
    return (
        f'<svg class="{kind}" role="img" aria-labelledby="{key}" aria-describedby="{key}-says" '
        f'viewBox="0 0 {width:g} {height:g}" {more}>{inner}</svg>'
    )


def frame(xs: Scale, ys: Scale, x: Axis, y: Axis) -> str:
    """Grid, ticks and the axes' labels."""
    left, right, floor, parts = xs.start, xs.end, ys.start, []
    for value in ys.ticks(5):
        py = ys(value)
        parts.append(f'<path class="grid" d="M{left:.1f},{py:.1f}H{right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6:.1f}" y="{py + 4:.1f}" text-anchor="end">'
            f"{escape(y.text(value))}</text>"
        )
    room = 16 + PLAIN * max(len(x.text(end)) for end in (xs.low, xs.high))
    for value in xs.ticks(max(2, int((right - left) / room))):
        px = xs(value)
        parts.append(f'<path class="grid" d="M{px:.1f},{floor}v4"/>')
        parts.append(
            f'<text class="tick" x="{px:.1f}" y="{floor + 18}" text-anchor="middle">'
            f"{escape(x.text(value))}</text>"
        )
    parts.append(f'<path class="axis" d="M{left:.1f},{floor}H{right:.1f}"/>')
    middle, half = (left + right) / 2, (TOP + floor) / 2
    parts.append(
        f'<text class="label" x="{middle:.1f}" y="{floor + BOTTOM - 8}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
        f'<text class="label" transform="translate(13 {half:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y.label)}</text>'
    )
    return "".join(parts)


def drawn(line: Series, xs: Scale, ys: Scale) -> Iterator[str]:
    """The line's pieces between gaps; a point that stands alone is a dot."""
    kind = f"s{line.style % STYLES}" + (" faint" if line.faint else "")
    pieces, dots = [], []
    for piece in unbroken(line, ys.log):
        places = [f"{xs(x):.1f},{ys(y):.1f}" for x, y in piece]
        if len(places) > 1:
            pieces.append("M" + "L".join(places))
        if len(places) == 1 or line.dots:
            dots += places
    if pieces:
        yield f'<path class="line {kind}" data-name={_quoted(line.name)} d="{"".join(pieces)}"/>'
    for place in dots:
        px, py = place.split(",")
        yield f'<circle class="dot {kind}" cx="{px}" cy="{py}" r="2.6"/>'


def unbroken(line: Series, positive: bool) -> Iterator[list[tuple[float, float]]]:
    piece: list[tuple[float, float]] = []
    for x, y in zip(line.x, line.y, strict=True):
        if y is not None and math.isfinite(y) and finite(x) and (y > 0 or not positive):
            piece.append((x, y))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece


def apart(
    ends: Sequence[tuple[float, str, int]], floor: float, gap: float = 13
) -> list[tuple[float, str, int]]:
    """Names at the ends of lines, moved until none covers another, none below `floor`."""
    placed: list[tuple[float, str, int]] = []
    for py, name, style in sorted(ends):
        at = max(py, placed[-1][0] + gap) if placed else py
        placed.append((at, name, style))
    over = placed[-1][0] - floor if placed else 0
    if over <= 0:
        return placed
    limit, fitted = floor, []
    for py, name, style in reversed(placed):
        limit = min(py, limit)
        fitted.append((limit, name, style))
        limit -= gap
    return fitted[::-1]


def clip(name: str, most: int = LABELS[WIDE]) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot. style: as of lines; more: follows its name; first: named before
    others, where there is not room for all names.
    """

    name: str
    x: float
    y: float
    style: int = 0
    more: str = ""
    first: bool = False


def scatter(
    key: str,
    dots: Sequence[Dot],
    front: Sequence[tuple[float, float]],
    x: Axis,
    y: Axis,
    width: int = WIDTH,
) -> str:
    """Points, each with its name where there is room, and where a pointer rests on it; and the
    stairs of a Pareto front.

    Args:
        dots: at least one; all finite.
        front: its corners, from left to right, falling.
    """
    height = HEIGHTS[width]
    ys, told, left = upright([dot.y for dot in dots], y, height)
    places = [dot.x for dot in dots]
    xs = scale(places if scale(places, x, 0, 1).log else padded(places, x), x, left, width - 24)
    parts = [frame(xs, ys, x, told)]
    if front:
        stairs = "".join(f"H{xs(px):.1f}V{ys(py):.1f}" for px, py in front[1:])
        first = f"M{xs(front[0][0]):.1f},{ys(front[0][1]):.1f}"
        parts.append(f'<path class="line s1" d="{first}{stairs}H{xs.end:.1f}"/>')
    taken = [_box(xs(dot.x) - 4, ys(dot.y) - 4, 8, 8) for dot in dots]
    for dot in sorted(dots, key=lambda dot: not dot.first):
        px, py = xs(dot.x), ys(dot.y)
        title = f"{dot.name}: {x.text(dot.x)}, {y.text(dot.y)}" + (dot.more and f", {dot.more}")
        parts.append(
            f'<circle class="dot s{dot.style % STYLES}" cx="{px:.1f}" cy="{py:.1f}" r="4">'
            f"<title>{escape(title)}</title></circle>"
        )
        name = clip(dot.name, LABELS[width]) + (dot.more and f", {dot.more}")
        long = PLAIN * len(name)
        for place, anchor, low in (
            (px + 7, "start", py - 7), (px - 7, "end", py - 7),
            (px + 7, "start", py + 15), (px - 7, "end", py + 15),
        ):  # fmt: skip
            box = _box(place - (long if anchor == "end" else 0), low - 10, long, 13)
            inside = left <= box[0] and box[2] <= width and box[1] >= TOP and box[3] <= ys.start
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                parts.append(
                    f'<text class="small" x="{place:.1f}" y="{low:.1f}" '
                    f'text-anchor="{anchor}">{escape(name)}</text>'
                )
                break
    return canvas(key, "".join(parts), width, height)


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _box(left: float, top: float, width: float, height: float) -> Box:
    return left, top, left + width, top + height


def _meet(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def stacked_bars(
    key: str, bars: Sequence[str], parts: Sequence[tuple[int, Sequence[float]]], x: Axis
) -> str:
    """Lying bars, one a name, each of the same parts side by side.

    Args:
        parts: (style, a value for every bar): none negative.
    """
    left = 20 + PLAIN * max(len(clip(bar)) for bar in bars)
    step, height = 26, 26 * len(bars) + 44
    totals = [sum(values[i] for _, values in parts) for i in range(len(bars))]
    xs = scale([*totals, 0.0], Axis("", zero=True), left, WIDTH - 24)
    drawing = []
    for value in xs.ticks(max(2, int((WIDTH - left) / 90))):
        px = xs(value)
        drawing.append(
            f'<path class=grid d="M{px:.1f},4V{height - 40}"/><text class=tick x="{px:.1f}" '
            f'y="{height - 25}" text-anchor=middle>{escape(x.text(value))}</text>'
        )
    for i, bar in enumerate(bars):
        top, before = 6 + step * i, 0.0
        drawing.append(
            f'<text class=tick x="{left - 8:.1f}" y="{top + 14}" text-anchor=end>'
            f"{escape(clip(bar))}</text>"
        )
        for style, values in parts:
            begin, end = xs(before), xs(before + values[i])
            before += values[i]
            if end - begin > 0:
                drawing.append(
                    f'<rect class="part {fill(style)}" x="{begin:.1f}" y="{top}" '
                    f'width="{end - begin:.1f}" height="{step - 7}"/>'
                )
    drawing.append(
        f'<text class=label x="{(left + WIDTH) / 2:.1f}" y="{height - 6}" text-anchor=middle>'
        f"{escape(x.label)}</text>"
    )
    return canvas(key, "".join(drawing), WIDTH, height)


def heat_map(
    key: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    labels: tuple[str, str],
    low: float,
) -> str:
    """Cells [row][column] coloured from `low` to the largest value; None is left blank.

    Args:
        columns: names, of which as many are written as fit.
        labels: of the rows and of the columns.
    """
    found = [value for row in values for value in row if value is not None and finite(value)]
    high = max([low, *found])
    left, right, tall = (
        24 + 6.6 * max(map(len, rows)),
        WIDTH - 84,
        max(9, min(34, 240 // len(rows))),
    )
    wide, bottom = (right - left) / len(columns), TOP + tall * len(rows)
    cells: dict[int, list[str]] = {}
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None and finite(value):
                share = (value - low) / (high - low) if high > low else 0.0
                place = f"M{left + j * wide:.1f},{TOP + i * tall}h{wide:.2f}v{tall}h-{wide:.2f}z"
                cells.setdefault(min(LEVELS - 1, max(0, int(share * LEVELS))), []).append(place)
    parts = [
        f'<path fill="{cividis(level / (LEVELS - 1))}" d="{"".join(places)}"/>'
        for level, places in sorted(cells.items())
    ]
    every = max(1, math.ceil(11 / tall))
    parts += [
        f'<text class=tick x="{left - 5:.1f}" y="{TOP + (i + 0.5) * tall + 4:.1f}" '
        f"text-anchor=end>{escape(name)}</text>"
        for i, name in enumerate(rows)
        if i % every == 0
    ]
    shown = range(0, len(columns), max(1, math.ceil(len(columns) * 56 / (right - left))))
    parts += [
        f'<text class=tick x="{left + (j + 0.5) * wide:.1f}" y="{bottom + 15}" '
        f"text-anchor=middle>{escape(columns[j])}</text>"
        for j in shown
    ]
    parts.append(
        f'<text class=label x="{(left + right) / 2:.1f}" y="{bottom + 34}" text-anchor=middle>'
        f"{escape(labels[1])}</text>"
        f'<text class=label transform="translate(12 {(TOP + bottom) / 2:.1f}) rotate(-90)" '
        f"text-anchor=middle>{escape(labels[0])}</text>"
    )
    parts.append(colour_bar(right + 14, TOP, max(bottom, TOP + 90) - TOP, low, high))
    return canvas(key, "".join(parts), WIDTH, max(bottom, TOP + 90) + 42)


def colour_bar(left: float, top: float, height: float, low: float, high: float) -> str:
    """What the colours mean."""
    tall = height / LEVELS
    parts = [
        f'<rect fill="{cividis(i / (LEVELS - 1))}" x="{left:.1f}" width="12" '
        f'y="{top + height - (i + 1) * tall:.1f}" height="{tall + 0.5:.1f}"/>'
        for i in range(LEVELS)
    ]
    for share in (0.0, 0.5, 1.0):
        parts.append(
            f'<text class=tick x="{left + 17:.1f}" y="{top + height * (1 - share) + 4:.1f}">'
            f"{number(low + share * (high - low), 3)}</text>"
        )
    return "".join(parts)


def cividis(share: float) -> str:
    """A colour from dark blue (0) to yellow (1)."""
    at = share * (len(CIVIDIS) - 1)
    i = min(len(CIVIDIS) - 2, int(at))
    pairs = zip(CIVIDIS[i], CIVIDIS[i + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in pairs)


def swatch(style: int) -> str:
    """A piece of the line, for a legend."""
    return (
        f'<svg class=swatch aria-hidden=true viewBox="0 0 30 8" width=30 height=8>'
        f'<path class="line s{style % STYLES}" d="M0,4H30"/></svg>'
    )


def fill(style: int) -> str:
    """The class of an area."""
    return "blank" if style == BLANK else f"f{style % STYLES}"


def patch(style: int) -> str:
    """A piece of the area, for a legend."""
    return (
        f'<svg class=swatch aria-hidden=true viewBox="0 0 12 12" width=12 height=12>'
        f'<rect class="part {fill(style)}" width=12 height=12 /></svg>'
    )

"""The report's charts, colours, numbers and text."""

import doctest
import itertools
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from kalmagrove.track.model_metrics import grove_shares
from kalmagrove.track.report import markup
from kalmagrove.track.report.looks import DARK, LIGHT
from kalmagrove.track.report.markup import data_table, escape, number, spread
from kalmagrove.track.report.source import thin
from kalmagrove.track.report.svg import (
    STYLES,
    Axis,
    Scale,
    Series,
    apart,
    cividis,
    heat_map,
    line_chart,
    stacked_bars,
    ticks,
)

pytestmark = pytest.mark.unit

X, Y = Axis("tokens"), Axis("loss", log=None)


def parse(svg: str) -> ElementTree.Element:
    """As XML: attributes without quotes get some."""
    return ElementTree.fromstring(re.sub(r"(\s[\w-]+)=([^\"\s/>]+)", r'\1="\2"', svg))


def paths(svg: str) -> list[str]:
    return re.findall(r'<path class="line[^>]* d="([^"]*)"', svg)


# Charts


def test_nan_and_none_are_gaps_and_a_lonely_point_is_a_dot() -> None:
    line = Series("a", [0, 1, 2, 3, 4, 5], [1.0, 2.0, float("nan"), 3.0, None, 4.0])
    svg = line_chart("k", [line], X, Y)
    (d,) = paths(svg)
    assert d.count("M") == 1
    assert d.count("L") == 1, "the first two points alone are joined"
    assert svg.count("<circle") == 2
    assert "nan" not in svg.lower()
    parse(svg)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([5.0], [3.0]),
        ([0.0], [0.0]),
        ([1, 2, 3], [7.0, 7.0, 7.0]),
        ([1, 2], [-1e300, 1e300]),
        ([1, 2], [1e-300, 1e300]),
        ([1, 2], [1.7e308, 1.7e308]),
        ([1, 1e18], [1e-12, 2e-12]),
        ([1, 2, 3], [float("inf"), 1.0, -5.0]),
        ([1, 2], [0.0, 5e-324]),
    ],
)
def test_any_values_stay_inside_the_drawing(x: list[float], y: list[float]) -> None:
    for axis in (Y, Axis("loss", zero=True)):
        svg = line_chart("k", [Series("a", x, y)], X, axis)
        root = parse(svg)
        box = [float(n) for n in root.attrib["viewBox"].split()]
        places = re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", "".join(paths(svg)))
        places += re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg)
        assert places
        for px, py in places:
            assert 0 <= float(px) <= box[2]
            assert 0 <= float(py) <= box[3]
        assert svg.count('class="tick"') >= 2


def test_places_on_a_scale() -> None:
    assert Scale(0, 10, 100, 200)(2.5) == 125
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert Scale(0, 10, 200, 100)(99) == 100, "beyond the end is at the end"
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(7, 93, 5) == [20, 40, 60, 80]


def test_a_wide_span_is_logarithmic_and_says_so() -> None:
    wide = line_chart("k", [Series("a", [1, 2], [1.0, 1000.0])], X, Y)
    assert "loss (log scale)" in wide
    assert "log scale" not in line_chart("k", [Series("a", [1, 2], [1.0, 20.0])], X, Y)
    assert "log scale" not in line_chart("k", [Series("a", [1, 2], [0.0, 1e6])], X, Y)


def test_names_at_the_ends_of_lines_do_not_touch() -> None:
    ends = [(100, "a", 0), (101, "b", 1), (102, "c", 2), (253, "d", 3), (254, "e", 4)]
    placed = apart(ends, 254)
    places = [place for place, _, _ in placed]
    assert all(b - a >= 13 for a, b in itertools.pairwise(places))
    assert places[-1] <= 254
    svg = line_chart("k", [Series(n, [1, 2], [1.0, 2.0], i) for i, n in enumerate("ab")], X, Y)
    assert re.findall(r'class="name t(\d)"[^>]*>(\w)<', svg) == [("0", "a"), ("1", "b")]


def test_stacked_bars_have_lengths_in_proportion() -> None:
    svg = stacked_bars("k", ["one", "two"], [(0, [1.0, 2.0]), (1, [3.0, 0.0])], X)
    widths = [float(n) for n in re.findall(r'class="part f\d" [^>]*width="([\d.]+)"', svg)]
    assert len(widths) == 3, "nothing is drawn for nothing"
    assert widths[1] / widths[0] == pytest.approx(3, rel=0.01)
    assert widths[2] / widths[0] == pytest.approx(2, rel=0.01)
    parse(svg)


def test_heat_map_leaves_blanks_and_reaches_both_colours() -> None:
    svg = heat_map("k", ["0", "1"], ["a", "b"], [[1.0, None], [2.0, 3.0]], ("y", "x"), 1.0)
    cells = [d.count("M") for d in re.findall(r'<path fill="#\w+" d="([^"]*)"', svg)]
    assert sum(cells) == 3
    assert f'<path fill="{cividis(0)}"' in svg
    assert f'<path fill="{cividis(1)}"' in svg
    even = heat_map("k", ["0"], ["a"], [[1.0]], ("y", "x"), 1.0)
    assert f'<path fill="{cividis(0)}"' in even
    parse(svg)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough(colours: dict[str, str]) -> None:
    """WCAG 2: 4.5 for text, names of lines too, and with it more than the 3 that lines need."""
    for ground in ("ground", "raised"):
        for name in ("text", "quiet", *(f"s{i}" for i in range(STYLES))):
            pair = sorted((luminance(colours[name]), luminance(colours[ground])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (name, ground)


# Text, numbers, thinning


def test_escape() -> None:
    assert escape("<b a='1' c=\"2\">&") == "&lt;b a=&#x27;1&#x27; c=&quot;2&quot;&gt;&amp;"
    assert escape("a\0b\x1b[31m\ud800\tc\r\nd") == "a\ufffdb\ufffd[31m\ufffd\tc\nd"


def test_examples_in_docstrings() -> None:
    for module in (markup, sys.modules["kalmagrove.track.report.trade"]):
        found = doctest.testmod(module)
        assert (found.failed, found.attempted > 0) == (0, True), module.__name__


def test_numbers() -> None:
    assert number(1e300) == "1e+300"
    assert number(float("nan")) == "unknown"
    assert number(-2_500_000.0) == "-2.5M"
    assert number(0.0) == "0"


def test_thinning_keeps_extremes_gaps_and_ends() -> None:
    x = list(range(50_000))
    y: list[float | None] = [(i * 7919 % 1000) / 1000 for i in x]
    y[12_345], y[40_001], y[25_000] = 99.0, -99.0, None
    tx, ty = thin(x, y, 2000)
    assert len(tx) == len(ty) <= 2000
    assert tx == sorted(tx)
    assert (tx[0], tx[-1]) == (0, 49_999)
    assert ty[tx.index(12_345)] == 99.0
    assert ty[tx.index(40_001)] == -99.0
    assert None in ty
    assert thin([1, 2], [None, None]) == ([1, 2], [None, None])
    assert thin(x, [None] * len(x), 100)[1].count(None) <= 100


def test_rows_of_a_data_table_are_limited() -> None:
    assert spread(3, 100) == [0, 1, 2]
    some = spread(5000, 100)
    assert (len(some), some[0], some[-1]) == (100, 0, 4999)
    assert "100 of 5000 rows" in data_table(["a"], [[str(i)] for i in range(5000)])


def test_shares_of_groves() -> None:
    metrics = {"0.load": torch.tensor([3.0, 1.0]), "2.load": torch.zeros(4), "gate": torch.ones(2)}
    assert grove_shares(metrics) == {"0": [0.75, 0.25]}

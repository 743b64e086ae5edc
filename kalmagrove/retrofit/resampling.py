"""The bootstrap's draws, and small tests, in numpy alone.

Used by `statistics`.
Letters: N items, R runs, B resamples.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
ALPHA = 1 - LEVEL
CHUNK = 2**22  # item draws held at once

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Interval = tuple[float, float]


def draw_items(correct_NR: Matrix, resamples: int, rng: np.random.Generator) -> Matrix:
    """Right answers of each run [B, R] among N items drawn with replacement, B times."""
    count = len(correct_NR)
    rows = max(1, CHUNK // count)
    narrow_NR = correct_NR.astype(np.float32)  # counts below 2^24 are exact
    parts = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        index = rng.integers(count, size=(size, count), dtype=np.int32)
        index += np.arange(size, dtype=np.int32)[:, None] * count
        weight = np.bincount(index.ravel(), minlength=size * count).reshape(size, count)
        parts.append(weight.astype(np.float32) @ narrow_NR)
    return np.concatenate(parts).astype(np.float64)


def interval_of(draw_B: Vector) -> Interval:
    low, high = np.quantile(draw_B, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def bootstrap_p(draw_B: Vector) -> float:
    """Two-sided: twice the smaller share of resamples on either side of 0, which counts as both."""
    side = min(int((draw_B <= 0).sum()), int((draw_B >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draw_B) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """P-values that hold for all tests together (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        adjusted[place] = largest
    return adjusted


def t_interval(values: Vector) -> Interval:
    """Of the mean of at least two values."""
    count, mean = len(values), float(values.mean())
    half = t_quantile(1 - ALPHA / 2, count - 1) * float(values.std(ddof=1)) / math.sqrt(count)
    return mean - half, mean + half


def t_test(values: Vector) -> float | None:
    """Two-sided p of a mean of 0; None of fewer than two values."""
    if len(values) < 2:
        return None
    error, mean = float(values.std(ddof=1)) / math.sqrt(len(values)), float(values.mean())
    if not error:
        return 0.0 if mean else 1.0
    return 1 - t_inside(abs(mean) / error, len(values) - 1)


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) of Student's distribution with a whole number of degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    odd = df % 2
    term = total = math.cos(angle) if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if df > 1 else 0.0))


def t_quantile(p: float, df: int) -> float:
    """The t that a share p > 1/2 lies below, by bisection."""
    low, high = 0.0, 1.0
    while t_inside(high, df) < 2 * p - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < 2 * p - 1 else (low, middle)
    return high

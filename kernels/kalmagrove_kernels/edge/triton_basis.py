"""The univariate bases of `basis` as Triton functions: value, slope, and what each B_p is worth.

Called by the kernels of `triton` and `triton_linear`. Five of the bases are one three-term
recurrence with constants that the host works out; B-splines take one polynomial an interval, as
`spline.bspline` does.
Letters: X any shape (of a tile), S pairs of token and edge, P basis functions.

Arguments common to all functions:
    h: fp32. low, high: the range, broadcastable to h.
    KIND, CONSTANTS: of `describe`. DEGREE, GRID: of the basis.
"""

import math

import triton
import triton.language as tl

from kalmagrove_kernels.edge.basis import BASES
from kalmagrove_kernels.edge.spline import piece_matrix

PI = tl.constexpr(math.pi)


def describe(basis: str, degree: int, grid: int) -> dict[str, object]:
    """The compile-time arguments that make the functions below compute a basis of the table."""
    function = BASES[basis](degree, grid)
    degree = function.degree
    kind = basis
    constants: tuple[float, ...] = (0.0,)
    if basis in ("bspline", "piecewise_linear"):
        kind = "spline"
        constants = tuple(power for piece in piece_matrix(degree) for power in piece)
    elif basis in ("chebyshev1", "chebyshev2", "legendre", "hermite"):
        kind = "recurrence"
        constants = tuple(x for p in range(degree) for x in _recurrence(basis, p)) or constants
    return {
        "KIND": kind,
        "DEGREE": degree,
        "GRID": grid,
        "SIZE": function.size,
        "CONSTANTS": constants,
    }


def _recurrence(basis: str, p: int) -> tuple[float, float]:
    """a, b of B_{p+1} = a u B_p - b B_{p-1}, u in [-1, 1]."""
    if basis == "legendre":
        return (2 * p + 1) / (p + 1), p / (p + 1)
    if basis == "hermite":
        return 3 / math.sqrt(p + 1), math.sqrt(p / (p + 1))
    return (1.0 if p == 0 and basis == "chebyshev1" else 2.0), 1.0


@triton.jit
def _unit(h, low, high):
    """u_X, the range mapped to [-1, 1] and clamped; du/dh_X. A NaN stays one."""
    raw = (2 * h - low - high) / (high - low)
    u = tl.clamp(raw, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return u, tl.where((raw >= -1.0) & (raw <= 1.0), 2 / (high - low), 0.0)


@triton.jit
def _on_grid(h, low, high, DEGREE: tl.constexpr, GRID: tl.constexpr):
    """The interval of h_X among GRID + 2 DEGREE, t in [0, 1] on it, dt/dh_X.

    The same roundings as in `spline.bspline`: at a knot of a hat the slope depends on them.
    """
    width = high - low
    steps = tl.div_rn(tl.zeros_like(width) + GRID, width)
    raw = (h - low) * steps
    u = tl.clamp(raw, -1.0 * DEGREE, 1.0 * (GRID + DEGREE), propagate_nan=tl.PropagateNan.ALL)
    u += DEGREE
    # A NaN becomes some integer and is clamped too: it stays in t, and look-ups stay in bounds.
    interval = tl.minimum(tl.maximum(u.to(tl.int32), 0), GRID + 2 * DEGREE - 1)
    inside = (raw >= -1.0 * DEGREE) & (raw <= 1.0 * (GRID + DEGREE))
    return interval, u - interval.to(tl.float32), tl.where(inside, steps, 0.0)


@triton.jit
def _piece(t, q: tl.constexpr, DEGREE: tl.constexpr, CONSTANTS: tl.constexpr):
    """The q-th function that is not zero on an interval, and its derivative, at t_X."""
    value = tl.zeros_like(t) + CONSTANTS[q * (DEGREE + 1) + DEGREE]
    slope = tl.zeros_like(t)
    for j in tl.static_range(DEGREE):
        slope = slope * t + value
        value = value * t + CONSTANTS[q * (DEGREE + 1) + DEGREE - 1 - j]
    return value, slope


@triton.jit
def _angle(h, low, high):
    """cos and sin of u_X, the range mapped to [-pi, pi], and du/dh_X; exact far outside too."""
    v = (2 * h - low - high) / (high - low)
    v -= 2 * tl.floor(0.5 * v + 0.5)
    return tl.cos(v * PI), tl.sin(v * PI), 2 * PI / (high - low)


@triton.jit
def _coef(coef, p: tl.constexpr, STRIDE: tl.constexpr):
    return tl.load(coef + p * STRIDE).to(tl.float32)


@triton.jit
def base_value(h, BASE: tl.constexpr):
    return h / (1 + tl.exp(-h)) if BASE == "silu" else h


@triton.jit
def base_slope(h, BASE: tl.constexpr):
    if BASE == "silu":
        gate = 1 / (1 + tl.exp(-h))
        slope = gate * (1 + h * (1 - gate))
    else:
        slope = tl.full(h.shape, 1.0, tl.float32)
    return slope


@triton.constexpr_function
def count_terms(kind: str, degree: int, grid: int, size: int) -> int:
    """Rows of the table that `evaluate` reads, for one grove."""
    return (grid + 2 * degree) * (degree + 1) if kind == "spline" else size


@triton.jit
def tabulated(
    row,
    coef,
    real,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """Rows [X, 1] of the table [terms, M] from pointers [1, M] to B_0's coefficients, where real.

    A coefficient B_p each; of splines the powers of t on each interval, as in `spline.bspline`.
    """
    if KIND == "spline":
        interval, power = row // (DEGREE + 1), row % (DEGREE + 1)
        value = tl.zeros([row.shape[0], coef.shape[1]], tl.float32)
        for q in tl.static_range(DEGREE + 1):
            p = interval + q - DEGREE
            inside = real & (p >= 0) & (p < SIZE)
            c = tl.load(coef + p, mask=inside, other=0.0).to(tl.float32)
            for j in tl.static_range(DEGREE + 1):
                value += tl.where(power == j, CONSTANTS[q * (DEGREE + 1) + j], 0.0) * c
    else:
        value = tl.load(coef + row, mask=real & (row < SIZE), other=0.0).to(tl.float32)
    return value


@triton.jit
def evaluate(
    h,
    low,
    high,
    table,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """sum_p coef_p B_p(h), fp32 in the shape of h. table: pointers to row 0 of `tabulated`'s."""
    value = tl.zeros_like(h)
    if KIND == "spline":
        interval, t, _ = _on_grid(h, low, high, DEGREE, GRID)
        first = table + interval * ((DEGREE + 1) * STRIDE)
        value = tl.load(first + DEGREE * STRIDE)
        for j in tl.static_range(DEGREE):
            value = value * t + tl.load(first + (DEGREE - 1 - j) * STRIDE)
    elif KIND == "recurrence":
        u, _ = _unit(h, low, high)
        older, old = tl.zeros_like(h), tl.full(h.shape, 1.0, tl.float32)
        value += _coef(table, 0, STRIDE)
        for p in tl.static_range(DEGREE):
            older, old = old, CONSTANTS[2 * p] * u * old - CONSTANTS[2 * p + 1] * older
            value += _coef(table, p + 1, STRIDE) * old
    elif KIND == "rational":
        u, _ = _unit(h, low, high)
        power, inner = tl.full(h.shape, 1.0, tl.float32), tl.zeros_like(h)
        value += _coef(table, 0, STRIDE)
        for p in tl.static_range(1, DEGREE + 1):
            power *= u
            value += _coef(table, p, STRIDE) * power
            inner += _coef(table, DEGREE + p, STRIDE) * power
        value = value / (1 + tl.abs(inner))
    elif KIND == "fourier":
        cos, sin, _ = _angle(h, low, high)
        c, s = cos, sin
        value += _coef(table, 0, STRIDE)
        for k in tl.static_range(1, DEGREE + 1):
            value += _coef(table, 2 * k - 1, STRIDE) * c + _coef(table, 2 * k, STRIDE) * s
            c, s = c * cos - s * sin, s * cos + c * sin
    else:
        tl.static_assert(KIND == "rbf")
        u = (h - low) * ((GRID - 1 if GRID > 1 else 1) / (high - low))
        for p in tl.static_range(GRID):
            away = u - (p if GRID > 1 else 0.5)
            value += _coef(table, p, STRIDE) * tl.exp(-away * away)
    return value


@triton.jit
def _spline_slopes(
    h,
    low,
    high,
    coef,
    place,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    slope = tl.zeros_like(h)
    weight = tl.zeros([h.shape[0], place.shape[1]], tl.float32)
    interval, t, chain = _on_grid(h, low, high, DEGREE, GRID)
    for q in tl.static_range(DEGREE + 1):
        p = interval + (q - DEGREE)
        real = (p >= 0) & (p < SIZE)
        c = tl.load(coef + p, mask=real, other=0.0).to(tl.float32)
        term, rise = _piece(t, q, DEGREE, CONSTANTS)
        slope += c * rise
        weight = tl.where((place == p[:, None]) & real[:, None], term[:, None], weight)
    return slope * chain, weight


@triton.jit
def _recurrence_slopes(h, low, high, coef, place, DEGREE: tl.constexpr, CONSTANTS: tl.constexpr):
    u, chain = _unit(h, low, high)
    older, old = tl.zeros_like(h), tl.full(h.shape, 1.0, tl.float32)
    older_rise, rise, slope = tl.zeros_like(h), tl.zeros_like(h), tl.zeros_like(h)
    weight = tl.zeros([h.shape[0], place.shape[1]], tl.float32)
    weight = tl.where(place == 0, 1.0, weight)
    for p in tl.static_range(DEGREE):
        a, b = CONSTANTS[2 * p], CONSTANTS[2 * p + 1]
        older_rise, rise = rise, a * (old + u * rise) - b * older_rise
        older, old = old, a * u * old - b * older
        slope += _coef(coef, p + 1, 1) * rise
        weight = tl.where(place == p + 1, old[:, None], weight)
    return slope * chain, weight


@triton.jit
def _rational_slopes(h, low, high, coef, place, DEGREE: tl.constexpr):
    u, chain = _unit(h, low, high)
    power, upper = tl.full(h.shape, 1.0, tl.float32), _coef(coef, 0, 1)
    inner, upper_rise, inner_rise = tl.zeros_like(h), tl.zeros_like(h), tl.zeros_like(h)
    for p in tl.static_range(1, DEGREE + 1):
        a, b = _coef(coef, p, 1), _coef(coef, DEGREE + p, 1)
        upper_rise += a * p * power
        inner_rise += b * p * power
        power *= u
        upper += a * power
        inner += b * power
    sign = tl.where(inner > 0, 1.0, tl.where(inner < 0, -1.0, 0.0))
    share = 1 / (1 + tl.abs(inner))
    pull = -upper * share * share * sign
    slope = upper_rise * share + inner_rise * pull
    power = tl.full(h.shape, 1.0, tl.float32)
    weight = tl.zeros([h.shape[0], place.shape[1]], tl.float32)
    weight = tl.where(place == 0, share[:, None], weight)
    for p in tl.static_range(1, DEGREE + 1):
        power *= u
        weight = tl.where(place == p, (power * share)[:, None], weight)
        weight = tl.where(place == DEGREE + p, (power * pull)[:, None], weight)
    return slope * chain, weight


@triton.jit
def _fourier_slopes(h, low, high, coef, place, DEGREE: tl.constexpr):
    cos, sin, chain = _angle(h, low, high)
    c, s, slope = cos, sin, tl.zeros_like(h)
    weight = tl.zeros([h.shape[0], place.shape[1]], tl.float32)
    weight = tl.where(place == 0, 1.0, weight)
    for k in tl.static_range(1, DEGREE + 1):
        slope += k * (_coef(coef, 2 * k, 1) * c - _coef(coef, 2 * k - 1, 1) * s)
        weight = tl.where(place == 2 * k - 1, c[:, None], weight)
        weight = tl.where(place == 2 * k, s[:, None], weight)
        c, s = c * cos - s * sin, s * cos + c * sin
    return slope * chain, weight


@triton.jit
def _rbf_slopes(h, low, high, coef, place, GRID: tl.constexpr):
    chain = (GRID - 1 if GRID > 1 else 1) / (high - low)
    u, slope = (h - low) * chain, tl.zeros_like(h)
    weight = tl.zeros([h.shape[0], place.shape[1]], tl.float32)
    for p in tl.static_range(GRID):
        away = u - (p if GRID > 1 else 0.5)
        term = tl.exp(-away * away)
        slope -= 2 * _coef(coef, p, 1) * away * term
        weight = tl.where(place == p, term[:, None], weight)
    return slope * chain, weight


@triton.jit
def differentiate(
    h,
    low,
    high,
    coef,
    place,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    GRID: tl.constexpr,
    SIZE: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """dphi/dh [S] and dphi/dcoef [S, P'] of phi = sum_p coef_p B_p(h [S]).

    coef: pointers [S] to the coefficients of each pair's function, one after the other.
    place: int32 [1, P'], the numbers 0.. of the columns; those from P on are zero.
    """
    if KIND == "spline":
        slope, weight = _spline_slopes(h, low, high, coef, place, DEGREE, GRID, SIZE, CONSTANTS)
    elif KIND == "recurrence":
        slope, weight = _recurrence_slopes(h, low, high, coef, place, DEGREE, CONSTANTS)
    elif KIND == "rational":
        slope, weight = _rational_slopes(h, low, high, coef, place, DEGREE)
    elif KIND == "fourier":
        slope, weight = _fourier_slopes(h, low, high, coef, place, DEGREE)
    else:
        tl.static_assert(KIND == "rbf")
        slope, weight = _rbf_slopes(h, low, high, coef, place, GRID)
    return slope, weight

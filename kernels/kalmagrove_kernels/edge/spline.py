"""B-splines on a uniform grid in plain PyTorch, for the bases of `basis` and the reference.

`bspline_bases` is the textbook recursion; `bspline` is the same function from one cubic (or other
degree) polynomial an interval, without an [N, M, P] tensor.
Letters: N tokens, M edges, P basis functions, J intervals.
"""

from fractions import Fraction
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_position(h: Tensor, range_2: Tensor, grid: int) -> Tensor:
    """Where h stands on the grid: 0 at the low end of the range, `grid` at the high end."""
    low, high = range_2.to(h.dtype).unbind()
    return (h - low) * (grid / (high - low))


def bspline_bases(h: Tensor, range_2: Tensor, *, degree: int, grid: int) -> Tensor:
    """All B-spline basis functions on the uniform grid extended by `degree` intervals to each side.

    Cox-de Boor recursion (C. de Boor, A Practical Guide to Splines, chapter IX). Inside the range
    they sum to 1; outside they fall smoothly to 0 within `degree` intervals.

    Args:
        h: [...]. range_2: the ends of the range.
    Returns:
        [..., grid + degree].
    """
    u = grid_position(h, range_2, grid).unsqueeze(-1)
    knots = torch.arange(-degree, grid + degree + 1, dtype=h.dtype, device=h.device)
    bases = ((u >= knots[:-1]) & (u < knots[1:])).to(h.dtype)
    for d in range(1, degree + 1):
        rising = (u - knots[: -d - 1]) / d * bases[..., :-1]
        falling = (knots[d + 1 :] - u) / d * bases[..., 1:]
        bases = rising + falling
    return bases


@torch.compiler.assume_constant_result
def piece_matrix(degree: int) -> tuple[tuple[float, ...], ...]:
    """The uniform B-spline as polynomials: row q holds the powers of t in [0, 1) of the q-th basis
    function that is not zero on an interval, q = 0..degree.

    From N_n(x) = x/n N_{n-1}(x) + (n+1-x)/n N_{n-1}(x-1), exactly, in rational numbers.
    """
    return _piece_matrix(degree)


@cache
def _piece_matrix(degree: int) -> tuple[tuple[float, ...], ...]:
    pieces = [[Fraction(1)]]  # pieces[s]: N on [s, s + 1), in powers of t = x - s
    for n in range(1, degree + 1):
        nothing = [Fraction(0)] * n
        longer = []
        for s in range(n + 1):
            up = pieces[s] if s < n else nothing
            down = pieces[s - 1] if s > 0 else nothing
            row = [Fraction(0)] * (n + 1)
            for power in range(n):
                row[power] += (s * up[power] + (n + 1 - s) * down[power]) / n
                row[power + 1] += (up[power] - down[power]) / n
            longer.append(row)
        pieces = longer
    return tuple(tuple(float(c) for c in row) for row in reversed(pieces))


def bspline(h_NM: Tensor, coef_MP: Tensor, range_2: Tensor, *, degree: int) -> Tensor:
    """sum_p coef_mp B_p(h_m) with the basis of `bspline_bases`, by one polynomial an interval.

    The coefficients become a table [M, J, degree + 1] of powers; an element looks up its interval
    and runs Horner's rule. Beyond `degree` intervals outside the range the value and gradient are
    0.
    """
    edges, size = coef_MP.shape
    grid = size - degree
    intervals = grid + 2 * degree
    matrix = torch.tensor(piece_matrix(degree), dtype=coef_MP.dtype, device=coef_MP.device)
    table_MJC = F.pad(coef_MP, (degree, degree)).unfold(1, degree + 1, 1) @ matrix
    powers_CX = table_MJC.flatten(0, 1).t().to(h_NM.dtype)
    u_NM = grid_position(h_NM, range_2, grid).clamp(-degree, grid + degree) + degree
    # A NaN becomes some integer and is clamped too: it stays in t, and the look-up stays in bounds.
    interval_NM = u_NM.detach().long().clamp(0, intervals - 1)
    t_NM = u_NM - interval_NM
    offset_M = torch.arange(edges, device=h_NM.device) * intervals
    index = (interval_NM + offset_M).flatten()
    value_NM = torch.zeros_like(h_NM)
    for power_X in reversed(powers_CX.unbind(0)):
        value_NM = value_NM * t_NM + power_X.gather(0, index).view_as(h_NM)
    return value_NM

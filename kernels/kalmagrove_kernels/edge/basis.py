"""The univariate bases an edge function is made of, in one table.

`kalmagrove.nn.edge` builds edge functions of them, the retrofit polynomial feed-forwards; the fused
kernels beside this file compute them by the names and rules of this table.
A basis evaluates B_p(h) of a pre-activation h whose expected range is given by two numbers:
- polynomials (and rational) see u = the range mapped to [-1, 1], clamped: outside the range the
  basis part is constant, so high degrees stay bounded, and inside it they are polynomials of h;
- Fourier is periodic with the range as its period;
- B-splines, hats and Gaussians fall to 0 outside; the edge's base term carries on.
Letters: M edges, P basis functions.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kalmagrove_kernels.edge.spline import bspline, bspline_bases


class Basis:
    """Functions B_0..B_{P-1}. Subclasses give `size` and `terms`, or override the evaluation.

    degree: of a polynomial or spline; harmonics of a Fourier series. grid: intervals or centres.
    nonlinear_std: how the coefficients after `linear_size`, if there are any, start: N(0, std^2).
    """

    nonlinear_std = 0.0

    def __init__(self, degree: int = 3, grid: int = 8) -> None:
        self.degree, self.grid = degree, grid

    @property
    def size(self) -> int:
        """P, the number of coefficients of one function."""
        return self.degree + 1

    @property
    def linear_size(self) -> int:
        """How many of the P coefficients, the first ones, the function is linear in."""
        return self.size

    def coordinate(self, h: Tensor, range_2: Tensor) -> Tensor:
        """The range mapped to [-1, 1]."""
        low, high = range_2.to(h.dtype).unbind()
        return ((2 * h - low - high) / (high - low)).clamp(-1, 1)

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        """B_0(u), B_1(u), ... one at a time, each of the shape of u."""
        raise NotImplementedError

    def evaluate(self, h: Tensor, range_2: Tensor, coef_MP: Tensor | None = None) -> Tensor:
        """All functions [..., linear_size] at h [...]; `phi` is this times the (linear)
        coefficients.

        `coef_MP` matters only where the functions themselves have coefficients (rational).
        """
        return torch.stack(list(self.terms(self.coordinate(h, range_2))), dim=-1)

    def phi(self, h_NM: Tensor, coef_MP: Tensor, range_2: Tensor) -> Tensor:
        """phi_m(h_m) [..., M] from coefficients [M, P], without an [..., M, P] tensor."""
        value = torch.zeros_like(h_NM)
        terms = self.terms(self.coordinate(h_NM, range_2))
        for coef_M, term_NM in zip(coef_MP.unbind(-1), terms, strict=True):
            value = value + coef_M * term_NM
        return value


class BSpline(Basis):
    """B-splines of any degree on a uniform grid over the range; they sum to 1 inside it."""

    @property
    def size(self) -> int:
        return self.grid + self.degree

    def evaluate(self, h: Tensor, range_2: Tensor, coef_MP: Tensor | None = None) -> Tensor:
        return bspline_bases(h, range_2, degree=self.degree, grid=self.grid)

    def phi(self, h_NM: Tensor, coef_MP: Tensor, range_2: Tensor) -> Tensor:
        return bspline(h_NM, coef_MP, range_2, degree=self.degree)


class PiecewiseLinear(BSpline):
    """Hat functions at the grid + 1 knots: B-splines of degree 1."""

    def __init__(self, degree: int = 1, grid: int = 8) -> None:
        super().__init__(1, grid)


class Chebyshev1(Basis):
    """T_p(u): T_{p+1} = 2u T_p - T_{p-1}, T_1 = u."""

    first = 1.0  # the leading coefficient of the polynomial of degree 1

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        older, old = torch.zeros_like(u), torch.ones_like(u)
        yield old
        for p in range(self.degree):
            new = self.first * u if p == 0 else 2 * u * old - older
            older, old = old, new
            yield old


class Chebyshev2(Chebyshev1):
    """U_p(u): the same recurrence, U_1 = 2u."""

    first = 2.0


class Legendre(Basis):
    """P_p(u): (p+1) P_{p+1} = (2p+1) u P_p - p P_{p-1}."""

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        older, old = torch.zeros_like(u), torch.ones_like(u)
        yield old
        for p in range(self.degree):
            older, old = old, ((2 * p + 1) * u * old - p * older) / (p + 1)
            yield old


class Hermite(Basis):
    """Probabilists' He_p(z) / sqrt(p!) at z = 3u: orthonormal under N(0, 1), with the range as +-3
    sigma.

    The normalisation keeps |He_p(z)| / sqrt(p!) < 1.09 exp(z^2 / 4) < 10.4 for every degree
    (Cramer).
    """

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        z = 3 * u
        older, old = torch.zeros_like(z), torch.ones_like(z)
        yield old
        for p in range(self.degree):
            older, old = old, (z * old - math.sqrt(p) * older) / math.sqrt(p + 1)
            yield old


class Fourier(Basis):
    """1, cos u, sin u, cos 2u, sin 2u, ..., with the range mapped to [-pi, pi] and not clamped."""

    @property
    def size(self) -> int:
        return 2 * self.degree + 1

    def coordinate(self, h: Tensor, range_2: Tensor) -> Tensor:
        low, high = range_2.to(h.dtype).unbind()
        return (2 * h - low - high) * (math.pi / (high - low))

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        yield torch.ones_like(u)
        for k in range(1, self.degree + 1):
            yield torch.cos(k * u)
            yield torch.sin(k * u)


class RBF(Basis):
    """Gaussians exp(-((h - c) / s)^2) at `grid` even centres over the range, at a distance s."""

    @property
    def size(self) -> int:
        return self.grid

    def coordinate(self, h: Tensor, range_2: Tensor) -> Tensor:
        """In units of s: 0 at the first centre, grid - 1 at the last."""
        low, high = range_2.to(h.dtype).unbind()
        return (h - low) * (max(self.grid - 1, 1) / (high - low))

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        for c in range(self.grid):
            centre = c if self.grid > 1 else 0.5
            yield torch.exp(-(u - centre).square())


class Rational(Basis):
    """(a_0 + ... + a_n u^n) / (1 + |b_1 u + ... + b_n u^n|): a Pade form without poles.

    Coefficients are a_0..a_n, then b_1..b_n (PAU, arXiv:1907.06732, section 3). Linear in a only.
    b starts small and random: at b = 0 the absolute value has no gradient and b would never move.
    """

    nonlinear_std = 0.1

    @property
    def size(self) -> int:
        return 2 * self.degree + 1

    @property
    def linear_size(self) -> int:
        return self.degree + 1

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        power = torch.ones_like(u)
        yield power
        for _ in range(self.degree):
            power = power * u
            yield power

    def evaluate(self, h: Tensor, range_2: Tensor, coef_MP: Tensor | None = None) -> Tensor:
        powers = super().evaluate(h, range_2)
        if coef_MP is None:
            return powers
        inner = (powers[..., 1:] * coef_MP[:, self.linear_size :]).sum(-1, keepdim=True)
        return powers / (1 + inner.abs())

    def phi(self, h_NM: Tensor, coef_MP: Tensor, range_2: Tensor) -> Tensor:
        upper = torch.zeros_like(h_NM)
        lower = torch.zeros_like(h_NM)
        for p, power in enumerate(self.terms(self.coordinate(h_NM, range_2))):
            upper = upper + coef_MP[:, p] * power
            if p:
                lower = lower + coef_MP[:, self.degree + p] * power
        return upper / (1 + lower.abs())


BASES: dict[str, type[Basis]] = {
    "bspline": BSpline,
    "chebyshev1": Chebyshev1,
    "chebyshev2": Chebyshev2,
    "legendre": Legendre,
    "hermite": Hermite,
    "fourier": Fourier,
    "rational": Rational,
    "rbf": RBF,
    "piecewise_linear": PiecewiseLinear,
}

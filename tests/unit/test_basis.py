"""The univariate bases against scipy and numpy, and their gradients against finite differences."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev, hermite_e, legendre
from scipy.interpolate import BSpline as ScipyBSpline
from torch import Tensor

from kalmagrove_kernels.edge import bspline, bspline_bases
from kalmagrove_kernels.edge.basis import BASES

pytestmark = pytest.mark.unit

SPAN = torch.tensor([-2.0, 3.0], dtype=torch.float64)
NAMES = sorted(BASES)


def inside(count: int = 101) -> Tensor:
    return torch.linspace(-1.999, 2.999, count, dtype=torch.float64)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_bspline_is_scipys_also_outside_the_range(degree: int) -> None:
    grid = 6
    knots = np.linspace(-2, 3, grid + 1)
    step = knots[1] - knots[0]
    knots = -2 + step * np.arange(-degree, grid + degree + 1)
    h = torch.linspace(-9, 9, 400, dtype=torch.float64)
    ours = bspline_bases(h, SPAN, degree=degree, grid=grid)
    for p in range(grid + degree):
        theirs = ScipyBSpline.basis_element(knots[p : p + degree + 2], extrapolate=False)(h.numpy())
        np.testing.assert_allclose(ours[:, p].numpy(), np.nan_to_num(theirs), atol=1e-13)


@pytest.mark.parametrize(("degree", "grid"), [(1, 1), (2, 5), (3, 8), (3, 1), (7, 3)])
def test_the_interval_form_is_the_recursion(degree: int, grid: int) -> None:
    coef = torch.randn(4, grid + degree, dtype=torch.float64)
    h = torch.empty(300, 4, dtype=torch.float64).uniform_(-12, 12)
    bases = bspline_bases(h, SPAN, degree=degree, grid=grid)
    torch.testing.assert_close(bspline(h, coef, SPAN, degree=degree), (bases * coef).sum(-1))


def test_bsplines_sum_to_one_inside_and_vanish_outside() -> None:
    for degree in (1, 2, 3, 4):
        basis = BASES["bspline"](degree, 5)
        ones = torch.ones_like(inside())
        torch.testing.assert_close(basis.evaluate(inside(), SPAN).sum(-1), ones)
        far = torch.tensor([-100.0, 100.0], dtype=torch.float64)
        assert not basis.evaluate(far, SPAN).any()


def test_not_a_number_stays_one_and_never_reads_out_of_bounds() -> None:
    h = torch.tensor([[math.nan], [math.inf], [-math.inf], [0.0]])
    value = bspline(h, torch.ones(1, 11), SPAN.float(), degree=3)
    assert value[0].isnan().all()
    assert value[3] == pytest.approx(1.0)
    assert value[1:3].abs().max() < 1e-5


def chebyshev2(u: np.ndarray, degree: int) -> np.ndarray:
    """U_p by its definition, sin((p + 1) t) / sin t at u = cos t."""
    t = np.arccos(u)
    return np.stack([np.sin((p + 1) * t) / np.sin(t) for p in range(degree + 1)], axis=-1)


def hermite(u: np.ndarray, degree: int) -> np.ndarray:
    norms = np.sqrt([math.factorial(p) for p in range(degree + 1)])
    return hermite_e.hermevander(3 * u, degree) / norms


@pytest.mark.parametrize("degree", [1, 2, 12])
@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("chebyshev1", chebyshev.chebvander),
        ("chebyshev2", chebyshev2),
        ("legendre", legendre.legvander),
        ("hermite", hermite),
    ],
)
def test_polynomials_are_numpys(name: str, oracle: Callable, degree: int) -> None:
    u = ((2 * inside() - 1) / 5).numpy()
    ours = BASES[name](degree).evaluate(inside(), SPAN).numpy()
    np.testing.assert_allclose(ours, oracle(u, degree), atol=1e-11)


def test_fourier_rbf_and_rational_are_their_formulas() -> None:
    h = inside().numpy()
    t = math.pi * (2 * h - 1) / 5
    expected = [np.ones_like(t), np.cos(t), np.sin(t), np.cos(2 * t), np.sin(2 * t)]
    ours = BASES["fourier"](2).evaluate(inside(), SPAN).numpy()
    np.testing.assert_allclose(ours, np.stack(expected, -1), atol=1e-13)

    centres, width = np.linspace(-2, 3, 6), 1.0
    ours = BASES["rbf"](3, 6).evaluate(inside(), SPAN).numpy()
    np.testing.assert_allclose(ours, np.exp(-(((h[:, None] - centres) / width) ** 2)), atol=1e-13)

    u = (2 * h - 1) / 5
    coef = torch.tensor([[1.0, -2.0, 0.5, 0.7, -3.0]], dtype=torch.float64)
    ours = BASES["rational"](2).phi(inside()[:, None], coef, SPAN)[:, 0].numpy()
    expected = (1 - 2 * u + 0.5 * u**2) / (1 + np.abs(0.7 * u - 3 * u**2))
    np.testing.assert_allclose(ours, expected, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_phi_is_the_basis_times_its_coefficients(name: str) -> None:
    basis = BASES[name](4, 5)
    h = torch.empty(50, 3, dtype=torch.float64).uniform_(-6, 6)
    coef = torch.randn(3, basis.size, dtype=torch.float64)
    values = basis.evaluate(h, SPAN, coef)
    assert values.shape == (50, 3, basis.linear_size)
    expected = (values * coef[:, : basis.linear_size]).sum(-1)
    torch.testing.assert_close(basis.phi(h, coef, SPAN), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    basis = BASES[name](3, 4)
    torch.manual_seed(0)
    # Off the kinks: knots of the hats, ends of the clamped range.
    h = torch.empty(6, 2, dtype=torch.float64).uniform_(-1.9, 2.9).requires_grad_()
    coef = torch.randn(2, basis.size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, coef: basis.phi(h, coef, SPAN), (h, coef))


@pytest.mark.parametrize("name", NAMES)
def test_high_degrees_stay_bounded_far_outside_the_range(name: str) -> None:
    h = torch.tensor([-1e4, -4.0, 0.5, 4.0, 1e4])
    values = BASES[name](20, 20).evaluate(h, SPAN.float())
    assert values.isfinite().all()
    assert values.abs().max() <= 21 + 1e-3  # U_20(1) = 21

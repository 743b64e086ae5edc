"""Edge functions: their start, their precision, and the refit of the grid."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.config import Edge
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.parallel import Group, Shard
from kalmagrove_kernels.edge.basis import BASES

pytestmark = pytest.mark.unit


def make(edges: int, config: Edge, groves: int | None = None) -> EdgeActivation:
    shard = None if groves is None else Shard.of("ep", Group.alone(), groves)
    edge = EdgeActivation(edges, config, shard)
    edge.init_weights()
    return edge


def outside(h: Tensor, edge: EdgeActivation) -> float:
    return float(((h < edge.range[0]) | (h > edge.range[1])).float().mean())


@pytest.mark.parametrize("basis", sorted(BASES))
@pytest.mark.parametrize("base", ["silu", "identity", "none"])
def test_starts_near_the_base(basis: str, base: str) -> None:
    torch.manual_seed(0)
    edge = make(64, Edge(basis=basis, base=base, init_scale=0.1))
    h = torch.randn(500, 64)
    target = h if base == "identity" else F.silu(h)
    away = float((edge(h).detach() - target).square().mean().sqrt() / target.square().mean().sqrt())
    # The random part is 0.1 in expectation; without a base the fit of the SiLU comes on top.
    assert (0.02 if base != "none" else 0.0) < away < (0.2 if base != "none" else 0.35)


def test_zero_init_scale_is_the_base() -> None:
    edge = make(5, Edge(init_scale=0.0))
    h = torch.randn(7, 5) * 5
    torch.testing.assert_close(edge(h), F.silu(h))


def test_parameters_are_splines_and_ranges_survive_a_cast() -> None:
    edge = make(4, Edge(range=(-1.2345678, 3.3333333)), groves=2)
    before = edge.range.clone()
    edge.bfloat16()
    assert edge.coef.dtype == torch.bfloat16
    assert torch.equal(edge.range, before)
    assert edge.range.dtype == torch.float32
    assert {p.kind for p in edge.parameters()} == {"spline"}
    assert "range" in edge.state_dict()
    assert edge(torch.randn(3, 4).bfloat16(), grove=1).dtype == torch.float32


@pytest.mark.parametrize("basis", sorted(BASES))
def test_refit_keeps_the_function_and_covers_the_data(basis: str) -> None:
    torch.manual_seed(0)
    edge = make(3, Edge(basis=basis, degree=3, grid=12, init_scale=1.0, range=(-2.0, 2.0)))
    h = torch.randn(800, 3).clamp(-1.9, 1.9) * 0.9 + 1.0
    before_rate, before = outside(h, edge), edge(h).detach()
    error = float(edge.refit(h))
    after = edge(h).detach()
    assert before_rate > 0.1
    assert outside(h, edge) < 0.01 < before_rate
    rms = float((after - before).square().mean().sqrt())
    assert rms == pytest.approx(error, rel=1e-2, abs=1e-5)
    assert rms < 0.25 * float(before.std())  # the old function has kinks where it left its range


def test_refit_to_a_larger_range_is_exact_for_polynomials() -> None:
    """Inside the old range a polynomial is one on any range."""
    edge = make(3, Edge(basis="legendre", degree=5, init_scale=1.0, range=(-4.0, 4.0)))
    h = torch.empty(500, 3).uniform_(-3, 2)
    before = edge(h).detach()
    assert float(edge.refit(h)) < 1e-6
    torch.testing.assert_close(edge(h).detach(), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("basis", sorted(BASES))
@pytest.mark.parametrize(
    "h", [torch.full((64, 2), 7.5), torch.tensor([[0.3, -9.0]]), torch.zeros(9, 2)]
)
def test_refit_survives_rank_deficient_data(basis: str, h: Tensor) -> None:
    edge = make(2, Edge(basis=basis, init_scale=1.0))
    before = edge(h).detach()
    edge.refit(h)
    assert edge.coef.isfinite().all()
    assert edge.range[0] < edge.range[1]
    assert outside(h, edge) == 0.0
    torch.testing.assert_close(edge(h).detach(), before, atol=2e-2, rtol=2e-2)


def test_refit_forgets_nothing_where_no_data_lies() -> None:
    edge = make(2, Edge(init_scale=1.0, range=(-3.0, 3.0)))
    data = torch.tensor([-2.8, 2.8]).repeat(400).unsqueeze(1).expand(-1, 2)
    between = torch.linspace(-2.5, 2.5, 200).unsqueeze(1).expand(-1, 2)
    before = edge(between).detach()
    edge.refit(data)
    away = (edge(between).detach() - before).square().mean().sqrt()
    assert float(away) < 0.1 * float(before.std())


def test_fitting_a_base_is_well_posed_where_no_samples_fall() -> None:
    edge = make(2, Edge(base="none", range=(-40.0, 40.0), grid=64))
    h = torch.randn(50, 2) * 10
    assert edge.coef.isfinite().all()
    assert float(edge(h).detach().abs().max()) < 50


def test_refit_ignores_rows_that_are_not_finite_and_refuses_only_those() -> None:
    edge = make(2, Edge())
    h = torch.randn(50, 2)
    h[3, 1] = float("nan")
    edge.refit(h)
    assert edge.coef.isfinite().all()
    with pytest.raises(ValueError, match="finite"):
        edge.refit(torch.full((2, 2), float("inf")))


@pytest.mark.parametrize("scale", [1e200, 1e-3])
def test_a_refit_that_is_not_finite_in_the_coefficients_type_changes_nothing(scale: float) -> None:
    edge = make(2, Edge())
    h = (scale * torch.randn(100, 2, dtype=torch.float64)) + (1e9 if scale < 1 else 0)
    before = edge.coef.detach().clone(), edge.range.clone()
    with pytest.raises(ValueError, match="no finite"):
        edge.refit(h)
    assert torch.equal(before[0], edge.coef)
    assert torch.equal(before[1], edge.range)


def test_refit_touches_only_its_grove() -> None:
    edge = make(2, Edge(), groves=3)
    coef, span = edge.coef.detach().clone(), edge.range.clone()
    edge.refit(torch.randn(100, 2) * 5, grove=1)
    assert not torch.equal(edge.coef[1], coef[1])
    assert not torch.equal(edge.range[1], span[1])
    for g in (0, 2):
        assert torch.equal(edge.coef[g], coef[g])
        assert torch.equal(edge.range[g], span[g])

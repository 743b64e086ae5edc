"""The forms of the reference kernels agree, forward and every gradient, at awkward shapes."""

import sys

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import edge, projection
from kalmagrove_kernels.edge.basis import BASES as UNIVARIATE
from kalmagrove_kernels.projection import reference

pytestmark = pytest.mark.unit


def case(tokens: int, width: int, edges: int, rank: int, kept: int) -> list[Tensor]:
    torch.manual_seed(tokens + edges)
    x = torch.randn(tokens, width, dtype=torch.float64)
    m, index = torch.randn(tokens, edges, dtype=torch.float64).topk(kept)
    v, u = torch.randn(2, edges, rank, width, dtype=torch.float64).unbind()
    return [x, m, index, v, u]


def run(form: str, tensors: list[Tensor], inner_silu: bool) -> list[Tensor]:
    x, m, index, v, u = tensors
    leaves = [t.clone().requires_grad_() for t in (x, m, v, u)]
    x, m, v, u = leaves
    if form == "dense_masked":
        dense = m.new_zeros(len(x), len(v)).scatter(1, index, m)
        y = projection.dense_masked(x, dense, v, u, inner_silu=inner_silu)
    else:
        y = getattr(projection, form)(x, m, index, v, u, inner_silu=inner_silu)
    torch.manual_seed(0)
    grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), leaves)
    return [y, *grads]


@pytest.mark.parametrize("inner_silu", [True, False])
@pytest.mark.parametrize(
    "shape", [(63, 12, 13, 5, 4), (1, 3, 7, 1, 1), (0, 4, 3, 2, 2), (9, 4, 3, 2, 3)]
)
@pytest.mark.parametrize("form", ["dense_masked", "sorted_by_edge", "basis_projection"])
def test_every_form_is_the_formula(form: str, shape: tuple[int, ...], inner_silu: bool) -> None:
    tensors = case(*shape)
    expected = run("gathered", tensors, inner_silu)
    for ours, theirs in zip(run(form, tensors, inner_silu), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_op_takes_the_sorted_form_when_edges_have_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    real = reference.sorted_by_edge

    def spy(*args: Tensor, inner_silu: bool) -> Tensor:
        called.append(len(args[0]))
        return real(*args, inner_silu=inner_silu)

    monkeypatch.setattr(reference, "sorted_by_edge", spy)
    many, few = case(64 * 8, 4, 16, 2, 2), case(8, 4, 16, 2, 2)
    for tensors in (few, many):
        expected = projection.gathered(*tensors, inner_silu=True)
        ours = projection.basis_projection(*tensors, inner_silu=True)
        torch.testing.assert_close(ours, expected)
    assert called == [512]


def test_edge_functions_are_base_plus_spline() -> None:
    h, coef = torch.randn(20, 3, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    scale, span = torch.randn(3, dtype=torch.float64), torch.tensor([-2.0, 2.0])
    spline = (edge.bspline_bases(h, span, degree=3, grid=8) * coef).sum(-1)
    options = {"basis": "bspline", "degree": 3, "grid": 8, "base": "silu"}
    for weight, expected in ((scale, spline + scale * h * torch.sigmoid(h)), (None, spline)):
        kept = edge.edge_topk(h, coef, weight, span, 3, **options)
        torch.testing.assert_close(kept.value_NK, expected.gather(1, kept.index_NK))


def test_a_backend_that_is_not_built_is_refused() -> None:
    with pytest.raises(RuntimeError, match="fpga"):
        edge.edge_topk(
            torch.zeros(1, 1),
            torch.zeros(1, 4),
            None,
            torch.tensor([0.0, 1.0]),
            1,
            basis="bspline",
            degree=3,
            grid=1,
            base="none",
            backend="fpga",
        )


def test_edge_topk_keeps_the_largest_and_sums_over_all() -> None:
    torch.manual_seed(0)
    h, coef = torch.randn(20, 6, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64)
    scale, span = torch.randn(6, dtype=torch.float64), torch.tensor([-1.0, 1.5])
    options = {"basis": "bspline", "degree": 3, "grid": 4, "base": "silu"}
    kept = edge.edge_topk(h, coef, scale, span, 2, **options)
    e = edge.bspline(h, coef, span, degree=3) + scale * h * torch.sigmoid(h)
    assert torch.equal(kept.index_NK, e.abs().topk(2).indices)
    torch.testing.assert_close(kept.value_NK, e.gather(1, kept.index_NK))
    torch.testing.assert_close(kept.energy, e.square().sum().float())
    assert kept.outside == ((h < -1) | (h > 1.5)).sum()
    index = torch.tensor([[5, 0]]).expand(20, 2)
    given = edge.edge_topk(h, coef, scale, span, 2, **options, index_NK=index)
    torch.testing.assert_close(given.value_NK, e.gather(1, index))


@pytest.mark.parametrize("name", sorted(UNIVARIATE))
def test_edge_topk_of_groves_is_each_groves_own(name: str) -> None:
    torch.manual_seed(1)
    size = UNIVARIATE[name](2, 3).size
    h = torch.randn(9, 5, dtype=torch.float64)
    weights = [torch.randn(3, 5, size).double(), torch.randn(3, 5).double()]
    span = torch.tensor([-1.0, 1.0]) + torch.rand(3, 2)
    leaves = [t.requires_grad_() for t in (h, *weights)]
    options = {"basis": name, "degree": 2, "grid": 3, "base": "identity"}
    group = torch.tensor([0] * 4 + [2] * 5, dtype=torch.int32)
    together = edge.edge_topk(*leaves, span, 2, **options, group_N=group)
    parts = [
        edge.edge_topk(h[rows], leaves[1][g], leaves[2][g], span[g], 2, **options)
        for g, rows in ((0, slice(0, 4)), (2, slice(4, 9)))
    ]
    value = torch.cat([part.value_NK for part in parts])
    torch.testing.assert_close(together.value_NK, value)
    index = torch.cat([parts[0].index_NK, parts[1].index_NK + 10])
    assert torch.equal(together.index_NK, index)
    torch.testing.assert_close(together.energy, parts[0].energy + parts[1].energy)
    assert together.outside == parts[0].outside + parts[1].outside
    for ours, theirs in zip(
        torch.autograd.grad(together.value_NK.square().sum(), leaves),
        torch.autograd.grad(value.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_backend_of_edge_topk_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = torch.zeros(1, 1), torch.zeros(1, 4), None, torch.tensor([0.0, 1.0]), 1
    options = {"basis": "bspline", "degree": 3, "grid": 1, "base": "none"}
    with pytest.raises(RuntimeError, match="backend=fpga of the edge op must be"):
        edge.edge_topk(*tensors, **options, backend="fpga")
    monkeypatch.setitem(sys.modules, "kalmagrove_kernels.edge.triton", None)
    with pytest.raises(RuntimeError, match="backend=triton of the edge op is missing"):
        edge.edge_topk(*tensors, **options, backend="triton")

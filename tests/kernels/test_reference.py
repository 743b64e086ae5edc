"""The forms of the reference kernels agree, forward and every gradient, at awkward shapes."""

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import edge, projection
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


def test_edge_activation_is_base_plus_spline() -> None:
    h, coef = torch.randn(20, 3, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    scale, span = torch.randn(3, dtype=torch.float64), torch.tensor([-2.0, 2.0])
    spline = (edge.bspline_bases(h, span, degree=3, grid=8) * coef).sum(-1)
    with_base = edge.edge_activation(h, coef, scale, span, degree=3, base="silu")
    torch.testing.assert_close(with_base, spline + scale * h * torch.sigmoid(h))
    torch.testing.assert_close(edge.edge_activation(h, coef, None, span, degree=3), spline)


def test_a_backend_that_is_not_built_is_refused() -> None:
    with pytest.raises(KeyError):
        edge.edge_activation(
            torch.zeros(1, 1),
            torch.zeros(1, 4),
            None,
            torch.tensor([0.0, 1.0]),
            degree=3,
            backend="fpga",
        )

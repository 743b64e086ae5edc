"""Manifold routing: exactly k kept whatever the ties, and the gradient each mode promises."""

import pytest
import torch

from kalmagrove.nn import routing

pytestmark = pytest.mark.unit


def test_keeps_the_largest_magnitudes() -> None:
    e = torch.tensor([[0.1, -3.0, 2.0, -0.5], [1.0, 0.0, -0.25, 0.5]])
    index = routing.select(e, 2)
    assert index.tolist() == [[1, 2], [0, 3]]
    assert routing.hard(e, index).tolist() == [[0.0, -3.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.5]]


def test_of_equal_magnitudes_the_lower_edge_wins_and_exactly_k_are_kept() -> None:
    e = torch.tensor([[2.0, -1.0, 1.0, -1.0, 1.0], [0.0] * 5, [-2.0] * 5])
    assert routing.select(e, 3).tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_selection_agrees_with_a_sort() -> None:
    e = torch.randn(500, 37).bfloat16().float()  # bf16 values: many ties
    expected = e.abs().sort(dim=1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(routing.select(e, 8), expected)


def test_hard_passes_gradients_to_the_kept_only() -> None:
    e = torch.randn(20, 9, requires_grad=True)
    index = routing.select(e, 3)
    weight = torch.randn(20, 9)
    (routing.hard(e, index) * weight).sum().backward()
    kept = torch.zeros(20, 9).scatter(1, index, 1.0)
    assert torch.equal(e.grad, weight * kept)


def test_straight_through_is_hard_forward_and_its_surrogate_backward() -> None:
    torch.manual_seed(1)
    width, k = 0.3, 3
    e = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    m, index = routing.straight_through(e, k, width)
    assert torch.equal(m, routing.hard(e, routing.select(e, k)))
    assert torch.equal(index, routing.select(e, k))
    weight = torch.randn_like(e)
    (grad,) = torch.autograd.grad((m * weight).sum(), e)

    at = e.detach()
    mask = torch.zeros_like(at).scatter(1, index, 1.0)
    sizes = at.abs().sort(dim=1, descending=True).values
    theta = (sizes[:, k - 1 : k] + sizes[:, k : k + 1]) / 2

    def surrogate(x: torch.Tensor) -> torch.Tensor:
        return x * mask + at * torch.sigmoid((x.abs() - theta) / width)

    step = 1e-6
    expected = weight * (surrogate(at + step) - surrogate(at - step)) / (2 * step)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)
    assert (grad[mask == 0].abs() > 1e-4).any(), "an edge that just missed must learn"


def test_straight_through_with_every_edge_kept_is_the_identity() -> None:
    e = torch.randn(4, 5, requires_grad=True)
    m, index = routing.straight_through(e, 5, 0.1)
    assert torch.equal(m, e)
    assert index.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 4
    m.sum().backward()
    assert torch.equal(e.grad, torch.ones(4, 5))

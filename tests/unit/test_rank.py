"""Rank allocation against brute force, factorisation against the errors it promises."""

import itertools

import pytest
import torch

from kalmagrove.nn.attention.rank import (
    allocate_exact,
    allocate_greedy,
    allocate_table,
    factorise,
    surrogate_error,
    whitened_spectrum,
    whitening_factor,
)

pytestmark = pytest.mark.unit


def some_head(seed: int = 0, width: int = 5, d_model: int = 12, samples: int = 40):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_model, d_model, generator=generator)
    x = (torch.randn(samples, d_model, generator=generator) @ mix).double()
    w_q, w_k = (torch.randn(width, d_model, generator=generator).double() for _ in range(2))
    return x, w_q, w_k


def some_spectra(seed: int, heads: int = 4, width: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(heads, width, generator=generator) * torch.rand(
        heads, 1, generator=generator
    )
    return list(values.sort(descending=True).values)


def brute_force(spectra, budget, costs, minimum=1, step=1) -> float:
    choices = [range(minimum, len(s) + 1, step) for s in spectra]
    return min(
        surrogate_error(spectra, ranks)
        for ranks in itertools.product(*choices)
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("budget", [4, 7, 11, 20, 99])
def test_greedy_is_optimal_at_equal_costs(seed: int, step: int, budget: int) -> None:
    spectra = some_spectra(seed)
    ranks = allocate_greedy(spectra, budget, step=step)
    assert sum(ranks) <= budget
    want = brute_force(spectra, budget, [1] * 4, step=step)
    assert surrogate_error(spectra, ranks) == pytest.approx(want)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("budget", "step", "minimum"), [(12, 1, 1), (23, 1, 1), (30, 2, 1), (9, 1, 0)]
)
def test_exact_is_optimal_at_unequal_costs(seed: int, budget: int, step: int, minimum: int) -> None:
    spectra, costs = some_spectra(seed), [1, 2, 3, 5]
    exact = allocate_exact(spectra, budget, costs, minimum, step)
    greedy = allocate_greedy(spectra, budget, costs, minimum, step)
    want = brute_force(spectra, budget, costs, minimum, step)
    assert surrogate_error(spectra, exact) == pytest.approx(want)
    for ranks in (exact, greedy):
        assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget
        assert all((r - minimum) % step == 0 and minimum <= r <= 5 for r in ranks)


def test_greedy_can_miss_the_optimum_at_unequal_costs() -> None:
    """The reason `allocate_exact` exists."""
    spectra = [torch.tensor([0.0, 1.1]).sort(descending=True).values, torch.tensor([3.0])]
    assert allocate_greedy(spectra, 10, [1, 10], minimum=0) == [2, 0]
    assert allocate_exact(spectra, 10, [1, 10], minimum=0) == [0, 1]


def test_table_has_the_shape_of_qk_rank() -> None:
    layers = [some_spectra(0, heads=2), some_spectra(1, heads=2)]
    table = allocate_table(layers, budget=12, minimum=2, step=2)
    assert [len(row) for row in table] == [2, 2]
    assert sum(map(sum, table)) <= 12
    assert all(isinstance(r, int) and r % 2 == 0 for row in table for r in row)


@pytest.mark.parametrize("rank", range(1, 6))
def test_factors_reach_the_error_of_the_spectrum(rank: int) -> None:
    """The scores' error is the tail of the spectrum: the Eckart-Young bound."""
    x, w_q, w_k = some_head()
    whitening = whitening_factor(x.T @ x)
    small_q, small_k = factorise(w_q, w_k, whitening, rank)
    assert small_q.shape == small_k.shape == (rank, 12)
    scores, approximate = x @ w_q.T @ w_k @ x.T, x @ small_q.T @ small_k @ x.T
    error = (scores - approximate).square().sum()
    tail = surrogate_error([whitened_spectrum(w_q, w_k, whitening)], [rank])
    assert float(error) == pytest.approx(tail, rel=1e-6, abs=1e-9 * float(scores.square().sum()))
    spectrum = torch.linalg.svdvals(scores)
    assert float(error) == pytest.approx(
        float(spectrum[rank:].square().sum()), rel=1e-6, abs=1e-9 * float(scores.square().sum())
    )


def test_factors_beat_plain_truncation_on_correlated_inputs() -> None:
    x, w_q, w_k = some_head(3)
    errors = []
    for whitening in (whitening_factor(x.T @ x), torch.eye(12).double()):
        q, k = factorise(w_q, w_k, whitening, 2)
        errors.append(float((x @ (w_q.T @ w_k - q.T @ k) @ x.T).square().sum()))
    assert errors[0] < 0.99 * errors[1]


def test_fewer_samples_than_dimensions() -> None:
    x, w_q, w_k = some_head(samples=3)
    q, k = factorise(w_q, w_k, whitening_factor(x.T @ x), 3)
    torch.testing.assert_close(x @ q.T @ k @ x.T, x @ w_q.T @ w_k @ x.T, rtol=1e-5, atol=1e-5)


def test_impossible_requests_are_refused() -> None:
    spectra = some_spectra(0)
    with pytest.raises(ValueError, match="try 8"):
        allocate_greedy(spectra, 7, minimum=2)
    with pytest.raises(ValueError, match="positive integer cost"):
        allocate_exact(spectra, 7, [1, 1, 0, 1])
    x, w_q, w_k = some_head()
    with pytest.raises(ValueError, match="rank=6"):
        factorise(w_q, w_k, x.T @ x, 6)

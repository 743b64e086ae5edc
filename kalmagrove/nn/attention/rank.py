"""Rank allocation for the queries and keys of ADA ("tensorized attention").

Given trained heads and a budget, it chooses the ranks that go into `config.ADA.qk_rank` and
factorises the heads to them. The criterion is layer-wise: the error of each head's scores X A X^T,
with A = W_q^T W_k, on its own inputs X. With a whitening S (S S^T = X^T X), X = Q S^T with
orthonormal columns in Q, so

    || X A X^T - X B X^T ||_F = || S^T (A - B) S ||_F,

and the best B of rank r truncates the SVD of S^T A S (Eckart and Young, 1936). Allocations are
optimal, where so stated, for the sum of these squared errors over heads: a surrogate. It sees
neither what key kernel, norm, rotation and decay do between projection and score, nor how errors
of layers combine; nothing is claimed for the loss of the model.

Legend: D model, R width of a query/key head.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor


def whitening_factor(gram_DD: Tensor) -> Tensor:
    """S with S S^T = X^T X, from the Gram matrix X^T X, which may be singular; fp64 [D, D]."""
    values, vectors = torch.linalg.eigh(gram_DD.double())
    return vectors * values.clamp(min=0).sqrt()


def whitened_spectrum(w_q_RD: Tensor, w_k_RD: Tensor, whitening_DD: Tensor) -> Tensor:
    """Singular values of S^T W_q^T W_k S, descending, fp64 [R]."""
    return _whitened_svd(w_q_RD, w_k_RD, whitening_DD)[0][1]


def factorise(
    w_q_RD: Tensor, w_k_RD: Tensor, whitening_DD: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """A head's W_q, W_k as [rank, D] with the least error of the scores on the whitened inputs.

    The singular values are shared evenly between the two. Same type as the weights. Raises
    ValueError for a rank outside 1 .. R.
    """
    if not 1 <= rank <= w_q_RD.shape[0]:
        raise ValueError(f"rank={rank} must be between 1 and the head's width {w_q_RD.shape[0]}")
    (left, values, right_t), r_q, r_k = _whitened_svd(w_q_RD, w_k_RD, whitening_DD)
    root = values[:rank].sqrt()[:, None]
    # S^T W_q^T = Q r_q, so a left singular vector Q u, unwhitened, is u^T r_q^-T W_q: S is not
    # inverted.
    q = root * (left[:, :rank].mT @ torch.linalg.pinv(r_q).mT @ w_q_RD.double())
    k = root * (right_t[:rank] @ torch.linalg.pinv(r_k).mT @ w_k_RD.double())
    return q.to(w_q_RD.dtype), k.to(w_k_RD.dtype)


def surrogate_error(spectra: Sequence[Tensor], ranks: Sequence[int]) -> float:
    """Sum over heads of the squared singular values beyond the head's rank."""
    return float(sum(s[r:].double().square().sum() for s, r in zip(spectra, ranks, strict=True)))


def allocate_greedy(
    spectra: Sequence[Tensor],
    budget: int,
    costs: Sequence[int] | None = None,
    minimum: int = 1,
    step: int = 1,
) -> list[int]:
    """Ranks of the heads with sum(rank * cost) <= budget, the best gain per cost first.

    spectra: descending singular values of each head. costs: of one rank of each head (None: 1
    each). minimum: rank every head gets. step: ranks are given out in blocks (2 with RoPE), so that
    they are minimum + a multiple of step. A head's gains do not increase with its rank, so with
    equal costs the greedy choice is exactly optimal; with unequal ones it is the usual knapsack
    heuristic, and `allocate_exact` is the optimum. Raises ValueError if the budget does not cover
    the minimum.
    """
    costs = [1] * len(spectra) if costs is None else list(costs)
    ranks, left = _start(spectra, budget, costs, minimum, step)
    queue: list[tuple[float, int]] = []

    def offer(head: int) -> None:
        if ranks[head] + step <= len(spectra[head]):
            gain = _gain(spectra[head], ranks[head], step)
            heapq.heappush(queue, (-gain / costs[head], head))

    for head in range(len(spectra)):
        offer(head)
    while queue:
        _, head = heapq.heappop(queue)
        if costs[head] * step <= left:
            ranks[head] += step
            left -= costs[head] * step
            offer(head)
    return ranks


def allocate_exact(
    spectra: Sequence[Tensor],
    budget: int,
    costs: Sequence[int],
    minimum: int = 1,
    step: int = 1,
) -> list[int]:
    """As `allocate_greedy`, optimal for any positive integer costs, by dynamic programming.

    Time is O(heads * budget * ranks); divide costs and budget by a common unit first. Raises
    ValueError if the budget does not cover the minimum.
    """
    ranks, left = _start(spectra, budget, costs, minimum, step)
    best = torch.zeros(left + 1, dtype=torch.float64)  # best[b]: largest gain at cost at most b
    choices = []
    for spectrum, cost in zip(spectra, costs, strict=True):
        blocks = range((len(spectrum) - minimum) // step + 1)
        options = torch.full((len(blocks), left + 1), -torch.inf, dtype=torch.float64)
        for block in blocks:
            price = block * step * cost
            if price <= left:
                gain = float(spectrum[minimum : minimum + block * step].double().square().sum())
                options[block, price:] = best[: left + 1 - price] + gain
        best, choice = options.max(dim=0)
        choices.append(choice)
    for head in reversed(range(len(ranks))):
        block = int(choices[head][left])
        ranks[head] += block * step
        left -= block * step * costs[head]
    return ranks


def allocate_table(
    spectra: Sequence[Sequence[Tensor]], budget: int, minimum: int = 1, step: int = 1
) -> tuple[tuple[int, ...], ...]:
    """The optimal `config.ADA.qk_rank` table: spectra [ADA layer][head], `budget` in ranks."""
    ranks = iter(
        allocate_greedy([s for layer in spectra for s in layer], budget, None, minimum, step)
    )
    return tuple(tuple(next(ranks) for _ in layer) for layer in spectra)


def _start(
    spectra: Sequence[Tensor], budget: int, costs: Sequence[int], minimum: int, step: int
) -> tuple[list[int], int]:
    if len(costs) != len(spectra) or min(costs) < 1 or step < 1 or minimum < 0:
        raise ValueError("need one positive integer cost per head, step >= 1 and minimum >= 0")
    if any(len(s) < minimum for s in spectra):
        raise ValueError(f"minimum={minimum} must be at most every head's width")
    left = budget - minimum * sum(costs)
    if left < 0:
        raise ValueError(
            f"budget={budget} must cover minimum={minimum} for every head; "
            f"try {minimum * sum(costs)}"
        )
    return [minimum] * len(spectra), left


def _gain(spectrum: Tensor, rank: int, step: int) -> float:
    return float(spectrum[rank : rank + step].double().square().sum())


def _whitened_svd(
    w_q_RD: Tensor, w_k_RD: Tensor, whitening_DD: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """SVD of S^T W_q^T W_k S by its [R, R] core, (U, values, V^T), and the triangular factors."""
    whitening = whitening_DD.double()
    r_q = torch.linalg.qr(whitening.mT @ w_q_RD.double().mT, mode="r")[1]
    r_k = torch.linalg.qr(whitening.mT @ w_k_RD.double().mT, mode="r")[1]
    left, values, right_t = torch.linalg.svd(r_q @ r_k.mT)
    return (left, values, right_t), r_q, r_k

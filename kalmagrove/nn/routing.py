"""Manifold routing M = ST(E, k): keep the k largest |E|, zero the rest (KalmaGrove paper, section
3.1).

Between the edge functions and the basis projection of `kalmagrove.nn.kan`.
Letters: N tokens, M edges, K kept.
"""

import torch
from torch import Tensor

from kalmagrove_kernels.edge.reference import largest


def select(e_NM: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k edges of largest magnitude, as `largest` orders them."""
    return largest(e_NM.abs(), k)


def hard(e_NM: Tensor, index_NK: Tensor) -> Tensor:
    """M [N, M]: E at the kept edges, 0 elsewhere; the gradient passes through the kept only."""
    return torch.zeros_like(e_NM).scatter(1, index_NK, e_NM.gather(1, index_NK))


def straight_through(e_NM: Tensor, k: int, width: float) -> tuple[Tensor, Tensor]:
    """M [N, M] and the kept indices [N, k]: forward as `hard`, backward through a soft threshold.

    Write M_i = E_i m_i with the 0/1 mask m_i. The backward pass replaces the derivative of m_i,
    zero almost everywhere, by that of s_i = sigmoid((|E_i| - theta) / width), theta halfway between
    the k-th and the (k+1)-th magnitude and held constant:

        dM_i / dE_i = m_i + |E_i| s_i (1 - s_i) / width

    It is the derivative at e = E of the surrogate e_i m_i(E) + E_i s_i(e). Edges that just missed,
    and those that just made it, so learn to cross the threshold; those far from it see `hard`. With
    k = M nothing competes and this is the identity.
    """
    if k == e_NM.shape[1]:
        return e_NM, select(e_NM, k)
    next_N1 = select(e_NM, k + 1)
    index_NK = next_N1[:, :k]
    size_NM = e_NM.detach().abs()
    theta_N1 = size_NM.gather(1, next_N1[:, k - 1 :]).mean(1, keepdim=True)
    soft_NM = e_NM.detach() * torch.sigmoid((e_NM.abs() - theta_N1) / width)
    return hard(e_NM, index_NK) + (soft_NM - soft_NM.detach()), index_NK

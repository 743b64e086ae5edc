"""The basis projection in plain PyTorch, in three forms that must agree.

`gathered` is the formula and the specification; `dense_masked` computes every edge and masks;
`sorted_by_edge` computes the kept edges only, an edge's tokens together. `grouped_linear` is the
specification of its op.
Letters: N tokens, D model width, M edges, R rank, K kept, S = N * K pairs of token and edge (of
grouped maps: rows), G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many tokens an edge, its two small products cost more than masked dense ones (CPU).
MIN_ROWS_PER_EDGE = 32


def _act(z: Tensor, inner_silu: bool) -> Tensor:
    return F.silu(z) if inner_silu else z


def gathered(
    x_ND: Tensor,
    kept_NK: Tensor,
    index_NK: Tensor,
    v_MRD: Tensor,
    u_MRD: Tensor,
    *,
    inner_silu: bool,
) -> Tensor:
    """The formula, token by token: gathers [N, K, R, D] weights, so for small shapes only."""
    z_NKR = torch.einsum("nd,nkrd->nkr", x_ND, v_MRD[index_NK])
    weighted_NKR = kept_NK.unsqueeze(-1) * _act(z_NKR, inner_silu)
    return torch.einsum("nkr,nkrd->nd", weighted_NKR, u_MRD[index_NK])


def dense_masked(
    x_ND: Tensor, m_NM: Tensor, v_MRD: Tensor, u_MRD: Tensor, *, inner_silu: bool
) -> Tensor:
    """All edges, weighted by m (zero where not kept); every element of m receives a gradient.

    Two products with an [N, M * R] intermediate and no data-dependent shape.
    """
    edges, rank, _ = v_MRD.shape
    z_NMR = F.linear(x_ND, v_MRD.flatten(0, 1)).view(-1, edges, rank)
    weighted_NMR = m_NM.unsqueeze(-1) * _act(z_NMR, inner_silu)
    return weighted_NMR.flatten(1) @ u_MRD.flatten(0, 1)


def sorted_by_edge(
    x_ND: Tensor,
    kept_NK: Tensor,
    index_NK: Tensor,
    v_MRD: Tensor,
    u_MRD: Tensor,
    *,
    inner_silu: bool,
) -> Tensor:
    """Only the kept pairs, sorted by edge: 2 * N * K * R * D multiplications, not 2 * N * M * R *
    D.

    Reads the number of tokens an edge has on the host (one synchronisation on an accelerator).
    """
    kept = index_NK.shape[1]
    edge_S = index_NK.flatten()
    order_S = edge_S.argsort(stable=True)
    rows = torch.bincount(edge_S, minlength=v_MRD.shape[0]).tolist()
    token_S = order_S // kept
    x_SD = x_ND.index_select(0, token_S)
    m_S1 = kept_NK.reshape(-1, 1).index_select(0, order_S)
    parts = [
        (m * _act(F.linear(x, v_RD), inner_silu)) @ u_RD
        for x, m, v_RD, u_RD in zip(
            x_SD.split(rows), m_S1.split(rows), v_MRD.unbind(0), u_MRD.unbind(0), strict=True
        )
    ]
    return torch.zeros_like(x_ND).index_add(0, token_S, torch.cat(parts))


def basis_projection(
    x_ND: Tensor,
    kept_NK: Tensor,
    index_NK: Tensor,
    v_MRD: Tensor,
    u_MRD: Tensor,
    *,
    inner_silu: bool,
) -> Tensor:
    """See `kalmagrove_kernels.projection.basis_projection`.

    On the CPU with enough tokens: sorted by edge. Else dense: on a GPU a hundred small products are
    bound by their launches, and the dense form never waits for the device.
    """
    edges = v_MRD.shape[0]
    sparse = index_NK.numel() >= MIN_ROWS_PER_EDGE * edges and index_NK.shape[1] < edges
    if sparse and x_ND.device.type == "cpu":
        return sorted_by_edge(x_ND, kept_NK, index_NK, v_MRD, u_MRD, inner_silu=inner_silu)
    m_NM = kept_NK.new_zeros(x_ND.shape[0], edges).scatter(1, index_NK, kept_NK)
    return dense_masked(x_ND, m_NM, v_MRD, u_MRD, inner_silu=inner_silu)


def grouped_linear(x_SD: Tensor, w_GMD: Tensor, start_G1: Tensor) -> Tensor:
    """See `kalmagrove_kernels.projection.grouped_linear`. Reads `start` on the host."""
    rows = start_G1.diff().tolist()
    parts = zip(x_SD.split(rows), w_GMD.unbind(), strict=True)
    return torch.cat([F.linear(x, w_MD) for x, w_MD in parts])

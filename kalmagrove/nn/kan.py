"""One tensorized KAN layer (KalmaGrove paper, section 3.1):

    h = W_e x;  E = phi(h);  M = ST(E, k);  y = sum_i U_i^T (M_i * act(V_i x)).

A feed-forward by itself (`ffn=kan`), and the body of a grove (`kalmagrove.nn.grove`).
Letters: B batch, T tokens, N = B * T, D model width, M edges, R rank, K kept.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.config import KAN
from kalmagrove.nn import routing
from kalmagrove.nn.common import FFNOutput, no_aux_loss, parameter
from kalmagrove.nn.edge import EdgeActivation, normal_quantiles
from kalmagrove_kernels.edge import BASES as BASE_FUNCTIONS
from kalmagrove_kernels.projection import basis_projection, dense_masked


class KANWeights(NamedTuple):
    """The matrices of one KAN layer: W_e, V and U."""

    w_MD: Tensor
    v_MRD: Tensor
    u_MRD: Tensor


class EdgeUse(NamedTuple):
    """What a forward pass did with its edges, as sums that add up over groves. Detached, fp32."""

    seen: Tensor  # pre-activations
    outside: Tensor  # of these, outside the range
    kept: Tensor  # energy: sum of squares of the kept edges
    energy: Tensor  # of all edges
    used_M: Tensor  # 1 for an edge that some token kept

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Shares: pre-activations out of range, energy of the kept edges, edges no token kept."""
        return {
            "out_of_range": self.outside / self.seen.clamp(min=1),
            "kept_share": self.kept / self.energy.clamp(min=1e-30),
            "dead_edges": 1 - self.used_M.mean(),
        }


def kan(
    x_ND: Tensor,
    weights: KANWeights,
    config: KAN,
    edge: EdgeActivation,
    grove: int | None = None,
) -> tuple[Tensor, EdgeUse]:
    """y [N, D] of one layer, with the edge functions of grove `grove` where they are stacked."""
    h_NM = F.linear(x_ND, weights.w_MD)
    e_NM = edge(h_NM, grove)
    if config.routing == "hard":
        index_NK = routing.select(e_NM, config.top_k)
        kept_NK = e_NM.gather(1, index_NK).to(x_ND.dtype)
        y_ND = basis_projection(
            x_ND,
            kept_NK,
            index_NK,
            weights.v_MRD,
            weights.u_MRD,
            inner_silu=config.inner_silu,
            backend=edge.backend,
        )
    else:  # every edge needs its gradient, so every edge is projected
        m_NM, index_NK = routing.straight_through(e_NM, config.top_k, config.routing_width)
        y_ND = dense_masked(
            x_ND,
            m_NM.to(x_ND.dtype),
            weights.v_MRD,
            weights.u_MRD,
            inner_silu=config.inner_silu,
        )
    return y_ND, _edge_use(e_NM, index_NK, edge.outside(h_NM, grove))


@torch.no_grad()
def _edge_use(e_NM: Tensor, index_NK: Tensor, outside: Tensor) -> EdgeUse:
    square_NM = e_NM.float().square()
    return EdgeUse(
        seen=square_NM.new_full((), e_NM.numel()),
        outside=outside,
        kept=square_NM.gather(1, index_NK).sum(),
        energy=square_NM.sum(),
        used_M=square_NM.new_zeros(e_NM.shape[1]).scatter(0, index_NK.flatten(), 1.0),
    )


def add_up(uses: list[EdgeUse]) -> EdgeUse:
    """The use of several layers' edges as that of one."""
    return EdgeUse(
        seen=torch.stack([use.seen for use in uses]).sum(),
        outside=torch.stack([use.outside for use in uses]).sum(),
        kept=torch.stack([use.kept for use in uses]).sum(),
        energy=torch.stack([use.energy for use in uses]).sum(),
        used_M=torch.cat([use.used_M for use in uses]),
    )


class KANLayer(nn.Module):
    """One KAN layer as a feed-forward. Parameters: edges [M, D], edge.*, v and u [M, R, D]."""

    def __init__(self, d_model: int, config: KAN, backend: str = "reference") -> None:
        super().__init__()
        self.config = config
        self.edges = parameter(config.edges, d_model, kind="matrix")
        self.edge = EdgeActivation(config.edges, config.edge, backend=backend)
        self.v = parameter(config.edges, config.rank, d_model, kind="matrix")
        self.u = parameter(config.edges, config.rank, d_model, kind="matrix")
        self.use: EdgeUse | None = None  # of the last forward pass, for the grove this belongs to
        self.metrics: dict[str, Tensor] = {}

    def init_weights(self, std: float, out_std: float) -> None:
        """See `init_kan`."""
        init_kan(self.edges, self.v, self.u, self.config, std, out_std)
        self.edge.init_weights()

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        weights = KANWeights(self.edges, self.v, self.u)
        y_ND, self.use = kan(x_BTD.flatten(0, -2), weights, self.config, self.edge)
        self.metrics = self.use.metrics
        return FFNOutput(y_ND.view_as(x_BTD), no_aux_loss(x_BTD))


@torch.no_grad()
def init_kan(edges: Tensor, v: Tensor, u: Tensor, config: KAN, std: float, out_std: float) -> None:
    """Initialise in place so that the output varies as much as a dense SwiGLU's.

    W_e ~ N(0, 1/D): an input of unit rms (it comes from a norm) gives h ~ N(0, 1), what the edges'
    range and the basis are made for. V ~ N(0, std^2). The variance of an output of the dense layer
    of equal active parameters, hidden H = (M + 2 k R) / 3, is H out_std^2 E[silu(g)^2] E[g^2] with
    g ~ N(0, std^2 D); here it is k R var(U) E[E_i^2 | kept] E[act(g)^2]. U's variance makes them
    equal, with the expectation over the kept k of M edges taken at the base function.
    """
    d_model = edges.shape[-1]
    active = (config.edges + 2 * config.top_k * config.rank) / 3
    g = normal_quantiles() * std * math.sqrt(d_model)
    silu_g = F.silu(g).square().mean()
    inner = silu_g if config.inner_silu else g.square().mean()
    dense = active * silu_g * g.square().mean()
    kan_unit = config.top_k * config.rank * _kept_energy(config) * inner
    edges.normal_(std=d_model**-0.5)
    v.normal_(std=std)
    u.normal_(std=out_std * math.sqrt(dense / kan_unit))


def _kept_energy(config: KAN) -> float:
    """E[E_i^2 | kept]: mean square of the largest share k/M of |base(h)|, h ~ N(0, 1)."""
    base = BASE_FUNCTIONS["silu" if config.edge.base == "none" else config.edge.base]
    square = base(normal_quantiles()).square().sort(descending=True).values
    return float(square[: max(1, round(len(square) * config.top_k / config.edges))].mean())

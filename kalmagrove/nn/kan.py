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
from kalmagrove.nn.common import FFNOutput, no_aux_loss
from kalmagrove.nn.edge import EdgeActivation, normal_quantiles
from kalmagrove.nn.tally import Tally
from kalmagrove.parallel import Groups, TensorParallel, all_gather, normal_, parameter
from kalmagrove_kernels.edge import BASES as BASE_FUNCTIONS
from kalmagrove_kernels.edge import Kept
from kalmagrove_kernels.projection import basis_projection, dense_masked, linear_beside


class KANWeights(NamedTuple):
    """The matrices of one KAN layer: W_e, V and U."""

    w_MD: Tensor
    v_MRD: Tensor
    u_MRD: Tensor


class EdgeUse(NamedTuple):
    """What a forward pass did with its edges. Detached."""

    seen: int  # pre-activations
    outside: Tensor  # of these, outside the range: fp32 scalar
    energy: Tensor  # sum of squares of all edges: fp32 scalar
    value_NK: Tensor  # of the kept edges
    index_NK: Tensor  # the kept edges
    channels: int  # M, of all groves that the indices number

    @property
    def tally(self) -> Tally:
        """Sums, fp32, that add up over groves; worked out when asked for.

        kept: sum of squares of the kept edges. used_M: 1 for an edge that some token kept.
        """
        unused_M = torch.zeros(self.channels, device=self.index_NK.device)
        return {
            "seen": self.outside.new_full((), self.seen),
            "outside": self.outside,
            "kept": self.value_NK.square().sum().float(),
            "energy": self.energy,
            "used_M": unused_M.scatter_(0, self.index_NK.flatten(), 1.0),
        }


def edge_shares(use: Tally) -> dict[str, Tensor]:
    """Of an `EdgeUse`, or of those of several layers in a leading dimension: the shares of
    pre-activations out of range, of energy in the kept edges, and of edges that no token kept.
    """
    return {
        "out_of_range": use["outside"] / use["seen"].clamp(min=1),
        "kept_share": use["kept"] / use["energy"].clamp(min=1e-30),
        "dead_edges": 1 - use["used_M"].mean(-1),
    }


class Routed(NamedTuple):
    """What manifold routing hands to the projection, in the dtype of x."""

    value_NX: Tensor  # hard: the kept values [N, K]; straight-through: M [N, M]
    index_NK: Tensor  # the kept edges


def kan(
    x_ND: Tensor,
    weights: KANWeights,
    config: KAN,
    edge: EdgeActivation,
    grove: int | None = None,
) -> tuple[Tensor, EdgeUse]:
    """y [N, D] of one layer, with the edge functions of grove `grove` where they are stacked."""
    h_NM, x_ND = linear_beside(x_ND, weights.w_MD)
    routed, use = route(h_NM, config, edge, grove)
    return project(x_ND, routed, weights.v_MRD, weights.u_MRD, config, edge.backend), use


def route(
    h_NM: Tensor, config: KAN, edge: EdgeActivation, grove: int | None = None
) -> tuple[Routed, EdgeUse]:
    """E = phi(h);  M = ST(E, k)."""
    if config.routing == "hard":
        return routed_by(edge.topk(h_NM, config.top_k, grove), h_NM, h_NM.shape[1])
    e_NM = edge(h_NM, grove)
    value_NM, index_NK = routing.straight_through(e_NM, config.top_k, config.routing_width)
    with torch.no_grad():
        wide_NM = e_NM.float()
        use = EdgeUse(
            seen=e_NM.numel(),
            outside=edge.outside(h_NM, grove),
            energy=wide_NM.square().sum(),
            value_NK=wide_NM.gather(1, index_NK),
            index_NK=index_NK,
            channels=h_NM.shape[1],
        )
    return Routed(value_NM.to(h_NM.dtype), index_NK), use


def routed_by(kept: Kept, h_NM: Tensor, channels: int) -> tuple[Routed, EdgeUse]:
    """What hard routing kept, of as many channels as there are edges in all groves of `kept`."""
    use = EdgeUse(
        seen=h_NM.numel(),
        outside=kept.outside,
        energy=kept.energy,
        value_NK=kept.value_NK.detach(),
        index_NK=kept.index_NK,
        channels=channels,
    )
    return Routed(kept.value_NK.to(h_NM.dtype), kept.index_NK), use


def project(
    x_ND: Tensor, routed: Routed, v_MRD: Tensor, u_MRD: Tensor, config: KAN, backend: str
) -> Tensor:
    """y = sum_i U_i^T (M_i * act(V_i x)); a partial sum where v and u hold a slice of the ranks."""
    if config.routing == "hard":
        return basis_projection(
            x_ND,
            routed.value_NX,
            routed.index_NK,
            v_MRD,
            u_MRD,
            inner_silu=config.inner_silu,
            backend=backend,
        )
    # Every edge needs its gradient, so every edge is projected.
    return dense_masked(x_ND, routed.value_NX, v_MRD, u_MRD, inner_silu=config.inner_silu)


def add_up(uses: list[EdgeUse]) -> Tally:
    """The tally of several layers' edges as that of one."""
    tallies = [use.tally for use in uses]
    found = {"used_M": torch.cat([tally["used_M"] for tally in tallies])}
    names = ("seen", "outside", "kept", "energy")
    sums = torch.stack([tally[name] for name in names for tally in tallies])
    return found | dict(zip(names, sums.view(len(names), len(uses)).sum(1), strict=True))


class KANLayer(nn.Module):
    """One KAN layer as a feed-forward. Parameters: edges [M, D], edge.*, v and u [M, R, D].

    Under tensor parallelism each rank holds R / tp of the rank dimension of v and u. Edges are
    whole and routed on the stream, so that all ranks keep the same ones.
    """

    def __init__(
        self, d_model: int, config: KAN, groups: Groups, backend: str = "reference"
    ) -> None:
        super().__init__()
        self.config = config
        self.tp = TensorParallel.of(groups)
        shape = config.edges, config.rank, d_model
        self.edges = parameter(config.edges, d_model, kind="matrix")
        self.edge = EdgeActivation(
            config.edges, config.edge, backend=backend, through=self.tp.stream
        )
        self.v = parameter(*shape, kind="matrix", shard=self.tp.piece(config.rank, dim=1))
        self.u = parameter(*shape, kind="matrix", shard=self.tp.piece(config.rank, dim=1))
        self.use: EdgeUse | None = None  # of the last forward pass

    shares = staticmethod(edge_shares)

    @property
    def tally(self) -> Tally:
        """The `EdgeUse` of the last forward pass, if there was one."""
        return {} if self.use is None else self.use.tally

    @property
    def metrics(self) -> dict[str, Tensor]:
        """See `edge_shares`; worked out when asked for."""
        return {} if self.use is None else edge_shares(self.tally)

    def init_weights(self, std: float, out_std: float) -> None:
        """See `init_kan`."""
        init_kan(self.edges, self.v, self.u, self.config, std, out_std)
        self.edge.init_weights()

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        h_NM, beside_ND = linear_beside(x_BTD.flatten(0, -2), self.tp.stream(self.edges))
        routed, self.use = route(h_NM, self.config, self.edge)
        inner_BTD = self.tp.enter(beside_ND.view_as(x_BTD))
        y_ND = project(
            inner_BTD.flatten(0, -2),
            self._enter(routed, x_BTD.shape[:-1]),
            self.v,
            self.u,
            self.config,
            self.edge.backend,
        )
        y_BTD = self.tp.leave(y_ND.view_as(inner_BTD))
        return FFNOutput(y_BTD, no_aux_loss(x_BTD))

    def _enter(self, routed: Routed, tokens: torch.Size) -> Routed:
        """The routing of all tokens of the inner part. `tokens`: B, T of the stream."""
        value_BTX = self.tp.enter(routed.value_NX.unflatten(0, tokens))
        index_BTK = routed.index_NK.unflatten(0, tokens)
        if self.tp.sequence:
            index_BTK = all_gather(index_BTK, self.tp.group, 1)
        return Routed(value_BTX.flatten(0, -2), index_BTK.flatten(0, -2))


@torch.no_grad()
def init_kan(edges: Tensor, v: Tensor, u: Tensor, config: KAN, std: float, out_std: float) -> None:
    """Initialise in place so that the output varies as much as a dense SwiGLU's.

    W_e ~ N(0, 1/D): an input of unit rms (it comes from a norm) gives h ~ N(0, 1), what the edges'
    range and the basis are made for. V ~ N(0, std^2). The variance of an output of the dense layer
    of equal active parameters, hidden H = (M + 2 k R) / 3, is H out_std^2 E[silu(g)^2] E[g^2] with
    g ~ N(0, std^2 D); here it is k R var(U) E[E_i^2 | kept] E[act(g)^2]. U's variance makes them
    equal, with the expectation over the kept k of M edges taken at the base function. k, M and R
    are those of the whole layer, whatever piece of it the tensors are.
    """
    d_model = edges.shape[-1]
    active = (config.edges + 2 * config.top_k * config.rank) / 3
    g = normal_quantiles() * std * math.sqrt(d_model)
    silu_g = F.silu(g).square().mean()
    inner = silu_g if config.inner_silu else g.square().mean()
    dense = active * silu_g * g.square().mean()
    kan_unit = config.top_k * config.rank * _kept_energy(config) * inner
    normal_(edges, d_model**-0.5)
    normal_(v, std)
    normal_(u, out_std * math.sqrt(dense / kan_unit))


def _kept_energy(config: KAN) -> float:
    """E[E_i^2 | kept]: mean square of the largest share k/M of |base(h)|, h ~ N(0, 1)."""
    base = BASE_FUNCTIONS["silu" if config.edge.base == "none" else config.edge.base]
    square = base(normal_quantiles()).square().sort(descending=True).values
    return float(square[: max(1, round(len(square) * config.top_k / config.edges))].mean())

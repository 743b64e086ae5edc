"""Groves: several KAN layers, a few chosen for each token (KalmaGrove paper, section 2.3).

A feed-forward (`ffn=grove`): route and dispatch, run the local groves, combine.
Letters: B batch, T tokens, N = B * T, D model width, G groves, K chosen a token, M edges, R rank,
E rows of an edge manifold, S = N * K pairs of token and grove.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.config import Grove
from kalmagrove.nn.common import FFNOutput, no_aux_loss, parameter, wide
from kalmagrove.nn.dispatch import Balanced, combine, dispatch, router_z_loss
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.nn.kan import EdgeUse, KANLayer, KANWeights, add_up, init_kan, kan


class GroveLayer(Balanced):
    """y = shared(x) + sum over the chosen groves of gate_i(x) * kan_i(x).

        score_i = ||E_i x||_2        gate_i = sigmoid(W_g x + b_g)_i * score_i

    The K groves of largest score + bias are chosen (`Balanced`); scores and gates are fp32. All
    groves are stacked: edges [G, M, D], edge.* [G, M, ...], v and u [G, M, R, D].
    """

    def __init__(self, d_model: int, config: Grove, backend: str = "reference") -> None:
        super().__init__(config.groves, config.bias_rate)
        self.config = config
        groves, body = config.groves, config.kan
        self.manifold = parameter(groves, config.edge_manifold, d_model, kind="matrix")
        self.gate = parameter(groves, d_model, kind="matrix")
        self.gate_bias = parameter(groves, kind="bias")
        self.edges = parameter(groves, body.edges, d_model, kind="matrix")
        self.edge = EdgeActivation(body.edges, body.edge, groves, backend)
        self.v = parameter(groves, body.edges, body.rank, d_model, kind="matrix")
        self.u = parameter(groves, body.edges, body.rank, d_model, kind="matrix")
        self.shared = KANLayer(d_model, body, backend) if config.shared else None

    @torch.no_grad()
    def init_weights(self, std: float, out_std: float) -> None:
        """Every grove as `init_kan`, made so that their sum varies as much as one layer.

        E_i ~ N(0, 4 / (d_E D)): an input of unit rms has ||E_i x|| near 2; with W_g = N(0, std^2)
        and b_g = 0 the sigmoid is near 1/2, so gates start near 1. The K chosen groves and the
        shared one add up independently: out_std is divided by the root of their number.
        """
        config = self.config
        out_std /= (config.top_g + int(config.shared)) ** 0.5
        self.manifold.normal_(std=2 * (config.edge_manifold * self.gate.shape[1]) ** -0.5)
        self.gate.normal_(std=std)
        self.gate_bias.zero_()
        init_kan(self.edges, self.v, self.u, config.kan, std, out_std)
        self.edge.init_weights()
        if self.shared is not None:
            self.shared.init_weights(std, out_std)

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        x_ND = x_BTD.flatten(0, -2)
        index_NK, gate_NK, aux_loss = self.route(x_ND)
        x_SD, plan = dispatch(x_ND, index_NK, self.config.groves)
        y_SD, uses = self.run_groves(x_SD, plan.rows)
        y_ND = combine(y_SD, gate_NK, plan)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND).y_BTD
            assert self.shared.use is not None
            uses = [*uses, self.shared.use]
        self.metrics |= add_up(uses).metrics
        return FFNOutput(y_ND.view_as(x_BTD), aux_loss)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen groves [N, K], their gates [N, K] in fp32, and the z-loss (scalar)."""
        x_ND = wide(x_ND)
        width = self.config.edge_manifold
        seen_NGE = F.linear(x_ND, self.manifold.flatten(0, 1).to(x_ND.dtype))
        score_NG = torch.linalg.vector_norm(seen_NGE.unflatten(1, (-1, width)), dim=-1)
        logit_NG = F.linear(x_ND, self.gate.to(x_ND.dtype), self.gate_bias.to(x_ND.dtype))
        index_NK, self.metrics = self.choose(score_NG.detach(), self.config.top_g)
        gate_NK = torch.sigmoid(logit_NG.gather(1, index_NK)) * score_NG.gather(1, index_NK)
        with torch.no_grad():
            self.metrics["gate_mean"] = gate_NK.mean().float()
            self.metrics["gate_std"] = gate_NK.std(correction=0).float()
        if not self.config.z_loss:
            return index_NK, gate_NK, no_aux_loss(x_ND)
        return index_NK, gate_NK, router_z_loss(logit_NG, self.config.z_loss)

    def run_groves(self, x_SD: Tensor, rows: list[int]) -> tuple[Tensor, list[EdgeUse]]:
        """Every grove on its own tokens; x is sorted by grove and `rows` says how many each has.

        A grove without tokens runs on none: its gradients are zero, not missing.
        """
        parts = zip(
            x_SD.split(rows),
            self.edges.unbind(),
            self.v.unbind(),
            self.u.unbind(),
            strict=True,
        )
        outputs = [
            kan(x, KANWeights(w, v, u), self.config.kan, self.edge, grove=i)
            for i, (x, w, v, u) in enumerate(parts)
        ]
        return torch.cat([y for y, _ in outputs]), [use for _, use in outputs]

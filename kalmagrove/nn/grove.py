"""Groves: several KAN layers, a few chosen for each token (KalmaGrove paper, section 2.3).

A feed-forward (`ffn=grove`): route, bring the tokens to their groves, run the groves of this rank,
bring the results back.
Letters: B batch, T tokens, N tokens that this rank routes, D model width, G groves, K chosen a
token, M edges, R rank, E rows of an edge manifold, S pairs of token and grove computed here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.config import Grove
from kalmagrove.nn.common import Aside, FFNOutput, no_aux_loss, wide
from kalmagrove.nn.dispatch import Balanced
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.nn.kan import (
    EdgeUse,
    KANLayer,
    KANWeights,
    add_up,
    edge_shares,
    init_kan,
    kan,
    project,
    routed_by,
)
from kalmagrove.nn.tally import Tally
from kalmagrove.parallel import (
    Groups,
    Plan,
    Rows,
    communicate,
    normal_,
    parameter,
    postprocess,
    preprocess,
)
from kalmagrove_kernels.projection import grouped_linear


class GroveLayer(Balanced):
    """y = shared(x) + sum over the chosen groves of gate_i(x) * kan_i(x).

        score_i = ||E_i x||_2        gate_i = sigmoid(W_g x + b_g)_i * score_i

    The K groves of largest score + bias are chosen (`Balanced`); scores and gates are fp32. All
    groves are stacked: edges [G, M, D], edge.* [G, M, ...], v and u [G, M, R, D], of which an
    expert-parallel rank holds G / ep groves. The router (manifold, gate, gate_bias) is whole.
    """

    def __init__(
        self, d_model: int, config: Grove, groups: Groups, backend: str = "reference"
    ) -> None:
        super().__init__(config.groves, config.bias_rate, groups)
        self.config = config
        groves, body, own = config.groves, config.kan, self.shard
        projection = groves, body.edges, body.rank, d_model
        self.manifold = parameter(groves, config.edge_manifold, d_model, kind="matrix")
        self.gate = parameter(groves, d_model, kind="matrix")
        self.gate_bias = parameter(groves, kind="bias")
        self.edges = parameter(groves, body.edges, d_model, kind="matrix", shard=own)
        self.edge = EdgeActivation(body.edges, body.edge, own, backend)
        self.v = parameter(*projection, kind="matrix", shard=own)
        self.u = parameter(*projection, kind="matrix", shard=own)
        self.shared = KANLayer(d_model, body, groups, backend) if config.shared else None
        self.gate_NK: Tensor | None = None  # of the last forward pass, as what follows
        self.uses: list[EdgeUse] = []

    @property
    def tally(self) -> Tally:
        """As `Balanced.tally`, with mean and deviation of the gates and the `EdgeUse` of all."""
        found = super().tally
        if self.gate_NK is not None:
            found["gate_std"], found["gate_mean"] = torch.std_mean(self.gate_NK, correction=0)
        return found | (add_up(self.uses) if self.uses else {})

    @staticmethod
    def shares(tally: Tally) -> dict[str, Tensor]:
        """As `Balanced.shares` and `edge_shares`, with `gate_mean` and `gate_std`."""
        found = Balanced.shares(tally)
        found |= {name: tally[name].float() for name in ("gate_mean", "gate_std") if name in tally}
        return found | (edge_shares(tally) if "seen" in tally else {})

    @torch.no_grad()
    def init_weights(self, std: float, out_std: float) -> None:
        """Every grove as `init_kan`, made so that their sum varies as much as one layer.

        E_i ~ N(0, 4 / (d_E D)): an input of unit rms has ||E_i x|| near 2; with W_g = N(0, std^2)
        and b_g = 0 the sigmoid is near 1/2, so gates start near 1. The K chosen groves and the
        shared one add up independently: out_std is divided by the root of their number.
        """
        config = self.config
        out_std /= (config.top_g + int(config.shared)) ** 0.5
        normal_(self.manifold, 2 * (config.edge_manifold * self.gate.shape[1]) ** -0.5)
        normal_(self.gate, std)
        self.gate_bias.zero_()
        init_kan(self.edges, self.v, self.u, config.kan, std, out_std)
        self.edge.init_weights()
        if self.shared is not None:
            self.shared.init_weights(std, out_std)

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        shared = None if self.shared is None else Aside(self.shared, x_BTD, wanted=self.overlaps)
        own_BTD = self.tp.tokens(x_BTD)
        x_ND = own_BTD.flatten(0, -2)
        index_NK, gate_NK, aux_loss = self.route(x_ND)
        dropless = self.config.capacity is None
        plan = preprocess(index_NK, self.config.groves, self.ep, self.traffic, dropless=dropless)
        rows = communicate(x_ND, gate_NK, plan)
        y_SD, self.uses = self.run_groves(rows, plan)
        y_BTD = self.tp.stream_of(postprocess(y_SD, rows, plan).view_as(own_BTD))
        if self.shared is not None and shared is not None:
            y_BTD = y_BTD + shared.join()
            assert self.shared.use is not None
            self.uses.append(self.shared.use)
        return FFNOutput(y_BTD, aux_loss)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen groves [N, K], their gates [N, K] in fp32, and the z-loss (scalar).

        With a capacity, a choice beyond it has the index G.
        """
        x_ND, shared = wide(x_ND), self.tp.shared
        manifold_GED, gate_GD, bias_G = (
            shared(weight).to(x_ND.dtype) for weight in (self.manifold, self.gate, self.gate_bias)
        )
        seen_NGE = F.linear(x_ND, manifold_GED.flatten(0, 1)).unflatten(1, manifold_GED.shape[:2])
        score_NG = torch.linalg.vector_norm(seen_NGE, dim=-1)
        logit_NG = F.linear(x_ND, gate_GD, bias_G)
        index_NK = self.choose(score_NG.detach(), self.config.top_g)
        gate_NK = (torch.sigmoid(logit_NG) * score_NG).gather(1, index_NK)
        self.gate_NK = gate_NK.detach()
        index_NK = self.limit(index_NK, gate_NK, self.config.capacity)
        if not self.config.z_loss:
            return index_NK, gate_NK, no_aux_loss(x_ND)
        return index_NK, gate_NK, self.z_loss(logit_NG, self.config.z_loss)

    def run_groves(self, rows: Rows, plan: Plan) -> tuple[Tensor, list[EdgeUse]]:
        """Every grove of this rank on its own tokens: y of the rows.

        A grove without tokens runs on none: its gradients are zero, not missing.
        """
        if self.edge.backend != "reference" and self.config.kan.routing == "hard":
            return self._run_stacked(rows)
        parts = zip(
            rows.x_SD.split(plan.read_rows()),
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

    def _run_stacked(self, rows: Rows) -> tuple[Tensor, list[EdgeUse]]:
        """All groves at once, as one layer of G * M edges of which each row sees its grove's.

        Where each grove's rows begin stays on the device: the host waits for nothing.
        """
        x_SD, grove_S = rows.x_SD, rows.pairs.place_S
        groves, edges, _ = self.edges.shape
        number_G1 = torch.arange(groves + 1, dtype=grove_S.dtype, device=x_SD.device)
        start_G1 = torch.searchsorted(grove_S, number_G1, out_int32=True)
        h_SM = grouped_linear(x_SD, self.edges, start_G1, backend=self.edge.backend)
        kept = self.edge.topk(h_SM, self.config.kan.top_k, group_N=grove_S.to(torch.int32))
        routed, use = routed_by(kept, h_SM, groves * edges)
        v_CRD, u_CRD = self.v.flatten(0, 1), self.u.flatten(0, 1)
        return project(x_SD, routed, v_CRD, u_CRD, self.config.kan, self.edge.backend), [use]

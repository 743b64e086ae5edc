"""The feed-forwards KAN is compared with: dense SwiGLU and a DeepSeek-V3 style mixture of experts.

Built by `kalmagrove.nn.ffn` in the place of a KAN layer, everything else being equal.
Letters: B batch, T tokens, N tokens that this rank routes, D model width, H hidden, E experts, K
chosen a token, S pairs of token and expert computed here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.config import MoE
from kalmagrove.nn.common import Aside, FFNOutput, no_aux_loss, wide
from kalmagrove.nn.dispatch import Balanced
from kalmagrove.parallel import (
    Groups,
    TensorParallel,
    communicate,
    normal_,
    parameter,
    postprocess,
    preprocess,
)


def swiglu(x_ND: Tensor, gate_HD: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""
    return F.linear(F.silu(F.linear(x_ND, gate_HD)) * F.linear(x_ND, up_HD), down_DH)


class DenseFFN(nn.Module):
    """SwiGLU. Parameters: gate and up [H, D], down [D, H], of each of which a tensor-parallel rank
    holds H / tp."""

    def __init__(self, d_model: int, hidden: int, groups: Groups) -> None:
        super().__init__()
        self.tp = TensorParallel.of(groups)
        self.gate = parameter(hidden, d_model, kind="matrix", shard=self.tp.piece(hidden))
        self.up = parameter(hidden, d_model, kind="matrix", shard=self.tp.piece(hidden))
        self.down = parameter(d_model, hidden, kind="matrix", shard=self.tp.piece(hidden, dim=1))
        self.metrics: dict[str, Tensor] = {}

    def init_weights(self, std: float, out_std: float) -> None:
        """gate, up ~ N(0, std^2), down ~ N(0, out_std^2)."""
        normal_(self.gate, std)
        normal_(self.up, std)
        normal_(self.down, out_std)

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        y_BTD = swiglu(self.tp.enter(x_BTD), self.gate, self.up, self.down)
        return FFNOutput(self.tp.leave(y_BTD), no_aux_loss(x_BTD))


class MoEFFN(Balanced):
    """Experts as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    Affinities are sigmoids; the K of largest affinity + bias are chosen (`Balanced`); their gates
    are the affinities without bias, normalised to sum to `scale`. An optional shared expert sees
    every token. Experts are stacked: gate and up [E, H, D], down [E, D, H], of which an
    expert-parallel rank holds E / ep; router [E, D] is whole.
    """

    def __init__(self, d_model: int, config: MoE, groups: Groups) -> None:
        super().__init__(config.experts, config.bias_rate, groups)
        self.config = config
        experts, hidden, own = config.experts, config.hidden, self.shard
        self.router = parameter(experts, d_model, kind="matrix")
        self.gate = parameter(experts, hidden, d_model, kind="matrix", shard=own)
        self.up = parameter(experts, hidden, d_model, kind="matrix", shard=own)
        self.down = parameter(experts, d_model, hidden, kind="matrix", shard=own)
        self.shared = (
            DenseFFN(d_model, config.shared_hidden, groups) if config.shared_hidden else None
        )

    def init_weights(self, std: float, out_std: float) -> None:
        """Router and first projections ~ N(0, std^2), down ~ N(0, out_std^2)."""
        for weight in (self.router, self.gate, self.up):
            normal_(weight, std)
        normal_(self.down, out_std)
        if self.shared is not None:
            self.shared.init_weights(std, out_std)

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        shared = None if self.shared is None else Aside(self.shared, x_BTD, wanted=self.overlaps)
        own_BTD = self.tp.tokens(x_BTD)
        x_ND = own_BTD.flatten(0, -2)
        index_NK, gate_NK, aux_loss = self.route(x_ND)
        dropless = self.config.capacity is None
        plan = preprocess(index_NK, self.config.experts, self.ep, self.traffic, dropless=dropless)
        rows = communicate(x_ND, gate_NK, plan)
        y_SD = self.run_experts(rows.x_SD, plan.read_rows())
        y_BTD = self.tp.stream_of(postprocess(y_SD, rows, plan).view_as(own_BTD))
        if shared is not None:
            y_BTD = y_BTD + shared.join()
        return FFNOutput(y_BTD, aux_loss)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen experts [N, K], their gates [N, K] in fp32, and the z-loss (scalar).

        With a capacity, a choice beyond it has the index E.
        """
        x_ND = wide(x_ND)
        logit_NE = F.linear(x_ND, self.tp.shared(self.router).to(x_ND.dtype))
        affinity_NE = torch.sigmoid(logit_NE)
        index_NK = self.choose(affinity_NE.detach(), self.config.top_k)
        chosen_NK = affinity_NE.gather(1, index_NK)
        gate_NK = self.config.scale * chosen_NK / (chosen_NK.sum(1, keepdim=True) + 1e-20)
        index_NK = self.limit(index_NK, gate_NK, self.config.capacity)
        if not self.config.z_loss:
            return index_NK, gate_NK, no_aux_loss(x_ND)
        return index_NK, gate_NK, self.z_loss(logit_NE, self.config.z_loss)

    def run_experts(self, x_SD: Tensor, rows: list[int]) -> Tensor:
        """Every expert of this rank on its own tokens; x is sorted by expert, of which each has
        `rows`. An expert without tokens runs on none: its gradients are zero, not missing.
        """
        weights = (self.gate.unbind(), self.up.unbind(), self.down.unbind())
        return torch.cat(
            [swiglu(x, *expert) for x, *expert in zip(x_SD.split(rows), *weights, strict=True)]
        )

"""The feed-forwards KAN is compared with: dense SwiGLU and a DeepSeek-V3 style mixture of experts.

Built by `kalmagrove.nn.ffn` in the place of a KAN layer, everything else being equal.
Letters: B batch, T tokens, N = B * T, D model width, H hidden, E experts, K chosen a token, S = N *
K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.config import MoE
from kalmagrove.nn.common import FFNOutput, no_aux_loss, parameter, wide
from kalmagrove.nn.dispatch import Balanced, combine, dispatch, router_z_loss


def swiglu(x_ND: Tensor, gate_HD: Tensor, up_HD: Tensor, down_DH: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""
    return F.linear(F.silu(F.linear(x_ND, gate_HD)) * F.linear(x_ND, up_HD), down_DH)


class DenseFFN(nn.Module):
    """SwiGLU. Parameters: gate and up [H, D], down [D, H]."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate = parameter(hidden, d_model, kind="matrix")
        self.up = parameter(hidden, d_model, kind="matrix")
        self.down = parameter(d_model, hidden, kind="matrix")
        self.metrics: dict[str, Tensor] = {}

    @torch.no_grad()
    def init_weights(self, std: float, out_std: float) -> None:
        """gate, up ~ N(0, std^2), down ~ N(0, out_std^2)."""
        self.gate.normal_(std=std)
        self.up.normal_(std=std)
        self.down.normal_(std=out_std)

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        return FFNOutput(swiglu(x_BTD, self.gate, self.up, self.down), no_aux_loss(x_BTD))


class MoEFFN(Balanced):
    """Experts as in DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    Affinities are sigmoids; the K of largest affinity + bias are chosen (`Balanced`); their gates
    are the affinities without bias, normalised to sum to `scale`. An optional shared expert sees
    every token. Experts are stacked: gate and up [E, H, D], down [E, D, H]; router [E, D].
    """

    def __init__(self, d_model: int, config: MoE) -> None:
        super().__init__(config.experts, config.bias_rate)
        self.config = config
        self.router = parameter(config.experts, d_model, kind="matrix")
        self.gate = parameter(config.experts, config.hidden, d_model, kind="matrix")
        self.up = parameter(config.experts, config.hidden, d_model, kind="matrix")
        self.down = parameter(config.experts, d_model, config.hidden, kind="matrix")
        self.shared = DenseFFN(d_model, config.shared_hidden) if config.shared_hidden else None

    @torch.no_grad()
    def init_weights(self, std: float, out_std: float) -> None:
        """Router and first projections ~ N(0, std^2), down ~ N(0, out_std^2)."""
        for weight in (self.router, self.gate, self.up):
            weight.normal_(std=std)
        self.down.normal_(std=out_std)
        if self.shared is not None:
            self.shared.init_weights(std, out_std)

    def forward(self, x_BTD: Tensor) -> FFNOutput:
        x_ND = x_BTD.flatten(0, -2)
        index_NK, gate_NK, aux_loss = self.route(x_ND)
        x_SD, plan = dispatch(x_ND, index_NK, self.config.experts)
        y_ND = combine(self.run_experts(x_SD, plan.rows), gate_NK, plan)
        y_BTD = y_ND.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD).y_BTD
        return FFNOutput(y_BTD, aux_loss)

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chosen experts [N, K], their gates [N, K] in fp32, and the z-loss (scalar)."""
        x_ND = wide(x_ND)
        logit_NE = F.linear(x_ND, self.router.to(x_ND.dtype))
        affinity_NE = torch.sigmoid(logit_NE)
        index_NK, self.metrics = self.choose(affinity_NE.detach(), self.config.top_k)
        chosen_NK = affinity_NE.gather(1, index_NK)
        gate_NK = self.config.scale * chosen_NK / (chosen_NK.sum(1, keepdim=True) + 1e-20)
        if not self.config.z_loss:
            return index_NK, gate_NK, no_aux_loss(x_ND)
        return index_NK, gate_NK, router_z_loss(logit_NE, self.config.z_loss)

    def run_experts(self, x_SD: Tensor, rows: list[int]) -> Tensor:
        """Every expert on its own tokens; x is sorted by expert, of which each has `rows`."""
        weights = (self.gate.unbind(), self.up.unbind(), self.down.unbind())
        return torch.cat(
            [swiglu(x, *expert) for x, *expert in zip(x_SD.split(rows), *weights, strict=True)]
        )

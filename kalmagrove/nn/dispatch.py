"""Token dispatch for layers of which each token uses a few parts: groves and experts.

Three steps a layer spells out: choose parts (`Balanced.choose`), `dispatch` tokens sorted by part,
and `combine` the parts' outputs. The first and last are where expert parallelism exchanges tokens.
Letters: N tokens, D model width, G parts (groves or experts), K chosen a token, S = N * K.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kalmagrove.nn.precision import Fp32Buffers
from kalmagrove.nn.routing import largest
from kalmagrove.parallel import Groups, all_reduce_sum


class Plan(NamedTuple):
    """How the S pairs (token, part) are laid out, sorted by part and then by token."""

    inverse_S: Tensor  # pair (token * K + choice) -> its place
    rows: list[int]  # pairs of each part


def dispatch(x_ND: Tensor, index_NK: Tensor, parts: int) -> tuple[Tensor, Plan]:
    """Copies of the tokens [S, D], sorted by part; parts without tokens have 0 rows.

    Reads the parts' row counts on the host: one synchronisation on an accelerator.
    """
    tokens, chosen = index_NK.shape
    part_S = index_NK.flatten()
    order_S = part_S.argsort(stable=True)
    rows = torch.bincount(part_S, minlength=parts).tolist()
    pairs_SD = x_ND.unsqueeze(1).expand(-1, chosen, -1).reshape(tokens * chosen, -1)
    return pairs_SD.index_select(0, order_S), Plan(order_S.argsort(), rows)


def combine(y_SD: Tensor, gate_NK: Tensor, plan: Plan) -> Tensor:
    """Each token's outputs, weighted by its gates and summed [N, D], in the dtype of y."""
    tokens, chosen = gate_NK.shape
    y_NKD = y_SD.index_select(0, plan.inverse_S).view(tokens, chosen, y_SD.shape[1])
    return torch.einsum("nkd,nk->nd", y_NKD, gate_NK.to(y_SD.dtype))


class Balanced(Fp32Buffers):
    """A router whose load is balanced by a selection bias, not a loss (arXiv:2408.15664).

    Buffers, fp32 and persistent: `bias` [G], added to the scores for the choice only; `load` [G],
    the choices counted in training mode since the last `balance`. (Activation checkpointing runs a
    forward pass twice and counts twice; the sign rule does not see a common factor.)
    """

    bias: Tensor
    load: Tensor

    def __init__(self, parts: int, bias_rate: float) -> None:
        super().__init__()
        self.bias_rate = bias_rate
        self.register_buffer("bias", torch.zeros(parts))
        self.register_buffer("load", torch.zeros(parts))
        self.metrics: dict[str, Tensor] = {}

    @torch.no_grad()
    def choose(self, score_NG: Tensor, chosen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Indices [N, K] of the largest score + bias, and how even the choice was.

        Equal sums go to the lower index. Metrics: `load` [G], the share of the choices; `load_max`,
        the largest share over the mean; `load_cv`, standard deviation over the mean.
        """
        biased_NG = score_NG.float() + self.bias
        # The order is what counts: shifted, every entry is a non-negative number for `largest`.
        biased_NG = biased_NG - biased_NG.amin(1, keepdim=True)
        index_NK = largest(biased_NG, chosen)
        count_G = torch.bincount(index_NK.flatten(), minlength=len(self.bias)).float()
        if self.training:
            self.load += count_G
        load_G = count_G / count_G.sum().clamp(min=1)
        mean = 1 / len(load_G)
        spread = load_G.std(correction=0) / mean
        return index_NK, {"load": load_G, "load_max": load_G.amax() / mean, "load_cv": spread}

    @torch.no_grad()
    def balance(self, groups: Groups) -> None:
        """Raise the bias of parts below the mean load by `bias_rate`, lower the others; zero the
        load.

        The sign rule of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), on the load of all
        data-parallel ranks: call it on all of them, once an optimizer step.
        """
        load_G = all_reduce_sum(self.load, groups.dp)
        self.bias += self.bias_rate * torch.sign(load_G.mean() - load_G)
        self.load.zero_()


def router_z_loss(logit_NG: Tensor, weight: float) -> Tensor:
    """weight * mean square of the router's logits, fp32: keeps sigmoid routers out of saturation.

    ST-MoE's z-loss (arXiv:2202.08906, section 3.2) squares the log-sum-exp, what its softmax
    normalises by; a sigmoid has a normaliser of its own for each logit, so each logit is squared.
    """
    return weight * logit_NG.float().square().mean()

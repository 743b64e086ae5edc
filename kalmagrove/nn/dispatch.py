"""Routing for layers of which each token uses a few parts: groves and experts.

A layer chooses parts (`Balanced.choose`), then goes through the three steps of
`kalmagrove.parallel.expert` that bring the tokens to their parts and back.
Letters: N tokens of this rank, G parts, K chosen a token, S = N * K.
"""

import math

import torch
from torch import Tensor

from kalmagrove.nn.common import wide
from kalmagrove.nn.precision import Fp32Buffers
from kalmagrove.nn.tally import Tally
from kalmagrove.parallel import (
    Groups,
    Shard,
    TensorParallel,
    Traffic,
    all_reduce_sum,
    count_parts,
    reduce,
)
from kalmagrove_kernels.edge.reference import largest


class Balanced(Fp32Buffers):
    """A router whose load is balanced by a selection bias, not a loss (arXiv:2408.15664).

    Buffers, fp32, persistent and whole on every rank: `bias` [G], added to the scores for the
    choice only; `load` [G], the choices counted in training mode since the last `balance`.
    (Activation checkpointing runs a forward pass twice and counts twice; the sign rule does not see
    a common factor.)

    Each expert-parallel rank holds the parts of `shard`. Every rank routes tokens of its own, also
    those of a tensor-parallel group. `traffic` counts what it sends to others.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, parts: int, bias_rate: float, groups: Groups) -> None:
        super().__init__()
        self.bias_rate = bias_rate
        self.tp, self.ep = TensorParallel.of(groups), groups.ep
        self.shard = Shard.of("ep", groups.ep, parts)
        self.traffic = Traffic()
        self.register_buffer("bias", torch.zeros(parts))
        self.register_buffer("load", torch.zeros(parts))
        self.count_G: Tensor | None = None  # choices of each part in the last forward pass
        self.dropped_S: Tensor | None = None  # which of them were beyond a capacity

    @property
    def tally(self) -> Tally:
        """Counts of the last forward pass."""
        found: Tally = {} if self.count_G is None else {"count": self.count_G}
        if self.dropped_S is not None:
            found["dropped"] = self.dropped_S.float().mean()
        return found

    @staticmethod
    def shares(tally: Tally) -> dict[str, Tensor]:
        """`load` [G], the share of the choices; with a capacity `dropped`, that of those beyond."""
        found = {}
        if "count" in tally:
            found["load"] = tally["count"] / tally["count"].sum(-1, keepdim=True).clamp(min=1)
        if "dropped" in tally:
            found["dropped"] = tally["dropped"]
        return found

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The `shares` of the last forward pass, worked out when asked for."""
        return self.shares(self.tally)

    @property
    def overlaps(self) -> bool:
        """Whether a shared part can run while tokens are under way.

        Not where it has collectives of its own (tensor parallelism, weights that ZeRO 3 gathers):
        two communicators at once may wait for each other.
        """
        if self.ep.size == 1 or self.tp.group.size > 1:
            return False
        return not any(hasattr(p, "ds_id") for p in self.parameters())

    @torch.no_grad()
    def choose(self, score_NG: Tensor, chosen: int) -> Tensor:
        """Indices [N, K] of the largest score + bias. Equal sums go to the lower index."""
        biased_NG = score_NG.float() + self.bias
        # The order is what counts: shifted, every entry is a non-negative number for `largest`.
        biased_NG = biased_NG - biased_NG.amin(1, keepdim=True)
        index_NK = largest(biased_NG, chosen)
        self.count_G = count_parts(index_NK, len(self.bias))
        if self.training:
            self.load += self.count_G
        return index_NK

    @torch.no_grad()
    def limit(self, index_NK: Tensor, gate_NK: Tensor, capacity: float | None) -> Tensor:
        """The indices with G for the choices that go beyond the parts' capacity, if there is one.

        A part takes at most ceil(capacity * N * K / G) of this rank's choices, those of the largest
        gates; of equal gates, the earlier token. So what is dropped depends on the layout, as the
        N tokens are those of one rank.
        """
        self.dropped_S = None
        if capacity is None:
            return index_NK
        parts = len(self.bias)
        index_S = index_NK.flatten()
        order_S = gate_NK.flatten().argsort(descending=True, stable=True)
        order_S = order_S[index_S[order_S].argsort(stable=True)]  # by part, then by gate
        count_G = count_parts(index_NK, parts)
        start_G = count_G.cumsum(0) - count_G
        place_S = torch.arange(len(index_S), device=index_S.device) - start_G[index_S[order_S]]
        beyond_S = place_S >= math.ceil(capacity * len(index_S) / parts)
        self.dropped_S = torch.empty_like(beyond_S).scatter_(0, order_S, beyond_S)
        return index_S.masked_fill(self.dropped_S, parts).view_as(index_NK)

    def z_loss(self, logit_NG: Tensor, weight: float) -> Tensor:
        """weight * mean square of the router's logits over the tokens of all tp ranks, fp32.

        It keeps sigmoid routers out of saturation. ST-MoE's z-loss (arXiv:2202.08906, section 3.2)
        squares the log-sum-exp, what its softmax normalises by; a sigmoid has a normaliser of its
        own for each logit, so each logit is squared.
        """
        own = weight / self.tp.group.size * wide(logit_NG).square().mean()
        return reduce(own, self.tp.group).float()

    @torch.no_grad()
    def balance(self, groups: Groups) -> None:
        """Raise the bias of parts below the mean load by `bias_rate`, lower the others; zero the
        load.

        The sign rule of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), on the load of all ranks,
        each of which counted tokens of its own: call it on all of them, once an optimizer step.
        """
        load_G = all_reduce_sum(self.load, groups.world)
        self.bias += self.bias_rate * torch.sign(load_G.mean() - load_G)
        self.load.zero_()

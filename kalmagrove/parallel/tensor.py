"""Tensor parallelism as three questions a layer asks: how to enter it, leave it, share weights.

Megatron's scheme (arXiv:1909.08053; with `sequence`, arXiv:2205.05198). The residual *stream*
[B, T, X] is whole on every tp rank, or with `sequence` split along T. A layer's *inner* part works
on all of T with a slice of the heads, of the hidden width or of the vocabulary.

megatron-core's own layers are not used: on the CPU its mappings need CUDA, its `_reduce` drops the
all-reduce of a non-contiguous input, and its layers bring their own initialisation.
Letters: B batch, T tokens, X any width, D model, V vocabulary, N tokens in all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.parallel.collectives import all_reduce_max
from kalmagrove.parallel.differentiable import (
    gather,
    join,
    reduce,
    scatter_sum,
    split,
    sum_grad,
)
from kalmagrove.parallel.groups import Group, Groups
from kalmagrove.parallel.shard import Shard, normal_, parameter


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel group as layers see it; the identity everywhere in a group of one."""

    group: Group
    sequence: bool

    @classmethod
    def of(cls, groups: Groups) -> "TensorParallel":
        return cls(groups.tp, groups.sequence)

    def enter(self, x_BTX: Tensor) -> Tensor:
        """From the stream to the inner part, where each rank computes with its own slice."""
        return gather(x_BTX, self.group, 1) if self.sequence else sum_grad(x_BTX, self.group)

    def leave(self, y_BTX: Tensor) -> Tensor:
        """From the ranks' partial results of the inner part to the stream."""
        return scatter_sum(y_BTX, self.group, 1) if self.sequence else reduce(y_BTX, self.group)

    def shared(self, weight: Tensor) -> Tensor:
        """A whole weight that every rank applies to what only it has: heads, or other tokens."""
        return sum_grad(weight, self.group)

    def stream(self, weight: Tensor) -> Tensor:
        """A whole weight applied to the stream."""
        return self.shared(weight) if self.sequence else weight

    def tokens(self, x_BTX: Tensor) -> Tensor:
        """From the stream to this rank's own piece of T, for layers that split tokens over tp."""
        return x_BTX if self.sequence else split(x_BTX, self.group, 1)

    def stream_of(self, y_BTX: Tensor) -> Tensor:
        """From each rank's own piece of T back to the stream."""
        return y_BTX if self.sequence else join(y_BTX, self.group, 1)

    def piece(self, whole: int, dim: int = 0) -> Shard:
        """This rank's even piece of a dimension."""
        return Shard.of("tp", self.group, whole, dim)


class Linear(nn.Module):
    """x W^T with the weight [out, in] zero until initialised, or this rank's piece of it.

    shard: cut along dim 0, columns of the output (after `enter`); along dim 1, partial sums (before
    `leave`); None, or a piece that is all of it: whole.
    through: what the weight passes on its way to x (`TensorParallel.stream` or `.shared`).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        shard: Shard | None = None,
        through: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.through = through
        self.weight = parameter(outputs, inputs, kind="matrix", shard=shard)

    def init_weights(self, std: float) -> None:
        normal_(self.weight, std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.through is None else self.through(self.weight))


class VocabEmbedding(nn.Module):
    """An embedding whose rows are split over the tp ranks. Parameter: weight [V / tp, D]."""

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.shard = tp.piece(vocab_size)
        self.weight = parameter(vocab_size, width, kind="embedding", shard=self.shard)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The stream [B, T, D] of the tokens' rows."""
        if self.tp.group.size == 1:
            return F.embedding(tokens_BT, self.weight)
        row_BT = tokens_BT - self.shard.start
        elsewhere = (row_BT < 0) | (row_BT >= self.shard.length)
        x_BTD = F.embedding(row_BT.masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(x_BTD.masked_fill(elsewhere.unsqueeze(-1), 0.0))


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats, and log Z [N], of logits whose columns lie on the tp ranks.

    No rank ever holds all logits: the ranks share a maximum, a sum and the target's logit a token.
    log Z is 0 where the target is -100 (no loss). fp32.

    Args:
        logits_NV: fp32 [N, V / tp], this rank's columns.
        targets_N: int64 [N], of the whole vocabulary; -100 for none.
    """
    counted_N = targets_N != -100
    group = tp.group
    if group.size == 1:
        log_z_N = torch.logsumexp(logits_NV, -1)
        target_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None]).squeeze(1)
    else:
        size = logits_NV.shape[1]
        top_N = all_reduce_max(logits_NV.detach().amax(1), group)
        total_N = reduce((logits_NV - top_N[:, None]).exp().sum(1), group)
        log_z_N = total_N.log() + top_N
        column_N = targets_N - group.rank * size
        here_N = (column_N >= 0) & (column_N < size)
        own_N = logits_NV.gather(1, column_N.clamp(0, size - 1)[:, None]).squeeze(1)
        target_N = reduce(own_N.masked_fill(~here_N, 0.0), group)
    log_z_N = log_z_N.masked_fill(~counted_N, 0.0)
    return (log_z_N - target_N.masked_fill(~counted_N, 0.0)).sum(), log_z_N

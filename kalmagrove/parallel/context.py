"""Context parallelism as what an attention asks of it: positions, and the tokens of other ranks.

The rows are cut along the sequence into equal pieces of consecutive tokens, one a cp rank, in rank
order. All but attention works on the tokens of a piece alone.
Letters: B batch, T tokens of the piece, S tokens up to the end of the piece, P some tokens, X any.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kalmagrove.parallel.differentiable import gather, shift
from kalmagrove.parallel.groups import Group, Groups


@dataclass(frozen=True)
class ContextParallel:
    """The context-parallel group as attentions see it."""

    group: Group

    @classmethod
    def of(cls, groups: Groups) -> "ContextParallel":
        return cls(groups.cp)

    @property
    def divided(self) -> bool:
        """Whether other ranks hold other tokens of the same rows."""
        return self.group.size > 1

    def start(self, tokens: int) -> int:
        """The position of this rank's first token, where every rank holds `tokens`."""
        return self.group.rank * tokens

    def until_here(self, x_BTX: Tensor) -> Tensor:
        """[B, S, X]: the tokens from the row's first to this rank's last, of all their ranks."""
        if not self.divided:
            return x_BTX
        end = (self.group.rank + 1) * x_BTX.shape[1]
        return gather(x_BTX, self.group, 1)[:, :end]

    def just_before(self, x_BTX: Tensor, count: int) -> Tensor:
        """[B, P, X]: the `count` tokens before this rank's first; zeros before the row's first.

        Taken from neighbour to neighbour, over as many ranks as `count` tokens reach back.
        """
        pieces: list[Tensor] = []
        piece, missing = x_BTX, count
        while missing > 0:
            piece = shift(piece[:, -missing:], self.group)
            pieces.insert(0, piece)
            missing -= piece.shape[1]
        return torch.cat(pieces, 1) if pieces else x_BTX[:, :0]

"""What every feed-forward shares: its result, the arithmetic type, and work beside the exchange of
tokens.

Used by the feed-forwards of this package; `kalmagrove.nn.ffn` builds them.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class FFNOutput(NamedTuple):
    """y_BTD: what is added to the residual stream. aux_loss: fp32 scalar, zero if there is none."""

    y_BTD: Tensor
    aux_loss: Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it already is: the type of routers and edge functions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_aux_loss(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)


class Aside:
    """Work that does not wait for what is queued after this is made, on a GPU's second stream.

    Make it before the exchange of tokens, `run` after that is queued, and `join` where the result
    is needed. Autograd repeats the choice of streams in the backward pass. Without `wanted` or
    without a GPU the work is done plainly.
    """

    def __init__(self, x: Tensor, wanted: bool) -> None:
        self.stream: torch.cuda.Stream | None = None
        if wanted and x.is_cuda:
            self.stream = _second_stream(x.device)
            self.stream.wait_stream(torch.cuda.current_stream(x.device))

    def run(self, work: Callable[[Tensor], FFNOutput], x: Tensor) -> Tensor:
        """The output of `work`, not to be touched before `join`. x: made before this was."""
        if self.stream is None:
            return work(x).y_BTD
        x.record_stream(self.stream)  # its memory is not reused before the work is done
        with torch.cuda.stream(self.stream):
            return work(x).y_BTD

    def join(self, y: Tensor) -> Tensor:
        """y, which the current stream may use from here on."""
        if self.stream is not None:
            current = torch.cuda.current_stream(y.device)
            current.wait_stream(self.stream)
            y.record_stream(current)
        return y


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

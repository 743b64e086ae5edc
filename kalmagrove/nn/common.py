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
    """Work on a GPU's second stream, beside what is queued after this is made.

    Made before tokens are exchanged, as the host waits for their numbers then, and joined where the
    result is needed. Autograd repeats the choice of streams in the backward pass. Without `wanted`
    or without a GPU the work is done plainly.
    """

    def __init__(self, work: Callable[[Tensor], FFNOutput], x: Tensor, wanted: bool) -> None:
        self._stream = _second_stream(x.device) if wanted and x.is_cuda else None
        if self._stream is None:
            self._y = work(x).y_BTD
            return
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(self._stream)  # its memory is not reused before the work is done
        with torch.cuda.stream(self._stream):
            self._y = work(x).y_BTD

    def join(self) -> Tensor:
        """The output of the work, which the current stream may use from here on."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._y.device)
            current.wait_stream(self._stream)
            self._y.record_stream(current)
        return self._y


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""What every feed-forward shares: its result, tagged parameters, and the arithmetic type.

Used by the feed-forwards of this package; `kalmagrove.nn.ffn` builds them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class FFNOutput(NamedTuple):
    """y_BTD: what is added to the residual stream. aux_loss: fp32 scalar, zero if there is none."""

    y_BTD: Tensor
    aux_loss: Tensor


def parameter(*shape: int, kind: str) -> nn.Parameter:
    """A zero parameter with the kind the optimizer goes by: matrix, bias, norm, spline, ..."""
    p = nn.Parameter(torch.zeros(*shape))
    p.kind = kind  # type: ignore[attr-defined]
    return p


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it already is: the type of routers and edge functions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_aux_loss(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)

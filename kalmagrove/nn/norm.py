"""RMSNorm, computed in fp32 whatever the type of its input.

Used before every block and inside the attentions (per head, on queries, keys and outputs).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def upcast(x: Tensor) -> Tensor:
    """fp32, or fp64 where `x` already is: the type of everything that must not lose precision."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    From Zhang and Sennrich, arXiv:1910.07467. `forward` takes [..., width] and returns the same
    shape and type. PyTorch's kernel reads narrow types, computes in fp32 and rounds once.

    through: what the weight passes on its way to x, which makes its gradient whole where
    tensor-parallel ranks apply it to different x (`TensorParallel.stream` or `.shared`); None:
    nothing.
    """

    def __init__(
        self, width: int, eps: float = 1e-5, through: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.through = through
        self.weight = nn.Parameter(torch.ones(width))
        self.weight.kind = "norm"  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.through is None else self.through(self.weight)
        wider = torch.promote_types(x.dtype, weight.dtype)  # the kernel takes one type
        return F.rms_norm(x.to(wider), weight.shape, weight.to(wider), self.eps).to(x.dtype)

"""A linear map beside something else that is made of the same input: W_e x beside the projection.

Autograd adds the two gradients of the input in a pass of its own over three tensors of [N, D]; here
the matrix product of the backward pass adds them while it writes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_beside(x_ND: Tensor, w_MD: Tensor) -> tuple[Tensor, Tensor]:
    """W x [N, M], and x for what else is made of it. Plain PyTorch; differentiable in x and w."""
    h_NM, beside_ND = _LinearBeside.apply(x_ND, w_MD)
    return h_NM, beside_ND


class _LinearBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_MD: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_ND, w_MD)
        return F.linear(x_ND, w_MD), x_ND.view_as(x_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_NM: Tensor, dx_ND: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, w_MD = ctx.saved_tensors
        return torch.addmm(dx_ND, dh_NM, w_MD), dh_NM.mT @ x_ND

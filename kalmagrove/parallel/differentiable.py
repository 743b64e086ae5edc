"""Collectives that autograd understands: each names what it does forward and backward.

The vocabulary of tensor, context and expert parallelism in `kalmagrove.nn`. All are the identity
in a group of one rank, work on any device, and return contiguous tensors. `dim` is the dimension
that is split over the group's ranks, in rank order, into equal pieces.

| function    | forward        | backward       | for                                        |
|-------------|----------------|----------------|--------------------------------------------|
| sum_grad    | identity       | all-reduce     | what all ranks hold, used by each in part  |
| reduce      | all-reduce     | identity       | partial results that all ranks need whole  |
| gather      | all-gather     | reduce-scatter | pieces that every rank uses in part        |
| scatter_sum | reduce-scatter | all-gather     | partial results of which a rank keeps one  |
| split       | own piece      | all-gather     | what all ranks hold, worked on in pieces   |
| join        | all-gather     | own piece      | pieces that all ranks go on with alike     |
| shift       | to the next    | to the last    | the border between neighbouring pieces     |
| exchange    | all-to-all     | all-to-all     | rows for the ranks that hold their part    |
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kalmagrove.parallel.groups import Group
from kalmagrove.parallel.traffic import Traffic


def sum_grad(x: Tensor, group: Group) -> Tensor:
    return x if group.size == 1 else _apply(_SumGrad, x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    return x if group.size == 1 else _apply(_Reduce, x, group)


def gather(x: Tensor, group: Group, dim: int) -> Tensor:
    return x if group.size == 1 else _apply(_Gather, x, group, dim, True)


def join(x: Tensor, group: Group, dim: int) -> Tensor:
    return x if group.size == 1 else _apply(_Gather, x, group, dim, False)


def scatter_sum(x: Tensor, group: Group, dim: int) -> Tensor:
    return x if group.size == 1 else _apply(_Scatter, x, group, dim, True)


def split(x: Tensor, group: Group, dim: int) -> Tensor:
    return x if group.size == 1 else _apply(_Scatter, x, group, dim, False)


def shift(x: Tensor, group: Group) -> Tensor:
    """What the rank before holds; zeros on the first rank."""
    return torch.zeros_like(x) if group.size == 1 else _apply(_Shift, x, group)


def exchange(
    x_SX: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    group: Group,
    traffic: Traffic | None = None,
) -> Tensor:
    """Rows of the first dimension: `send[r]` of them go to rank r, `receive[r]` come from it.

    Zero rows are as good as any. Ordered by rank on both sides. `traffic` counts both passes.
    """
    if group.size == 1:
        return x_SX
    return _apply(_Exchange, x_SX, list(send), list(receive), group, traffic)


@torch.compiler.disable  # collectives stay outside of compiled graphs
def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    return function.apply(*arguments)


def own_piece(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's piece, contiguous. For what needs no gradient; see `split` for what does."""
    assert x.shape[dim] % group.size == 0, (
        f"dimension {dim} of {tuple(x.shape)} does not split over {group.size} ranks"
    )
    return x.chunk(group.size, dim)[group.rank].contiguous()


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' pieces. Not differentiable."""
    if group.size == 1:
        return x
    pieces = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(pieces, x.contiguous(), group=group.handle)
    return pieces if dim == 0 else torch.cat(pieces.chunk(group.size), dim)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's piece of the sum. Not differentiable."""
    if group.size == 1:
        return x
    pieces = torch.stack(x.chunk(group.size, dim))
    if pieces.device.type == "cpu":  # gloo has no reduce-scatter
        dist.all_reduce(pieces, group=group.handle)
        return pieces[group.rank].contiguous()
    out = torch.empty_like(pieces[0])
    dist.reduce_scatter_tensor(out, pieces, group=group.handle)
    return out


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.handle)
    return total


class _SumGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _all_reduce(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, summed: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.summed = group, dim, summed
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back = reduce_scatter if ctx.summed else own_piece
        return back(grads[0], ctx.group, ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, summed: bool) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return (reduce_scatter if summed else own_piece)(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_gather(grads[0], ctx.group, ctx.dim), None, None, None


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _pass_on(x, group, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _pass_on(grads[0], ctx.group, -1), None


def _pass_on(x: Tensor, group: Group, step: int) -> Tensor:
    """Send to the rank `step` further, receive from the one before; zeros where there is none."""
    received, operations = torch.zeros_like(x, memory_format=torch.contiguous_format), []
    to, source = group.rank + step, group.rank - step
    if 0 <= to < group.size:
        sent = x.contiguous()
        operations.append(dist.P2POp(dist.isend, sent, group.ranks[to], group.handle))
    if 0 <= source < group.size:
        operations.append(dist.P2POp(dist.irecv, received, group.ranks[source], group.handle))
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SX: Tensor,
        send: list[int],
        receive: list[int],
        group: Group,
        traffic: Traffic | None,
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group, ctx.traffic = send, receive, group, traffic
        return all_to_all(x_SX, send, receive, group, traffic)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_SX = all_to_all(grads[0], ctx.receive, ctx.send, ctx.group, ctx.traffic)
        return x_SX, None, None, None, None


def all_to_all(
    x_SX: Tensor,
    send: list[int],
    receive: list[int],
    group: Group,
    traffic: Traffic | None = None,
) -> Tensor:
    """See `exchange`. Not differentiable."""
    if group.size == 1:
        return x_SX
    x_SX = x_SX.contiguous()
    out = x_SX.new_empty(sum(receive), *x_SX.shape[1:])
    row = x_SX.element_size() * math.prod(x_SX.shape[1:])
    away = row * (sum(send) - send[group.rank])
    with nullcontext() if traffic is None else traffic.count(away, x_SX.device):
        dist.all_to_all_single(out, x_SX, receive, send, group=group.handle)
    return out

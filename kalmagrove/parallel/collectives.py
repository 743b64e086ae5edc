"""Collectives over a `Group` that work on any device and are the identity at size 1."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kalmagrove.parallel.groups import Group

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor, group: Group) -> Tensor:
    """Sum over the group's ranks, in place; returns `tensor`. Not differentiable."""
    if group.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group.handle)
    return tensor


def all_reduce_max(tensor: Tensor, group: Group) -> Tensor:
    """Maximum over the group's ranks, in place; returns `tensor`. Not differentiable."""
    if group.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group.handle)
    return tensor


def any_rank(flag: bool, group: Group, device: torch.device) -> bool:
    """Whether `flag` is true on any rank; every rank gets the same answer."""
    if group.size == 1:
        return flag
    return bool(all_reduce_max(torch.tensor(int(flag), device=device), group).item())


def broadcast_object(value: T, group: Group) -> T:
    """The value of the group's first rank, on every rank."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    return box[0]


def barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.handle)

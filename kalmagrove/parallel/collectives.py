"""Collectives over a `Group` that work on any device and are the identity at size 1."""

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
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


def all_gather_object(value: T, group: Group) -> list[T]:
    """The value of every rank, on every rank."""
    if group.size == 1:
        return [value]
    box: list[T | None] = [None] * group.size
    dist.all_gather_object(box, value, group=group.handle)
    return box  # type: ignore[return-value]


def barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.handle)


def last_word(say: Callable[[], None]) -> None:
    """The first rank says it, and the others wait for that (a minute at most) before they end.

    Launchers kill the ranks that are left as soon as one has ended. Not a collective, as ranks that
    fail may not be at the same place: it goes through the store of the rendezvous.
    """
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        say()
        store.set("kalmagrove/last_word", "said")
    else:
        with suppress(RuntimeError):  # the store may end with the first rank
            store.wait(["kalmagrove/last_word"], timedelta(minutes=1))

"""Process groups and collectives; the only home of megatron-core."""

from kalmagrove.parallel.collectives import (
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_object,
    last_word,
)
from kalmagrove.parallel.groups import Group, Groups

__all__ = [
    "Group",
    "Groups",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_object",
    "last_word",
]

"""Process groups, collectives, tensor-parallel layers; the only home of megatron-core."""

from kalmagrove.parallel.collectives import (
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_object,
    last_word,
)
from kalmagrove.parallel.context import ContextParallel
from kalmagrove.parallel.differentiable import (
    all_gather,
    exchange,
    gather,
    join,
    own_piece,
    reduce,
    scatter_sum,
    shift,
    split,
    sum_grad,
)
from kalmagrove.parallel.expert import Plan, Rows, communicate, count_parts, postprocess, preprocess
from kalmagrove.parallel.groups import Group, Groups
from kalmagrove.parallel.shard import (
    Shard,
    is_expert,
    module_shards,
    normal_,
    parameter,
    shard_of,
)
from kalmagrove.parallel.tensor import Linear, TensorParallel, VocabEmbedding, cross_entropy
from kalmagrove.parallel.traffic import Exchanged, Traffic

__all__ = [
    "ContextParallel",
    "Exchanged",
    "Group",
    "Groups",
    "Linear",
    "Plan",
    "Rows",
    "Shard",
    "TensorParallel",
    "Traffic",
    "VocabEmbedding",
    "all_gather",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_object",
    "communicate",
    "count_parts",
    "cross_entropy",
    "exchange",
    "gather",
    "is_expert",
    "join",
    "last_word",
    "module_shards",
    "normal_",
    "own_piece",
    "parameter",
    "postprocess",
    "preprocess",
    "reduce",
    "scatter_sum",
    "shard_of",
    "shift",
    "split",
    "sum_grad",
]

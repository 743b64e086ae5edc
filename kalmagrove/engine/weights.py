"""The whole weights of a model in the dtype of its parameters, for anything that is not training.

Used by `checkpoint`, which writes them as `model.safetensors`.
"""

from torch import Tensor

from kalmagrove.engine.compat import gathered
from kalmagrove.engine.engine import Engine
from kalmagrove.engine.fragments import persistent_buffers
from kalmagrove.parallel import Groups, Shard, all_gather, all_reduce_sum, module_shards


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Parameters and buffers on the CPU of rank 0, put together one by one; empty elsewhere.

    Collective under ZeRO 3, and where tensors are pieces.
    """
    whole: dict[str, Tensor] = {}
    groups, shards = engine.groups, module_shards(engine.module)

    def keep(name: str, tensor: Tensor) -> None:
        full = _whole(tensor.detach(), shards.get(name), groups)
        if groups.is_main:
            whole[name] = full.to("cpu", copy=True).contiguous()

    for name, parameter in engine.module.named_parameters():
        with gathered(parameter) as tensor:
            keep(name, tensor)
    for name, buffer in persistent_buffers(engine.module):
        keep(name, buffer)
    return whole


def _whole(tensor: Tensor, shard: Shard | None, groups: Groups) -> Tensor:
    """On rank 0 the whole tensor; the ranks that hold its other pieces take part."""
    if shard is None:
        return tensor
    group = groups.ep if shard.over == "ep" else groups.tp
    if 0 not in group.ranks:
        return tensor
    if shard.even:
        return all_gather(tensor, group, shard.dim)
    whole = tensor.new_zeros(shard.whole_shape(tuple(tensor.shape)))
    shard.cut(whole).copy_(tensor)
    return all_reduce_sum(whole, group)

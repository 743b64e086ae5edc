"""Which part of a whole tensor a rank holds: a contiguous piece along one dimension.

Modules tag their parameters (`parameter.shard`) and name their buffers (`buffer_shards`) with it;
initialisation, optimizer groups, gradient norms and checkpoints read it back. A tensor without a
shard is whole on every rank of the tensor- and expert-parallel groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kalmagrove.parallel.groups import Group


@dataclass(frozen=True)
class Shard:
    """Indices [start, start + length) of `whole` along `dim`.

    over: "tp", the other pieces are held by the ranks of the tensor-parallel group; "ep", by those
    of the expert-parallel group. A tensor with over="ep" belongs to a grove or expert also where
    the group has one rank: its gradient is summed over `groups.expert_dp`. even: whether the pieces
    of all ranks have one size.
    """

    over: Literal["tp", "ep"]
    dim: int
    start: int
    length: int
    whole: int
    even: bool = True

    @classmethod
    def of(cls, over: Literal["tp", "ep"], group: Group, whole: int, dim: int = 0) -> "Shard":
        """The piece of this rank of `group`, all of one size (validation has seen to that)."""
        assert whole % group.size == 0, f"{whole} does not split over {group.size} ranks"
        length = whole // group.size
        return cls(over, dim, group.rank * length, length, whole)

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's view of the whole tensor."""
        assert whole.shape[self.dim] == self.whole
        return whole.narrow(self.dim, self.start, self.length)

    def whole_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole tensor of which `local` is this rank's."""
        assert local[self.dim] == self.length
        return (*local[: self.dim], self.whole, *local[self.dim + 1 :])


def parameter(*shape: int, kind: str, shard: Shard | None = None) -> nn.Parameter:
    """A zero parameter with the kind the optimizer goes by: matrix, bias, norm, spline, ...

    Args:
        shape: of the whole parameter.
        shard: the piece of it that this rank holds. Tagged with it, unless it is whole; experts'
            parameters always are.
    """
    sizes = list(shape)
    if shard is not None:
        assert sizes[shard.dim] == shard.whole
        sizes[shard.dim] = shard.length
    p = nn.Parameter(torch.zeros(sizes))
    p.kind = kind  # type: ignore[attr-defined]
    if shard is not None and (shard.over == "ep" or shard.length < shard.whole):
        p.shard = shard  # type: ignore[attr-defined]
    return p


def shard_of(parameter: Tensor) -> Shard | None:
    """The tag of a parameter; None: whole."""
    return getattr(parameter, "shard", None)


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter belongs to groves or experts, whose tokens come from other ranks too."""
    shard = shard_of(parameter)
    return shard is not None and shard.over == "ep"


def module_shards(model: nn.Module) -> Mapping[str, Shard]:
    """Full name to shard, of all parameters and buffers of `model` that are not whole."""
    found: dict[str, Shard] = {}
    for prefix, module in model.named_modules():
        lead = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            shard = shard_of(parameter)
            if shard is not None:
                found[lead + name] = shard
        for name, shard in getattr(module, "buffer_shards", {}).items():
            found[lead + name] = shard
    return found


@torch.no_grad()
def normal_(parameter: Tensor, std: float, part: slice | None = None) -> None:
    """Fill with N(0, std^2): this rank's piece of the draw that one process would make.

    Every rank draws the whole tensor from the same generator, so that a model does not depend on
    how it is laid out.

    Args:
        part: of the last dimension; default: all of it.
    """
    shard = shard_of(parameter)
    target = parameter if part is None else parameter[..., part]
    if shard is None:
        target.normal_(std=std)
        return
    whole = torch.empty(shard.whole_shape(tuple(target.shape)), dtype=target.dtype)
    target.copy_(shard.cut(whole.normal_(std=std)))

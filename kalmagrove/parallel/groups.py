"""The process groups of a run, as one frozen object that is passed explicitly.

The only home of megatron-core, which lays the ranks out. Everything else sees `Group`s and the
collectives of this package, which are the identity at size 1.
"""

import warnings
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist

from kalmagrove.config import Parallel


@dataclass(frozen=True)
class Group:
    """Ranks that communicate. `handle` is None for a single process without torch.distributed."""

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, handle: dist.ProcessGroup) -> Self:
        ranks = tuple(dist.get_process_group_ranks(handle))
        return cls(handle, dist.get_rank(handle), len(ranks), ranks)

    @classmethod
    def alone(cls) -> Self:
        return cls(None, 0, 1, (0,))


@dataclass(frozen=True)
class Groups:
    """Where this rank stands in every dimension of parallelism.

    tp: tensor parallel, ranks that hold slices of one layer. ep: expert parallel, ranks that hold
    different groves. dp: data parallel, ranks that hold the same dense weights and read different
    data. expert_dp: ranks that hold the same groves.
    """

    world: Group
    tp: Group
    ep: Group
    dp: Group
    expert_dp: Group
    device: torch.device

    @classmethod
    def init(cls, parallel: Parallel, device: torch.device) -> Self:
        """Lay out the ranks of the initialised default process group."""
        with warnings.catch_warnings():  # what it lacks (TransformerEngine, Apex) is not used here
            warnings.simplefilter("ignore")
            from megatron.core import parallel_state
            from megatron.core.process_groups_config import ProcessGroupCollection

        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tp,
                expert_model_parallel_size=parallel.ep,
                expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
        mcore = ProcessGroupCollection.use_mpu_process_groups()
        world = dist.group.WORLD
        assert world is not None
        return cls(
            world=Group.of(world),
            tp=Group.of(mcore.tp),
            ep=Group.of(mcore.ep),
            dp=Group.of(mcore.dp),
            expert_dp=Group.of(mcore.expt_dp),
            device=device,
        )

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Self:
        """One process, no torch.distributed: tests, generation, dry runs."""
        alone = Group.alone()
        return cls(alone, alone, alone, alone, alone, torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0

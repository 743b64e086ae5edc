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
    """Where this rank stands in every dimension of parallelism: world = tp x cp x dp.

    tp: tensor parallel, ranks that hold slices of one layer. cp: context parallel, ranks that hold
    consecutive pieces of the same rows. dp: data parallel, ranks that read different rows. dp_cp:
    both, the ranks that hold the same dense weights; ZeRO shards over them. ep: expert parallel,
    ranks that hold different groves or experts; it is laid over tp, cp and dp, so world = ep x
    expert_dp too. expert_dp: ranks that hold the same groves.

    sequence: whether norms and residuals are split along the sequence over the tp ranks.
    """

    world: Group
    tp: Group
    cp: Group
    dp: Group
    dp_cp: Group
    ep: Group
    expert_dp: Group
    device: torch.device
    sequence: bool = False

    @classmethod
    def init(cls, parallel: Parallel, device: torch.device, timeout: float = 1800) -> Self:
        """Lay out the ranks of the initialised default process group.

        Args:
            timeout: seconds a collective may wait.
        """
        with warnings.catch_warnings():  # what it lacks (TransformerEngine, Apex) is not used here
            warnings.simplefilter("ignore")
            from megatron.core import parallel_state
            from megatron.core.process_groups_config import ProcessGroupCollection

        if not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tp,
                context_parallel_size=parallel.cp,
                expert_model_parallel_size=parallel.ep,
                expert_tensor_parallel_size=1,
                distributed_timeout_minutes=timeout / 60,
                create_gloo_process_groups=False,
            )
        mcore = ProcessGroupCollection.use_mpu_process_groups()
        world = dist.group.WORLD
        assert world is not None
        return cls(
            world=Group.of(world),
            tp=Group.of(mcore.tp),
            cp=Group.of(mcore.cp),
            dp=Group.of(mcore.dp),
            dp_cp=Group.of(mcore.dp_cp),
            ep=Group.of(mcore.ep),
            expert_dp=Group.of(mcore.expt_dp),
            device=device,
            sequence=parallel.sequence and parallel.tp > 1,
        )

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Self:
        """One process, no torch.distributed: tests, generation, dry runs."""
        alone = Group.alone()
        return cls(alone, alone, alone, alone, alone, alone, alone, torch.device(device))

    @classmethod
    def reset(cls) -> None:
        """End the groups of the layout, so that the same processes can `init` another. Tests."""
        from megatron.core import parallel_state

        made = parallel_state._global_process_group_list or []
        parallel_state.destroy_model_parallel()
        for handle in {id(group): group for group in made if group is not None}.values():
            dist.destroy_process_group(handle)

    @property
    def is_main(self) -> bool:
        return self.world.rank == 0

    @property
    def experts_differ(self) -> bool:
        """Whether groves and experts are reduced over other ranks than dense weights are."""
        return self.ep.size > 1 or self.tp.size > 1

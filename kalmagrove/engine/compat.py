"""What DeepSpeed 0.19 needs to be told, patched or kept quiet about; nothing else touches its
internals.

Used by `connect`, `build_engine` and the checkpoint code. Pinned to deepspeed>=0.19.8,<0.20.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kalmagrove.engine.muon import Muon, Shard
from kalmagrove.parallel import Groups, is_expert, shard_of


def skip_shm_build() -> None:
    """Keep init_distributed from compiling `deepspeed_shm_comm` on CPU: 40 s, for inference."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop DeepSpeed's notes about choices that are made on purpose here ("untested optimizer")."""
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _no_memory_notes() -> Iterator[None]:
    """Keep ZeRO 1 in bf16 from printing the memory around every group of parameters.

    For each line the first rank collects all garbage while the others wait: nine tenths of the time
    that it takes to make the engine.
    """
    from deepspeed.runtime import bf16_optimizer

    noted = bf16_optimizer.see_memory_usage
    bf16_optimizer.see_memory_usage = lambda *arguments, **options: None
    try:
        yield
    finally:
        bf16_optimizer.see_memory_usage = noted


class Mpu:
    """`Groups` under the names DeepSpeed asks its `mpu` for."""

    def __init__(self, groups: Groups) -> None:
        self._tp, self._dp = groups.tp, groups.dp_cp  # its "data parallel": equal dense weights
        self.get_tensor_model_parallel_group = self.get_model_parallel_group
        self.get_tensor_model_parallel_rank = self.get_model_parallel_rank
        self.get_tensor_model_parallel_world_size = self.get_model_parallel_world_size

    def get_model_parallel_group(self) -> Any:
        return self._tp.handle

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._tp.ranks[0]

    def get_data_parallel_group(self) -> Any:
        return self._dp.handle

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._dp.ranks)

    def get_pipeline_model_parallel_group(self) -> None:
        return None

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], groups: Groups
) -> Any:
    """`deepspeed.initialize` on existing groups.

    The parameters must have been tagged by `tag_parallel` before `optimizer` was made.
    """
    import deepspeed

    with quiet(), _no_memory_notes(), _experts_seen(model, groups):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config,
            mpu=Mpu(groups),
            dist_init_required=False,
        )
    if isinstance(optimizer, Muon):
        shard_muon(engine, optimizer, groups)
    zero = engine.optimizer
    if hasattr(zero, "has_overflow_partitioned_grads_serial") and hasattr(zero, "bit16_groups"):
        zero.has_overflow_partitioned_grads_serial = lambda: _not_finite(zero)
        zero.get_grad_norm_direct = _norm_at_once(zero)
    if hasattr(zero, "update_hp_grads"):
        zero.update_hp_grads = lambda clear_lp_grads=False: _add_gradients(zero)
        zero.get_grads_for_norm = _gradients_at_once(zero)
    return engine


# DeepSpeed asks each gradient by itself for its norm and scales each by itself. The norm of their
# norms is that of them all, so its own functions are given all norms as one gradient, and to scale
# the buffer that the gradients lie in.


def _norms(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norms of all as one fp64 tensor, nothing of none; fp32 sums on a CPU are too coarse."""
    held = [gradient for gradient in gradients if gradient.numel()]
    return [torch.stack(torch._foreach_norm(held, 2, dtype=torch.float64))] if held else []


def _norm_at_once(zero: Any) -> Callable[..., Tensor]:
    """`get_grad_norm_direct` of ZeRO 2: the norm over all ranks of this rank's pieces."""
    whole = zero.get_grad_norm_direct

    def norm(gradients: Sequence[Tensor], params: Sequence[Tensor], norm_type: int = 2) -> Tensor:
        pieces = (g for g in gradients if not getattr(g, "_zero_padding", False))
        own = [
            (g, p)
            for g, p in zip(pieces, params, strict=False)  # the last ranks may hold padding alone
            if zero.model_parallel_rank == 0 or getattr(p, "tensor_model_parallel", False)
        ]
        norms = _norms([g for g, _ in own])
        found: Tensor = whole(norms, [p for _, p in own][: len(norms)], norm_type)
        return found

    return norm


def _gradients_at_once(zero: Any) -> Callable[..., Any]:
    """`get_grads_for_norm` of ZeRO 1 in bf16: those of no expert, and of experts by group."""
    whole = zero.get_grads_for_norm

    def gradients(for_clipping: bool = False) -> Any:
        if for_clipping:
            return list(zero.fp32_groups_gradients_flat)
        dense, experts = whole()
        return _norms(dense), {name: _norms(own) for name, own in experts.items()}

    return gradients


def _not_finite(zero: Any) -> Tensor:
    """Whether a gradient of ZeRO 1 or 2 is not finite, as a tensor of one element.

    DeepSpeed asks each parameter by itself, with six kernels: in a model of small layers a quarter
    of a step of ZeRO 2 (docs/lab-notes.md).
    """
    groups = (zero.averaged_gradients[i] for i in range(len(zero.bit16_groups)))
    held = [g for group in groups for g in group if g is not None and g.numel()]
    if not held:
        return torch.zeros(1, dtype=torch.bool, device=zero.device)
    largest = torch.stack(torch._foreach_norm(held, torch.inf))  # NaN stays NaN
    return largest.isfinite().all().logical_not().reshape(1)


@torch.no_grad()
def _add_gradients(zero: Any) -> None:
    """Add the gradients of a pass to the fp32 sums of ZeRO 1 in bf16, and let go of them.

    DeepSpeed goes through the parameters in Python, with two kernels for each, and keeps the
    gradients, zeroed, for the next pass to add to: one kernel more. The sums are bit for bit the
    same, as fp32 holds every bf16 number: those of a step's first pass are copies.
    """
    for group, sums, found in zip(
        zero.bf16_groups,
        zero.fp32_groups_gradients,
        zero.fp32_groups_has_gradients,
        strict=True,
    ):
        held = [i for i, parameter in enumerate(group) if parameter.grad is not None]
        for seen, add in ((False, torch._foreach_copy_), (True, torch._foreach_add_)):
            these = [i for i in held if found[i] is seen]
            if these:
                add([sums[i] for i in these], [group[i].grad.view(-1) for i in these])
        for i in held:
            group[i]._hp_grad, group[i].grad, found[i] = sums[i], None, True


def expert_group_name(groups: Groups) -> str:
    """Under which DeepSpeed knows the groups of the experts; it reads the size off the name."""
    return f"ep_size_{groups.ep.size}"


def tag_parallel(model: nn.Module, groups: Groups) -> None:
    """Tell DeepSpeed which parameters are pieces: of a layer (tp), or of its groves (ep).

    It averages what is not tagged over the data-parallel ranks and counts it once in the norm. For
    untagged groves that is silently wrong.
    """
    for parameter in model.parameters():
        tags: dict[str, Any] = {}
        if is_expert(parameter) and groups.experts_differ:
            name = expert_group_name(groups)
            tags = {
                "tensor_model_parallel": True,  # the norm adds up over tp ranks
                "allreduce": False,
                "group_name": name,
                "ds_zero_placement_family": "autoep_expert",
                "ds_zero_partition_group_name": name,
            }
        elif shard_of(parameter) is not None and not is_expert(parameter):
            tags = {"tensor_model_parallel": True}
        for key, value in tags.items():
            setattr(parameter, key, value)


@contextlib.contextmanager
def _experts_seen(model: nn.Module, groups: Groups) -> Iterator[None]:
    """Make DeepSpeed's initialisation see that `model` has experts, and where they are.

    It recognises them by the classes of its own layers: a placeholder of the one that all ZeRO
    stages accept stands in the model meanwhile.
    """
    if not any(_apart(p) for p in model.parameters()):
        yield
        return
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.utils import groups as registry

    class Placeholder(AutoEPMoELayer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = groups.ep.size

        def set_deepspeed_parallelism(self, *arguments: Any, **options: Any) -> None:
            """The groups exist already."""

    for known, group in (
        (registry._EXPERT_PARALLEL_GROUP, groups.ep),
        (registry._EXPERT_DATA_PARALLEL_GROUP, groups.expert_dp),
    ):
        known.clear()
        known[expert_group_name(groups)] = group.handle
    for known, group in (
        (registry._EXPERT_PARALLEL_GROUP_RANKS, groups.ep),
        (registry._EXPERT_DATA_PARALLEL_GROUP_RANKS, groups.expert_dp),
    ):
        known.clear()
        known[expert_group_name(groups)] = list(group.ranks)
    model.add_module("_experts_seen", Placeholder())
    try:
        yield
    finally:
        del model._experts_seen


def shard_muon(engine: Any, muon: Muon, groups: Groups) -> None:
    """Tell `muon` how ZeRO 1 or 2 laid its parameters out (without ZeRO they stay whole)."""
    zero = engine.optimizer
    if zero is muon:
        return
    laid = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    for group, parameters in zip(muon.param_groups, laid, strict=True):
        if group["muon"]:
            shapes = tuple(tuple(p.shape) for p in parameters)
            over = groups.expert_dp if group.get("moe") else groups.dp_cp
            muon.shard(group["label"], Shard(shapes, group["params"][0].numel(), over))


def local_weights(engine: Any) -> list[Tensor]:
    """The tensors the optimizer updates on this rank: ZeRO's fp32 partitions, or the parameters."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    if flat is not None:
        return list(flat)
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The whole parameter under ZeRO 3 (all ranks enter), the parameter itself otherwise."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def _apart(parameter: Tensor) -> bool:
    """Whether DeepSpeed reduces a parameter over `groups.expert_dp`."""
    return not getattr(parameter, "allreduce", True)


def master_weight(parameter: nn.Parameter) -> Tensor:
    """A copy of the whole parameter as the optimizer holds it, fp32. Collective under ZeRO."""
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        return parameter.detach().float().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    return cast(Tensor, safe_get_full_fp32_param(parameter))


@torch.no_grad()
def set_weight(parameter: nn.Parameter, value: Tensor, groups: Groups) -> None:
    """Make `value` (fp32, this rank's piece) the parameter and what the optimizer holds.

    Without the second the next step would put the old weight back. Collective under ZeRO.
    """
    if hasattr(parameter, "ds_id"):
        import deepspeed

        zero = groups.expert_dp if _apart(parameter) else groups.dp_cp
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        # DeepSpeed's own setter of whole values cannot split what does not divide over the ranks.
        padded = nn.functional.pad(value.flatten(), (0, part * zero.size - value.numel()))
        deepspeed.utils.safe_set_local_fp32_param(parameter, padded[part * zero.rank :][:part])
        return
    parameter.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)

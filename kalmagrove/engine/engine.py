"""One optimizer step over DeepSpeed: accumulation, exact means, clipping, skipping of bad steps.

Built by `build_engine` from a model; driven by `fit`; saved and restored by `checkpoint`.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.config import ConfigError, Training
from kalmagrove.engine.compat import initialize, local_weights, tag_parallel
from kalmagrove.engine.config import deepspeed_config, resolve_precision
from kalmagrove.engine.optim import build_optimizer
from kalmagrove.engine.schedule import lr_factor
from kalmagrove.engine.timer import Timer
from kalmagrove.engine.watchdog import Progress
from kalmagrove.parallel import (
    Exchanged,
    Groups,
    all_gather_object,
    all_reduce_sum,
    any_rank,
    is_expert,
    shard_of,
)

Batch = dict[str, Any]


def build_engine(model: nn.Module, run: Training, groups: Groups) -> "Engine":
    """Give `model` to DeepSpeed: device, dtype, sharding, optimizer. All ranks call it.

    Raises:
        ConfigError: if the step does not divide over the ranks, or settings exclude each other.
    """
    run.check_world(groups.world.size)
    dtype = resolve_precision(run, groups.device)
    model.activation_checkpointing = run.engine.activation_checkpointing  # type: ignore[assignment]
    if run.engine.compile:
        _compile_blocks(model, run)
    if dtype == torch.bfloat16:  # fp32 islands (ADA's state, routers): TF32 is finer than the rest
        torch.set_float32_matmul_precision("high")
    frozen = frozen_digest(model)
    model.to(groups.device)
    parameters = sum(p.numel() for p in model.parameters())
    tag_parallel(model, groups)
    optimizer = build_optimizer(model, run.optim, groups.device)
    config = deepspeed_config(run, groups, dtype, parameters)
    return Engine(model, initialize(model, optimizer, config, groups), groups, run, dtype, frozen)


def frozen_digest(model: nn.Module) -> str | None:
    """Of the names and values that do not train; None if all do. Before they are sharded."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    if not frozen:
        return None
    found = hashlib.sha256()
    for name, parameter in frozen:
        found.update(name.encode())
        found.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return found.hexdigest()[:16]


def _compile_blocks(model: nn.Module, run: Training) -> None:
    if run.zero.stage == 3:
        raise ConfigError(
            "engine.compile",
            True,
            "does not work with zero.stage=3, whose hooks gather parameters inside every layer",
            "use zero.stage=2",
        )
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile()


class Engine:
    """A model under training.

    module: the model itself. deepspeed: the DeepSpeedEngine around it. nonfinite_in_row: skipped
    steps since the last good one. nonfinite_total: since step 0. metrics: the module's after the
    last training step, `aux_loss`, what was added to the cross-entropy, and `alltoall_bytes`, what
    the step sent in all-to-alls, if the model has any. frozen: a digest of the weights that do not
    train, None if all do. timer: seconds of the phases of steps. progress: where this rank is.
    """

    def __init__(
        self,
        module: nn.Module,
        deepspeed: Any,
        groups: Groups,
        run: Training,
        dtype: torch.dtype,
        frozen: str | None = None,
    ) -> None:
        self.module = module
        self.deepspeed = deepspeed
        self.groups = groups
        self.run = run
        self.dtype = dtype
        self.frozen = frozen
        self.nonfinite_in_row = 0
        self.nonfinite_total = 0
        self._metrics: dict[str, Tensor] | None = {}  # None: not worked out yet
        self._aux = torch.zeros((), device=groups.device)  # of the last step
        self._sent: int | None = None  # bytes in all-to-alls of the last step, if there are any
        self._losses: list[Tensor] = []  # of the last step's micro-batches, on the device
        self.timer, self.progress = Timer(groups.device), Progress()
        self.accumulation = run.accumulation(groups.dp.size)
        self._hyperparameters = [
            {key: value for key, value in group.items() if key != "params"}
            for group in deepspeed.optimizer.param_groups
        ]

    def train_step(self, batches: Sequence[Batch], step: int) -> tuple[Tensor, Tensor | float]:
        """Forward and backward over `accumulation` micro-batches, then one update.

        Args:
            step: finished steps before this one; decides the learning rate.

        Returns:
            This rank's cross-entropy, mean over its micro-batches (the mean over all ranks is the
            exact mean over the step's target tokens), NaN where the whole loss was not finite; and
            the global gradient norm before clipping. A norm that is not finite means that nothing
            was updated, on any rank: then `skipped` is true.
        """
        assert len(batches) == self.accumulation, "one step takes `accumulation` micro-batches"
        self._set_lr(self._lr_factor(step))
        self.module.train()
        self.module.traffic()  # type: ignore[operator]  # forgets what an evaluation sent
        self._sent = None
        nll, aux = torch.zeros((2,), device=self.groups.device)
        self._losses = []
        for batch in batches:
            self.progress.at("forward")
            output = self.deepspeed(**self._to_device(batch))
            self._end_pass("forward")
            self.progress.at("backward")
            # NaN or infinity in the loss makes the factor NaN, and so every gradient, whatever the
            # graph does with it; otherwise it is exactly 1. The norm then reports both kinds of
            # failure.
            loss = output.loss.detach().float()
            self._losses.append(loss)
            factor = 1 + 0 * loss
            self.deepspeed.backward(output.loss * factor)
            self._end_pass("backward")
            self.progress.at("optimizer")
            if self.deepspeed.is_gradient_accumulation_boundary():
                norm = self._unsharded_norm() if self.run.zero.stage == 0 else None
            self.deepspeed.step()
            nll += output.nll.float() * factor / self.accumulation
            aux += (loss - output.nll.float()) / self.accumulation
            self.timer.lap("optimizer")
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        self._metrics, self._aux = None, aux
        self._count(norm)
        if not self.skipped:
            self.module.balance(self.groups)  # type: ignore[operator]
        self.timer.lap("optimizer")
        return nll, norm

    def _end_pass(self, phase: str) -> None:
        """A lap, with the pass's all-to-alls told apart."""
        found: Exchanged | None = self.module.traffic()  # type: ignore[operator]
        self.timer.lap(phase, found and found.seconds)
        if found:
            self._sent = (self._sent or 0) + found.bytes

    def metrics(self) -> dict[str, Tensor]:
        """The model's, of the last step's last forward pass, with `aux_loss` and `alltoall_bytes`.

        Hundreds of small kernels: worked out when first asked for, or before an evaluation, which
        leaves its own in the module.
        """
        if self._metrics is None:
            self._metrics = {**self.module.metrics(), "aux_loss": self._aux}  # type: ignore[operator]
            if self._sent is not None:
                self._metrics["alltoall_bytes"] = torch.tensor(float(self._sent))
        return self._metrics

    @property
    def skipped(self) -> bool:
        """Whether the last step was not finite and changed nothing."""
        return self.nonfinite_in_row > 0

    def lr(self, step: int) -> float:
        """The scheduled `optim.lr` of the update that follows `step` finished ones."""
        return self.run.optim.lr * self._lr_factor(step)

    def _lr_factor(self, step: int) -> float:
        return lr_factor(step, self.run.steps, self.run.schedule)

    def _set_lr(self, factor: float) -> None:
        for group, own in zip(
            self.deepspeed.optimizer.param_groups, self._hyperparameters, strict=True
        ):
            group["lr"] = own["base_lr"] * factor

    @torch.no_grad()
    def eval_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy (nats) and number of target tokens of this rank's `batch`.

        With context parallelism the mean over its cp ranks is the sum over the batch.
        """
        self.progress.at("evaluation")
        self.metrics()
        self.module.eval()
        loss = self.deepspeed(**self._to_device({**batch, "normalizer": 1.0})).loss
        return loss.double(), (batch["targets"] != -100).sum().to(self.groups.device)

    def weights_are_finite(self) -> bool:
        """Looked at before a checkpoint is written. All ranks call it and get the same answer."""
        bad = any(not bool(torch.isfinite(w).all()) for w in local_weights(self.deepspeed))
        return not any_rank(bad, self.groups.world, self.groups.device)

    def nonfinite_reason(self) -> str:
        """What was wrong with the step just skipped, and where. All ranks call it."""
        here = [i for i, loss in enumerate(self._losses, start=1) if not math.isfinite(loss)]
        found = all_gather_object(here, self.groups.world)
        places = [
            f"rank {rank}, micro-batch {', '.join(map(str, bad))} of {self.accumulation}"
            for rank, bad in enumerate(found)
            if bad
        ]
        if not places:
            return "gradient not finite"
        more = f"; and on {len(places) - 4} more ranks" if len(places) > 4 else ""
        return f"loss not finite on {'; '.join(places[:4])}{more}"

    def _to_device(self, batch: Batch) -> Batch:
        return {
            key: value.to(self.groups.device, non_blocking=True)
            if isinstance(value, Tensor)
            else value
            for key, value in batch.items()
        }

    @torch.no_grad()
    def _unsharded_norm(self) -> Tensor:
        """Norm, clipping and skipping without ZeRO, where DeepSpeed only clips.

        Gradients are reduced by now, so all ranks see the same. Optimizers pass over parameters
        without gradient: removing them skips the step.
        """
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = self._norm_of_pieces(parameters)
        if not math.isfinite(float(norm)):
            for parameter in parameters:
                parameter.grad = None
        elif self.run.optim.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.optim.clip, norm)
        return norm

    def _norm_of_pieces(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of whole gradients, of which the tp and ep ranks hold pieces."""
        square = torch.zeros(3, device=self.groups.device)  # whole here, pieces over tp, over ep
        for p in parameters:
            kind = 2 if is_expert(p) else int(shard_of(p) is not None)
            assert p.grad is not None
            square[kind] += torch.linalg.vector_norm(p.grad, dtype=torch.float32).square()
        all_reduce_sum(square[1], self.groups.tp)
        all_reduce_sum(square[2], self.groups.ep)
        return square.sum().sqrt()

    def _count(self, norm: Tensor | float) -> None:
        if math.isfinite(float(norm)):
            self.nonfinite_in_row = 0
        else:
            self.nonfinite_in_row += 1
            self.nonfinite_total += 1

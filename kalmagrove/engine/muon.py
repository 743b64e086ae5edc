"""Muon for matrices and AdamW for the rest, on whole parameters or on ZeRO's flat partitions.

Made by `build_optimizer`. DeepSpeed's own Muon is not used: it reports the norm of the
orthogonalised update instead of the gradient's, and takes no batches of matrices.
Letters: B batch of matrices, R rows, C columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kalmagrove.parallel import Group, all_reduce_sum


@torch.no_grad()
def newton_schulz(x_BRC: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of every matrix towards 1.

    The quintic iteration of Muon (Keller Jordan, kellerjordan.github.io/posts/muon): singular
    values end in about [0.7, 1.2]. bf16 on GPU, fp32 on CPU.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x_BRC.bfloat16() if x_BRC.is_cuda else x_BRC.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(x_BRC.dtype)


def muon_update(x_BRC: Tensor) -> Tensor:
    """The orthogonalised direction, scaled so that tall and wide matrices move alike."""
    rows, cols = x_BRC.shape[-2:]
    return newton_schulz(x_BRC) * math.sqrt(max(1.0, rows / cols))


@dataclass(frozen=True)
class Shard:
    """What part of a group's parameters, laid end to end, a rank's flat partition holds.

    shapes: of all the group's parameters, in order; each is a batch of matrices [..., R, C].
    size: elements of a partition (the last one ends in padding); rank r holds [r * size, (r + 1) *
    size).
    """

    shapes: tuple[tuple[int, ...], ...]
    size: int
    group: Group

    @property
    def start(self) -> int:
        return self.group.rank * self.size

    def whole(self) -> Iterator[tuple[int, int, int, int]]:
        """(first element in the partition, matrices, R, C) of each run of whole matrices."""
        for offset, count, rows, cols in self._tensors():
            area = rows * cols
            first = max(0, -(-(self.start - offset) // area))
            last = min(count, (self.start + self.size - offset) // area)
            if first < last:
                yield offset + first * area - self.start, last - first, rows, cols

    def split(self) -> Iterator[tuple[int, int, int]]:
        """(first element in the group, R, C) of each matrix cut by a border; equal on all ranks."""
        borders = [rank * self.size for rank in range(1, self.group.size)]
        for offset, count, rows, cols in self._tensors():
            area = rows * cols
            inside = [b - offset for b in borders if offset < b < offset + count * area]
            for index in sorted({b // area for b in inside if b % area}):
                yield offset + index * area, rows, cols

    def _tensors(self) -> Iterator[tuple[int, int, int, int]]:
        offset = 0
        for shape in self.shapes:
            count = math.prod(shape[:-2])
            yield offset, count, shape[-2], shape[-1]
            offset += math.prod(shape)


def sharded_update(flat: Tensor, shard: Shard) -> Tensor:
    """`muon_update` of every matrix that reaches into this rank's partition `flat`, same layout.

    Matrices cut by a partition border are put together by one all-reduce each: at most one a
    border.
    """
    update = torch.zeros_like(flat)
    for first, count, rows, cols in shard.whole():
        here = slice(first, first + count * rows * cols)
        update[here] = muon_update(flat[here].view(count, rows, cols)).flatten()
    for first, rows, cols in shard.split():
        low = max(first, shard.start)
        high = min(first + rows * cols, shard.start + shard.size)
        mine, here = (
            slice(low - first, high - first),
            slice(low - shard.start, high - shard.start),
        )
        matrix = flat.new_zeros(rows * cols)
        if low < high:
            matrix[mine] = flat[here]
        all_reduce_sum(matrix, shard.group)
        if low < high:
            update[here] = muon_update(matrix.view(rows, cols)).flatten()[mine]
    return update


class Muon(torch.optim.Optimizer):
    """Muon on groups with `muon=True`, AdamW (arXiv:1711.05101) on the others.

    Under ZeRO 1 and 2 a group's parameter is one flat partition: tell its layout with `shard`.
    Parameters without gradient are left alone, with their state.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": 0.0, "muon": False})
        self._shards: dict[str, Shard] = {}

    def shard(self, label: str, shard: Shard) -> None:
        self._shards[label] = shard

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not used"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = self._direction(parameter, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"])

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if not group["muon"]:
            return _adam_direction(grad, state, group["betas"], group["eps"])
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(momentum, group["momentum"])
        shard = self._shards.get(group["label"])
        return muon_update(nesterov) if shard is None else sharded_update(nesterov, shard)


def _adam_direction(
    grad: Tensor, state: dict[str, Tensor], betas: tuple[float, float], eps: float
) -> Tensor:
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(grad)
        state["exp_avg_sq"] = torch.zeros_like(grad)
    state["step"] += 1
    state["exp_avg"].lerp_(grad, 1 - betas[0])
    state["exp_avg_sq"].lerp_(grad.square(), 1 - betas[1])
    step = float(state["step"])
    mean = state["exp_avg"] / (1 - betas[0] ** step)
    scale = (state["exp_avg_sq"] / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return mean.div_(scale)

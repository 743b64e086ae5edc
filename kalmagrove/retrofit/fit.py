"""Warm start: fit a KAN feed-forward to what the replaced MLP does, by ridge least squares.

Called on calibration activations before training. The last map of every family is linear in its
coefficients and is solved for, in fp64; first layers, weights of a sum and squashes stay as they
are. Families side by side are solved jointly; in a sequence each member is fitted to what those
before it leave.
Letters: N rows, I inputs, J outputs, P coefficients of one edge, X coefficients of one output.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kalmagrove.config.errors import ConfigError, DataError
from kalmagrove.retrofit.feedforward import (
    SIGMAS,
    FamilyFeedForward,
    FeedForward,
    KANLinear,
    ParallelFeedForward,
)

Batches = Iterable[tuple[Tensor, Tensor]]
Stage = list[tuple[KANLinear, float]]  # maps solved for jointly, each with its weight in the output


@dataclass(frozen=True)
class FitReport:
    """1 - (squared error) / (variance), over all outputs of the rows that were held out."""

    r2_before: float
    r2_after: float
    rows: int  # fitted on
    held_out_rows: int


class RowBatches:
    """Tensors x [N, I] and y [N, J] as batches of `rows` rows, as often as asked for."""

    def __init__(self, x_NI: Tensor, y_NJ: Tensor, rows: int = 4096) -> None:
        if len(x_NI) != len(y_NJ):
            raise ValueError(f"x has {len(x_NI)} rows, y has {len(y_NJ)}: they must be as many")
        self.x_NI, self.y_NJ, self.rows = x_NI, y_NJ, rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x_NI.split(self.rows), self.y_NJ.split(self.rows), strict=True)


@torch.no_grad()
def fit(
    module: FeedForward, batches: Batches, *, held_out: float = 0.1, ridge: float = 1e-6
) -> FitReport:
    """Fit the module in place; nothing changes if an error is raised.

    One pass over the data for each stage (one, and one more for each correction of a sequence) and
    three to check and measure; memory does not grow with N. The fitted maps start from 0.

    Args:
        batches: pairs x [..., I] and y [..., J] of the replaced MLP; iterated several times
            (`RowBatches` for tensors).
        held_out: share of the rows, every n-th, that the fit does not see.
        ridge: added to the diagonal of the normal equations, relative to its mean.
    Raises:
        ConfigError: the rows are fewer than the coefficients of one output, or none is held out.
        DataError: a value is not finite.
        ValueError: the batches can be iterated once only, or have other widths than the module.
    """
    if iter(batches) is batches:
        raise ValueError("batches must be iterable again: give a list or RowBatches, no iterator")
    if not 0 < held_out <= 0.5:
        raise ConfigError("held_out", held_out, "must be above 0 and at most 0.5", "try 0.1")
    stages = _stages(module, 1.0)
    data = _Rows(module, batches, round(1 / held_out))
    rows, held_out_rows = data.count()
    need = max(sum(_features(leaf) for leaf, _ in stage) for stage in stages)
    if rows < need or not held_out_rows:
        rule = f"rows to fit on must be at least the {need} coefficients of one output"
        raise ConfigError("calibration", rows, rule, "give more rows or fewer functions")
    leaves = [leaf for stage in stages for leaf, _ in stage]
    old = [[p.clone() for p in _linear(leaf)] for leaf in leaves]
    before = data.r2()
    try:
        for leaf in leaves:
            for p in _linear(leaf):
                p.zero_()
        for stage in stages:
            _solve(stage, data, ridge)
        after = data.r2()
    except BaseException:
        for leaf, values in zip(leaves, old, strict=True):
            for p, value in zip(_linear(leaf), values, strict=True):
                p.copy_(value)
        raise
    return FitReport(before, after, rows, held_out_rows)


@torch.no_grad()
def calibrate(module: FeedForward, x: Tensor) -> None:
    """Set every affine squash so that its inputs' mean is 0 and SIGMAS standard deviations are 1.

    For inputs that are not ~ N(0, 1), before `fit`. Corrections of a sequence see what the members
    before them give now; a channel that does not vary keeps the scale it has.

    Args:
        x: [..., I], a sample of inputs.
    """
    hooks = [
        part.register_forward_pre_hook(_centre_inputs)
        for part in module.modules()
        if isinstance(part, KANLinear) and part.scale is not None
    ]
    try:
        module(x.to(next(module.parameters())))
    finally:
        for hook in hooks:
            hook.remove()


def _centre_inputs(part: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert isinstance(part, KANLinear)
    assert part.scale is not None
    assert part.shift is not None
    x_NI = inputs[0].flatten(0, -2).double()
    std_I, mean_I = x_NI.std(0, correction=0), x_NI.mean(0)
    scale_I = torch.where(std_I > 0, 1 / (SIGMAS * std_I), part.scale.double())
    part.scale.copy_(scale_I)
    part.shift.copy_(-mean_I * scale_I)


class _Rows:
    """The calibration rows in two parts: every `every`-th is held out."""

    def __init__(self, module: FeedForward, batches: Batches, every: int) -> None:
        self.module, self.batches, self.every = module, batches, every
        weight = next(module.parameters())
        self.device = weight.device
        # The kernels of the fused op know no fp64.
        maps = [m for m in module.modules() if isinstance(m, KANLinear)]
        narrow = any(m.fused and m.backend != "reference" for m in maps)
        self.dtype = torch.float32 if narrow else torch.float64

    def part(self, held_out: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """x [N, I] and y [N, J] of one part, in the dtype of the fit."""
        start = 0
        for x, y in self.batches:
            x_NI, y_NJ = x.flatten(0, -2), y.flatten(0, -2)
            place_N = torch.arange(start, start + len(x_NI)) % self.every
            start += len(x_NI)
            keep_N = (place_N == self.every - 1) == held_out
            yield tuple(t[keep_N.to(t.device)].to(self.device, self.dtype) for t in (x_NI, y_NJ))  # type: ignore[misc]

    def count(self) -> tuple[int, int]:
        """Rows to fit on and rows held out, after a look at all of them."""
        widths = self.module.inputs, self.module.outputs
        total = 0
        for number, (x, y) in enumerate(self.batches):
            if (x.shape[-1], y.shape[-1]) != widths or x.shape[:-1] != y.shape[:-1]:
                raise ValueError(
                    f"batch {number} is {tuple(x.shape)} -> {tuple(y.shape)}: the module maps "
                    f"[..., {widths[0]}] -> [..., {widths[1]}]"
                )
            for name, value in (("inputs", x), ("targets", y)):
                if not value.isfinite().all():
                    raise DataError(
                        f"calibration {name} of batch {number} are not all finite; "
                        "leave those rows out, or run the model in a wider type"
                    )
            total += x.shape[:-1].numel()
        return total - total // self.every, total // self.every

    def r2(self) -> float:
        """Of the rows held out."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        error, square, rows = zero, zero, 0
        mean_J: Tensor | None = None
        for x_NI, y_NJ in self.part(held_out=True):
            if not len(x_NI):
                continue
            error = error + (self.module(x_NI) - y_NJ).double().square().sum()
            # Chan's update of the sum of squares around the mean.
            y_NJ, count = y_NJ.double(), len(y_NJ)
            own_J = y_NJ.mean(0)
            shift_J = own_J if mean_J is None else own_J - mean_J
            weight = count * rows / (count + rows)
            square = square + (y_NJ - own_J).square().sum() + weight * shift_J.square().sum()
            mean_J = own_J if mean_J is None else mean_J + shift_J * (count / (count + rows))
            rows += count
        return float(1 - error / square.clamp(min=1e-300))


def _solve(stage: Stage, data: _Rows, ridge: float) -> None:
    """Coefficients of a stage whose maps, and those of later stages, are 0."""
    # One bias of the stage has the constant: several would be the same column.
    biased = next((leaf for leaf, gain in stage if leaf.bias is not None and gain), None)
    size = sum(leaf.config.terms * leaf.inputs for leaf, _ in stage) + (biased is not None)
    gram_XX = torch.zeros(size, size, dtype=torch.float64, device=data.device)
    rhs_XJ = gram_XX.new_zeros(size, data.module.outputs)
    for x_NI, y_NJ in data.part(held_out=False):
        with _Inputs(stage) as seen:
            left_NJ = (y_NJ - data.module(x_NI)).double()
        design = [gain * leaf.expand(h).flatten(1) for (leaf, gain), h in seen.pairs()]
        if biased is not None:
            design.append(x_NI.new_ones(len(x_NI), 1))
        design_NX = torch.cat(design, dim=1).double()
        gram_XX += design_NX.t() @ design_NX
        rhs_XJ += design_NX.t() @ left_NJ
    fitted_XJ = _ridge(gram_XX, rhs_XJ, ridge, int(biased is not None))
    start = 0
    for leaf, _ in stage:
        size = leaf.config.terms * leaf.inputs
        fitted_PIJ = fitted_XJ[start : start + size].view(leaf.config.terms, leaf.inputs, -1)
        leaf.coef.copy_(fitted_PIJ.transpose(1, 2))
        start += size
    if biased is not None and biased.bias is not None:
        gain = next(gain for leaf, gain in stage if leaf is biased)
        biased.bias.copy_(fitted_XJ[-1] / gain)


def _ridge(gram_XX: Tensor, rhs_XJ: Tensor, ridge: float, free: int) -> Tensor:
    """Solve with the diagonal raised, but for the last `free` columns."""
    diagonal = gram_XX.diagonal()
    more = torch.full_like(diagonal, ridge * float(diagonal.mean().clamp(min=1e-300)))
    more[len(more) - free :] = 0
    factor, info = torch.linalg.cholesky_ex(gram_XX + more.diag())
    if info:
        rule = "is too small for these rows: the normal equations are singular"
        raise ConfigError("ridge", ridge, rule, "try 1e-4")
    return torch.cholesky_solve(rhs_XJ, factor)


class _Inputs:
    """Keeps what the maps of a stage are given while this is open."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seen: dict[KANLinear, Tensor] = {}

    def __enter__(self) -> "_Inputs":
        self.hooks = [leaf.register_forward_pre_hook(self._keep) for leaf, _ in self.stage]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, leaf: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen[cast(KANLinear, leaf)] = inputs[0]

    def pairs(self) -> list[tuple[tuple[KANLinear, float], Tensor]]:
        return [((leaf, gain), self.seen[leaf]) for leaf, gain in self.stage]


def _stages(module: FeedForward, gain: float) -> list[Stage]:
    """What can be solved jointly, in order: the maps of a stage are linear in the output as long as
    those of later stages are 0.
    """
    if isinstance(module, FamilyFeedForward):
        return [[(module.last, gain)]]
    members = cast("list[FeedForward]", list(module.members))
    if not isinstance(module, ParallelFeedForward):
        return [stage for member in members for stage in _stages(member, gain)]
    gains = [1.0] * len(members) if module.weight is None else module.weight.tolist()
    parts = [_stages(member, gain * own) for member, own in zip(members, gains, strict=True)]
    joint = [pair for part in parts for pair in part[0]]
    return [joint, *(stage for part in parts for stage in part[1:])]


def _features(leaf: KANLinear) -> int:
    return leaf.config.terms * leaf.inputs + leaf.config.has_bias


def _linear(leaf: KANLinear) -> list[Tensor]:
    """The parameters that are solved for."""
    return [leaf.coef] if leaf.bias is None else [leaf.coef, leaf.bias]

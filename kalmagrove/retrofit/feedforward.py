"""KAN feed-forwards that take the place of a pretrained model's MLP.

Built from `kalmagrove.config.retrofit`, started from data by `kalmagrove.retrofit.fit`.
Letters: N tokens, I inputs, J outputs, H hidden, D model, P coefficients of one edge, Q degree of a
denominator, S points of a quadrature.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.config.retrofit import (
    WITHOUT_CONSTANT,
    KANFamily,
    KANFeedForward,
    KANParallel,
    KANSequence,
)
from kalmagrove.nn.common import wide
from kalmagrove.nn.edge import normal_quantiles
from kalmagrove_kernels.edge.basis import BASES, Rational
from kalmagrove_kernels.polynomial import BACKENDS, polynomial
from kalmagrove_kernels.polynomial import BASES as FUSED
from kalmagrove_kernels.polynomial.reference import expand

SIGMAS = 3.0  # an affine squash starts with so many standard deviations of N(0, 1) in range
POINTS = 4096  # of a quadrature; a rational map, whose inputs differ, takes the fewer ones
FEW_POINTS = 256


def build_feedforward(
    config: KANFeedForward,
    width: int,
    *,
    out_std: float = 0.02,
    backend: str = "reference",
) -> "FeedForward":
    """A feed-forward [..., D] -> [..., D], initialised.

    Args:
        width: D.
        out_std: of the output at the start, for inputs ~ N(0, 1). The default adds little to the
            residual stream; give the std of the replaced MLP's output to match it.
        backend: of the bases that `kalmagrove_kernels.polynomial` has; others are plain PyTorch.
    Raises:
        ConfigError: the width does not split over the members.
        KeyError: there is no such backend.
    """
    module = make(config, width, width, backend)
    module.init_weights(out_std)
    return module


def make(config: KANFeedForward, inputs: int, outputs: int, backend: str) -> "FeedForward":
    """The module of any kind; call its `init_weights` before use."""
    if isinstance(config, KANParallel):
        return ParallelFeedForward(inputs, outputs, config, backend)
    if isinstance(config, KANSequence):
        return SequenceFeedForward(inputs, outputs, config, backend)
    return FamilyFeedForward(inputs, outputs, config, backend)


class KANLinear(nn.Module):
    """One function an edge: y_j = b_j + sum_i sum_p c_pji B_p(s(x_i)), [..., I] -> [..., J].

    Parameters: `coef` [P, J, I]; `bias` [J] (form redundancy_free); `scale` and `shift` [I] (squash
    affine); `lower` [Q, I] (basis rational). A rational edge has a denominator for each input,
    shared by all outputs, so that the map stays linear in `coef`:

        y_j = b_j + sum_i sum_p c_pji u_i^p / (1 + |sum_q d_qi u_i^q|),   u = s(x), q = 1..Q.

    `metrics` of the last forward pass: "out_of_range", the share of inputs with |s(x)| > 1; none
    with tanh.
    """

    def __init__(
        self, inputs: int, outputs: int, config: KANFamily, backend: str = "reference"
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
        self.inputs, self.outputs, self.config, self.backend = inputs, outputs, config, backend
        self.fused = config.basis in FUSED
        self.coef = _parameter(config.terms, outputs, inputs, kind="matrix")
        self.bias = _parameter(outputs, kind="bias") if config.has_bias else None
        affine, rational = config.squash == "affine", config.basis == "rational"
        self.scale = _parameter(inputs, kind="norm") if affine else None
        self.shift = _parameter(inputs, kind="bias") if affine else None
        self.lower = _parameter(config.degree, inputs, kind="spline") if rational else None
        self.metrics: dict[str, Tensor] = {}

    @torch.no_grad()
    def init_weights(self, out_std: float = 1.0, points_S: Tensor | None = None) -> None:
        """Outputs of variance out_std^2, for independent inputs that are each like `points_S`.

        All coefficients have one variance, by the variances of the functions under the points. Then
        each edge's mean is taken off: by the bias, by a constant of the basis, or (article form of
        rbf and rational, which have none) by projecting its coefficients. Outputs have mean 0.

        Args:
            points_S: of equal probability; N(0, 1) if not given.
        """
        if self.coef.is_meta:  # a checkpoint is about to be read
            return
        if self.scale is not None and self.shift is not None:
            self.scale.fill_(1 / SIGMAS)
            self.shift.zero_()
        if self.lower is not None:
            self.lower.normal_(0, Rational.nonlinear_std)
        if points_S is None:
            points_S = normal_quantiles(POINTS if self.lower is None else FEW_POINTS)
        # Before training only denominators tell one input from another.
        columns = 1 if self.lower is None else self.inputs
        x_SI = points_S.to(self.coef.device)[:, None].expand(-1, columns)
        terms_SPI = self.expand(x_SI, columns)
        mean_PI = terms_SPI.mean(0)
        off_PI = F.normalize(mean_PI, dim=0)
        if self._constant:
            terms_SPI = terms_SPI - mean_PI
        else:
            terms_SPI = terms_SPI - (terms_SPI * off_PI).sum(1, keepdim=True) * off_PI
        energy = float(terms_SPI.square().mean((0, 2)).sum()) * self.inputs
        self.coef.normal_(0, out_std / math.sqrt(energy))
        if self._constant:
            self._take_off((self.coef * mean_PI[:, None].to(self.coef.dtype)).sum(0))
        else:
            off_PJI = off_PI[:, None].to(self.coef.dtype)
            self.coef.sub_((self.coef * off_PJI).sum(0) * off_PJI)

    @property
    def _constant(self) -> bool:
        """Whether the map can add a constant to its outputs."""
        return self.config.has_bias or self.config.basis not in WITHOUT_CONSTANT

    def _take_off(self, mean_JI: Tensor) -> None:
        """Subtract a constant from each edge."""
        if self.bias is not None:
            self.bias.copy_(-mean_JI.sum(1))
        elif self.fused:
            self.coef[0] -= mean_JI
        else:  # B-splines sum to 1
            self.coef.sub_(mean_JI)

    def forward(self, x: Tensor) -> Tensor:
        """[..., J] in the dtype of x."""
        x_NI = x.reshape(-1, self.inputs)
        self._observe(x_NI)
        coef_PJI = self.coef.to(x.dtype)
        bias_J = None if self.bias is None else self.bias.to(x.dtype)
        if self.fused:
            if self.config.dropped:
                coef_PJI = F.pad(coef_PJI, (0, 0, 0, 0, 1, 0))
            y_NJ = polynomial(
                x_NI,
                coef_PJI,
                bias_J,
                basis=self.config.basis,
                squash=self.config.squash,
                scale_I=self.scale,
                shift_I=self.shift,
                backend=self.backend,
            )
        else:
            terms_NX = self.expand(x_NI).flatten(1).to(x.dtype)
            y_NJ = F.linear(terms_NX, coef_PJI.transpose(0, 1).flatten(1), bias_J)
        return y_NJ.view(*x.shape[:-1], self.outputs)

    def expand(self, x_NI: Tensor, columns: int | None = None) -> Tensor:
        """The functions that have coefficients, [N, P, I], in fp32 at least.

        columns: x has only the first so many inputs.
        """
        config, x_NI = self.config, wide(x_NI)
        scale, shift = (
            t if t is None else t[:columns].to(x_NI.dtype) for t in (self.scale, self.shift)
        )
        if self.fused:
            size, basis, squash = config.functions, config.basis, config.squash
            terms = expand(x_NI, size, basis=basis, squash=squash, scale_I=scale, shift_I=shift)
            return torch.stack(list(terms)[config.dropped :], dim=1)
        if config.squash == "tanh":
            x_NI = x_NI.tanh()
        elif scale is not None and shift is not None:
            x_NI = x_NI * scale + shift
        lower_IX = None
        if self.lower is not None:  # the table has numerators, not used here, before them
            lower_QI = self.lower[:, :columns].to(x_NI.dtype)
            lower_IX = F.pad(lower_QI.t(), (config.functions, 0))
        span_2 = torch.tensor([-1.0, 1.0], dtype=x_NI.dtype, device=x_NI.device)
        basis_of = BASES[config.basis](config.degree, config.grid)
        terms_NIP = basis_of.evaluate(x_NI.clamp(-1, 1), span_2, lower_IX)
        return terms_NIP[..., config.dropped :].transpose(1, 2)

    @torch.no_grad()
    def _observe(self, x_NI: Tensor) -> None:
        if self.config.squash == "tanh":
            return
        if self.scale is not None and self.shift is not None:
            x_NI = x_NI * self.scale.to(x_NI.dtype) + self.shift.to(x_NI.dtype)
        self.metrics = {"out_of_range": (x_NI.abs() > 1).float().mean()}

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{self.inputs} -> {self.outputs}, {c.basis}, degree={c.degree}, grid={c.grid}, "
            f"form={c.form}, squash={c.squash}"
        )


class FamilyFeedForward(nn.Module):
    """y = last(h), with h = x (one), first(x) (two) or first(x) * gate(x) (gated)."""

    def __init__(
        self, inputs: int, outputs: int, config: KANFamily, backend: str = "reference"
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.config = inputs, outputs, config
        inner = inputs if config.layers == "one" else config.hidden

        def into_hidden() -> KANLinear:
            return KANLinear(inputs, inner, config, backend)

        self.first = None if config.layers == "one" else into_hidden()
        self.gate = into_hidden() if config.layers == "gated" else None
        self.last = KANLinear(inner, outputs, config, backend)

    def init_weights(self, out_std: float = 1.0) -> None:
        """Outputs ~ out_std for inputs ~ N(0, 1); the hidden values have variance 1."""
        points_S = None
        if self.first is not None:
            self.first.init_weights()
        if self.gate is not None:  # h is then the product of two normal variables
            self.gate.init_weights()
            rational = self.config.basis == "rational"
            side = normal_quantiles(math.isqrt(FEW_POINTS if rational else POINTS))
            side = side / side.square().mean().sqrt()
            points_S = torch.outer(side, side).flatten()
        self.last.init_weights(out_std, points_S)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., J] in the dtype of x."""
        h = x if self.first is None else self.first(x)
        if self.gate is not None:
            h = h * self.gate(x)
        y: Tensor = self.last(h)
        return y

    @property
    def metrics(self) -> dict[str, Tensor]:
        return _share([self.first, self.gate, self.last])


class ParallelFeedForward(nn.Module):
    """The sum of its members' outputs; see `KANParallel`. Parameter `weight` [n] with "sum"."""

    def __init__(
        self, inputs: int, outputs: int, config: KANParallel, backend: str = "reference"
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.config = inputs, outputs, config
        self.shares = config.shares(inputs)
        self.members = nn.ModuleList(
            make(member, share, outputs, backend)
            for member, share in zip(config.members, self.shares, strict=True)
        )
        summed = config.combine == "sum"
        self.weight = _parameter(len(self.members), kind="norm") if summed else None

    @torch.no_grad()
    def init_weights(self, out_std: float = 1.0) -> None:
        """Members have equal parts in an output ~ out_std; weights are 1/n."""
        count = len(self.members)
        if self.weight is not None:
            self.weight.fill_(1 / count)
        part = out_std * math.sqrt(count) / (1 if self.weight is not None else count)
        for member in self.members:
            member.init_weights(part)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., J] in the dtype of x."""
        y = x.new_zeros(*x.shape[:-1], self.outputs)
        if self.weight is None:
            for member, part in zip(self.members, x.split(self.shares, dim=-1), strict=True):
                y = y + member(part)
            return y
        for member, weight in zip(self.members, self.weight.to(x.dtype), strict=True):
            y = y + weight * member(x)
        return y

    @property
    def metrics(self) -> dict[str, Tensor]:
        return _share(self.members)


class SequenceFeedForward(nn.Module):
    """y_1 = f_1(x), y_k = y_{k-1} + f_k(y_{k-1}); f_1: I -> J, the others J -> J."""

    def __init__(
        self, inputs: int, outputs: int, config: KANSequence, backend: str = "reference"
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.config = inputs, outputs, config
        self.members = nn.ModuleList(
            make(member, outputs if k else inputs, outputs, backend)
            for k, member in enumerate(config.members)
        )

    def init_weights(self, out_std: float = 1.0) -> None:
        """The first member has all of the output; corrections are 0 at the start."""
        for k, member in enumerate(self.members):
            member.init_weights(0.0 if k else out_std)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., J] in the dtype of x."""
        first, *corrections = self.members
        y: Tensor = first(x)
        for correct in corrections:
            y = y + correct(y)
        return y

    @property
    def metrics(self) -> dict[str, Tensor]:
        return _share(self.members)


FeedForward = FamilyFeedForward | ParallelFeedForward | SequenceFeedForward


def _share(parts: "list[KANLinear | None] | nn.ModuleList") -> dict[str, Tensor]:
    """The mean of each metric over the parts that have it."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        metrics: dict[str, Tensor] = {} if part is None else part.metrics  # type: ignore[assignment]
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values).mean() for name, values in found.items()}


def _parameter(*shape: int, kind: str) -> nn.Parameter:
    """A zero parameter with the kind the optimizer goes by."""
    p = nn.Parameter(torch.zeros(shape))
    p.kind = kind  # type: ignore[attr-defined]
    return p

"""Edge functions phi_m: a base term plus a learnable univariate basis (KalmaGrove paper, section
3.1).

The first step of a KAN layer (`kalmagrove.nn.kan`): E = phi(h). `refit` moves the grid to the data.
Letters: N tokens, M edges, P basis functions, L those the function is linear in, S samples.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kalmagrove.config import Edge
from kalmagrove.nn.common import wide
from kalmagrove.nn.precision import Fp32Buffers
from kalmagrove.parallel import Shard, normal_, parameter
from kalmagrove_kernels.edge import BASES as BASE_FUNCTIONS
from kalmagrove_kernels.edge import Kept, edge_topk
from kalmagrove_kernels.edge.basis import BASES, Basis

REFIT_ROWS = 1024  # rows of pre-activations whose basis values are held at once
REFIT_PRIOR = 1e-3  # weight of the old function where no data lies, relative to the data
MIN_SHRINK = 0.1  # a refit keeps at least this share of the old range's width


def make_basis(edge: Edge) -> Basis:
    return BASES[edge.basis](edge.degree, edge.grid)


def normal_quantiles(count: int = 4096) -> Tensor:
    """`count` points of equal probability under N(0, 1), fp64: expectations become means."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


class EdgeActivation(Fp32Buffers):
    """phi_m(h) = scale_m * base(h) + sum_p c_mp B_p(h) for M edges, or for several groves of M
    edges.

    Parameters `coef` [M, P] and `scale` [M] (none with base=none), kind "spline"; buffer `range`
    [2], fp32, the interval the basis is made for. With `groves` all have a leading dimension, of
    which this rank holds the piece `groves`, and `forward` and `refit` take the grove's number in
    it. Computes in fp32 at least, whatever the parameters' type. Call `init_weights` before use.

    through: what the parameters pass before each use; see `TensorParallel.stream`.
    watch: called with the pre-activations [..., M] and the grove's number of each use, if set.
    """

    range: Tensor
    watch: Callable[[Tensor, int | None], None] | None = None

    def __init__(
        self,
        edges: int,
        edge: Edge,
        groves: Shard | None = None,
        backend: str = "reference",
        through: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> None:
        super().__init__()
        self.config, self.backend, self.through = edge, backend, through
        self.basis = make_basis(edge)
        lead = () if groves is None else (groves.whole,)
        self.coef = parameter(*lead, edges, self.basis.size, kind="spline", shard=groves)
        self.scale = (
            None if edge.base == "none" else parameter(*lead, edges, kind="spline", shard=groves)
        )
        span = torch.tensor(edge.range, dtype=torch.float32)
        self.register_buffer("range", span.expand(*self.coef.shape[:-2], 2).clone())
        self.buffer_shards = {} if groves is None else {"range": groves}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start near the base: scale 1, and a random basis part of rms `init_scale` times the
        base's.

        Both under h ~ N(0, 1), which is how the layer initialises W_e. With base=none the basis is
        fitted to the SiLU and perturbed by the same amount.
        """
        h_S = normal_quantiles()
        span = torch.tensor(self.config.range, dtype=torch.float64)
        values_SL = self.basis.evaluate(h_S, span)
        target_S = BASE_FUNCTIONS[self.config.base if self.scale is not None else "silu"](h_S)
        rms = target_S.square().mean().sqrt()
        std = self.config.init_scale * rms / values_SL.square().sum(-1).mean().sqrt()
        linear = self.basis.linear_size
        normal_(self.coef, float(std), part=slice(linear))
        if self.scale is not None:
            self.scale.fill_(1.0)
        else:
            fit_L = _ridge(*_normal_equations(values_SL, target_S))
            self.coef[..., :linear] += fit_L.to(self.coef)
        if linear < self.basis.size:
            normal_(self.coef, self.basis.nonlinear_std, part=slice(linear, None))

    def span(self, grove: int | None = None) -> Tensor:
        """The range [2] of a grove, or of the one layer: a view of the buffer."""
        return self.range if grove is None else self.range[grove]

    def forward(self, h_NM: Tensor, grove: int | None = None) -> Tensor:
        """E = phi(h) [..., M], fp32 (fp64 if h is)."""
        if self.watch is not None:
            self.watch(h_NM, grove)
        h_NM, range_2 = wide(h_NM), self.span(grove)
        coef_MP = self._own(self.coef, grove).to(h_NM.dtype)
        value_NM = self.basis.phi(h_NM, coef_MP, range_2)
        if self.scale is None:
            return value_NM
        scale_M = self._own(self.scale, grove).to(h_NM.dtype)
        return value_NM + scale_M * BASE_FUNCTIONS[self.config.base](h_NM)

    def topk(
        self, h_NM: Tensor, k: int, grove: int | None = None, group_N: Tensor | None = None
    ) -> Kept:
        """The k largest |phi(h)| of each row, as `kalmagrove_kernels.edge.edge_topk` gives them.

        Args:
            grove: all rows are of this one; then indices are its edges'.
            group_N: int32, the grove of each row, sorted; then they are grove * M + edge.
        """
        if self.watch is not None and group_N is None:
            self.watch(h_NM, grove)
        elif self.watch is not None and group_N is not None:
            for number in group_N.unique().tolist():
                self.watch(h_NM[group_N == number], number)
        scale = None if self.scale is None else self._own(self.scale, grove)
        return edge_topk(
            h_NM,
            self._own(self.coef, grove),
            scale,
            self.span(grove),
            k,
            basis=self.config.basis,
            degree=self.basis.degree,
            grid=self.basis.grid,
            base=self.config.base,
            group_N=group_N,
            backend=self.backend,
        )

    def _own(self, parameter: Tensor, grove: int | None) -> Tensor:
        parameter = self.through(parameter)
        return parameter if grove is None else parameter[grove]

    @torch.no_grad()
    def outside(self, h_NM: Tensor, grove: int | None = None) -> Tensor:
        """How many of the pre-activations lie outside the range: fp32 scalar."""
        low, high = self.span(grove)
        return ((h_NM < low) | (h_NM > high)).sum().float()

    @torch.no_grad()
    def refit(
        self,
        h_NM: Tensor,
        grove: int | None = None,
        coverage: float = 0.999,
        coef: Tensor | None = None,
    ) -> Tensor:
        """Move the range to the pre-activations and refit the coefficients to the same functions.

        The new range holds the share `coverage` of all of h, with a margin of 5%; it never shrinks
        below a tenth of the old one. Per edge, a least-squares fit in fp64 of the old basis part on
        the data, plus the old function on an even grid with a small weight and a small ridge: so it
        is well posed for a single or repeated point, and nothing is forgotten where no data lies.
        A rational function keeps its denominator and refits its numerator.

        Args:
            h_NM: pre-activations [..., M] of this layer (or of grove `grove`).
            coef: refitted in place of the parameter `coef`: an optimizer's wider copy of it.
        Returns:
            fp64 scalar, the rms difference between the new and the old phi on the data.
        Raises:
            ValueError: no row of h is finite, or the result is not; then nothing has changed.
        """
        h_NM = h_NM.detach().reshape(-1, h_NM.shape[-1]).double()
        h_NM = h_NM[h_NM.isfinite().all(-1)]
        if not len(h_NM):
            raise ValueError("refit needs at least one row of finite pre-activations")
        coef = self.coef if coef is None else coef
        coef, range_2 = coef if grove is None else coef[grove], self.span(grove)
        coef_MP, old_2 = coef.double(), range_2.double()
        new_2 = _new_range(h_NM, old_2, coverage)
        fitted_MP = self._fit(h_NM, coef_MP, old_2, new_2)
        old_NM = self.basis.phi(h_NM, coef_MP, old_2)
        error = (self.basis.phi(h_NM, fitted_MP, new_2) - old_NM).square().mean().sqrt()
        low, high = new_2.to(range_2.dtype)
        written = torch.cat([fitted_MP.to(coef.dtype).flatten(), low[None], high[None]])
        if not (written.isfinite().all() and low < high):
            raise ValueError("the refit gives no finite coefficients and range")
        coef.copy_(fitted_MP)
        range_2.copy_(new_2)
        return error

    def _fit(self, h_NM: Tensor, coef_MP: Tensor, old_2: Tensor, new_2: Tensor) -> Tensor:
        """Coefficients [M, P] that say on `new_2` what `coef_MP` said on `old_2`."""
        ticks = torch.linspace(0, 1, 8 * self.basis.size, dtype=h_NM.dtype, device=h_NM.device)
        grid_SM = (new_2[0] + (new_2[1] - new_2[0]) * ticks).unsqueeze(1).expand(-1, len(coef_MP))
        gram, rhs = _normal_equations(
            self.basis.evaluate(grid_SM, new_2, coef_MP), self.basis.phi(grid_SM, coef_MP, old_2)
        )
        gram, rhs = REFIT_PRIOR * gram, REFIT_PRIOR * rhs
        for rows in h_NM.split(REFIT_ROWS):
            values_SML = self.basis.evaluate(rows, new_2, coef_MP)
            more_gram, more_rhs = _normal_equations(
                values_SML, self.basis.phi(rows, coef_MP, old_2)
            )
            share = len(rows) / len(h_NM)
            gram, rhs = gram + share * more_gram, rhs + share * more_rhs
        fitted_MP = coef_MP.clone()
        fitted_MP[:, : self.basis.linear_size] = _ridge(gram, rhs)
        return fitted_MP


def _normal_equations(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Means over S of B B^T [..., L, L] and B f [..., L], for B [S, ..., L] and f [S, ...]."""
    gram = torch.einsum("s...i,s...j->...ij", values, values) / len(values)
    return gram, torch.einsum("s...i,s...->...i", values, target) / len(values)


def _ridge(gram: Tensor, rhs: Tensor) -> Tensor:
    """Solve with a ridge of 1e-10 of the largest diagonal entry: unique for any rank."""
    size = gram.shape[-1]
    ridge = 1e-10 * gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge[..., None, None] * eye, rhs)


def _new_range(h_NM: Tensor, old_2: Tensor, coverage: float) -> Tensor:
    """[2], the quantiles of all of h around the share `coverage`, widened; see `refit`."""
    sorted_X = h_NM.flatten().sort().values
    outside = math.floor((1 - coverage) / 2 * (len(sorted_X) - 1))
    low, high = sorted_X[outside], sorted_X[len(sorted_X) - 1 - outside]
    half = torch.maximum(1.05 * (high - low), MIN_SHRINK * (old_2[1] - old_2[0])) / 2
    middle = (low + high) / 2
    return torch.stack([middle - half, middle + half])

"""The edge activation op: a per-edge B-spline beside a shared base function.

Called by `kalmagrove.nn.edge` on the pre-activations of a KAN layer; `reference` is the
specification.
"""

from torch import Tensor

from kalmagrove_kernels.edge import reference
from kalmagrove_kernels.edge.reference import BASES, bspline, bspline_bases

BACKENDS = {"reference": reference.edge_activation}

__all__ = ["BACKENDS", "BASES", "bspline", "bspline_bases", "edge_activation"]


def edge_activation(
    h_NM: Tensor,
    coef_MP: Tensor,
    scale_M: Tensor | None,
    range_2: Tensor,
    *,
    degree: int,
    base: str = "silu",
    backend: str = "reference",
) -> Tensor:
    """phi_m(h) = scale_m * base(h) + sum_p coef_mp B_p(h), differentiable in h, coef and scale.

    Args:
        h_NM: pre-activations [..., M], fp32 or fp64 (the caller widens).
        coef_MP: [M, P] with P = grid + degree.
        scale_M: [M], or None without a base term.
        range_2: the ends of the grid; see `reference.bspline` for what happens outside.
        base: a key of `BASES`, unused when `scale_M` is None.
        backend: a key of `BACKENDS`.
    Returns:
        [..., M] in the dtype of h.
    Raises:
        KeyError: the backend is not built.
    """
    return BACKENDS[backend](h_NM, coef_MP, scale_M, range_2, degree=degree, base=base)

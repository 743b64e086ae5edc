"""The basis projection op: a weighted sum of low-rank maps, of which each token uses a few.

Called by `kalmagrove.nn.kan` after manifold routing; `reference` is the specification.
"""

from torch import Tensor

from kalmagrove_kernels.projection import reference
from kalmagrove_kernels.projection.reference import dense_masked, gathered, sorted_by_edge

BACKENDS = {"reference": reference.basis_projection}

__all__ = ["BACKENDS", "basis_projection", "dense_masked", "gathered", "sorted_by_edge"]


def basis_projection(
    x_ND: Tensor,
    kept_NK: Tensor,
    index_NK: Tensor,
    v_MRD: Tensor,
    u_MRD: Tensor,
    *,
    inner_silu: bool,
    backend: str = "reference",
) -> Tensor:
    """y = sum over the kept edges i of U_i^T (M_i * act(V_i x)), act the SiLU or the identity.

    Differentiable in x, kept, v and u (KalmaGrove paper, section 3.1, "Basis projection").

    Args:
        x_ND: tokens [N, D].
        kept_NK: the values M_i of the kept edges [N, K], in the dtype of x.
        index_NK: their edge numbers, int64 [N, K], without repetition in a row.
        v_MRD, u_MRD: [M, R, D].
        backend: a key of `BACKENDS`.
    Returns:
        [N, D].
    Raises:
        KeyError: the backend is not built.
    """
    return BACKENDS[backend](x_ND, kept_NK, index_NK, v_MRD, u_MRD, inner_silu=inner_silu)

"""The basis projection op: a weighted sum of low-rank maps, of which each token uses a few.

Called by `kalmagrove.nn.kan` after manifold routing; `reference` is the specification. Its
backends also multiply rows that are sorted by group with their group's matrix: `grouped_linear`.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from kalmagrove_kernels.projection import reference
from kalmagrove_kernels.projection.beside import linear_beside
from kalmagrove_kernels.projection.reference import dense_masked, gathered, sorted_by_edge

BACKENDS = ("reference", "triton", "cuda")

__all__ = [
    "BACKENDS",
    "basis_projection",
    "dense_masked",
    "gathered",
    "grouped_linear",
    "linear_beside",
    "sorted_by_edge",
]


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

    Differentiable in x, kept, v and u (KalmaGrove paper, section 3.1, "Basis projection"). Layers
    of several groves are one with groves * edges edges.

    Args:
        x_ND: tokens [N, D].
        kept_NK: the values M_i of the kept edges [N, K], in the dtype of x (triton: or any other).
        index_NK: their edge numbers, int64 [N, K], without repetition in a row.
        v_MRD, u_MRD: [M, R, D].
        backend: one of `BACKENDS`. "reference" may read counts on the host, "triton" never waits.
    Returns:
        [N, D].
    Raises:
        KeyError: there is no such backend.
        RuntimeError: the backend is not built, or what it needs is not installed.
        TypeError: "triton" takes bf16, fp16 and fp32 alone.
    """
    tensors = x_ND, kept_NK, index_NK, v_MRD, u_MRD
    if backend == "reference":
        return reference.basis_projection(*tensors, inner_silu=inner_silu)
    return _kernel(backend, "basis_projection", *tensors, inner_silu=inner_silu)


def grouped_linear(
    x_SD: Tensor, w_GMD: Tensor, start_G1: Tensor, *, backend: str = "reference"
) -> Tensor:
    """h = x W_g^T for the rows start[g] up to start[g + 1]; differentiable in x and w.

    Args:
        x_SD: rows [S, D], sorted by group.
        w_GMD: [G, M, D].
        start_G1: int32 or int64 [G + 1], from 0 to S without decreasing.
        backend: one of `BACKENDS`, as for `basis_projection`, and with its errors.
    Returns:
        [S, M].
    """
    if backend == "reference":
        return reference.grouped_linear(x_SD, w_GMD, start_G1)
    return _kernel(backend, "grouped_linear", x_SD, w_GMD, start_G1)


@torch.compiler.disable  # launches that torch.compile cannot trace
def _kernel(backend: str, function: str, *tensors: Tensor, **options: bool) -> Tensor:
    result: Tensor = getattr(_module(backend), function)(*tensors, **options)
    return result


def _module(backend: str) -> ModuleType:
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    try:
        return importlib.import_module(f"kalmagrove_kernels.projection.{backend}")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the projection has no backend={backend!r} here ({error}): "
            "install kalmagrove[gpu] and use backend='triton', or use backend='reference'"
        ) from error

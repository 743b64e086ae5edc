"""The edge activation op: a per-edge univariate function beside a shared base function.

Called by `kalmagrove.nn` on the pre-activations of a KAN layer; `reference` is the specification,
`basis` the table of functions. `edge_topk` is the activation and the routing in one step.
Letters: N tokens, M edges, P basis functions, K kept, G groves.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kalmagrove_kernels.edge import reference
from kalmagrove_kernels.edge.reference import BASES, Kept, largest
from kalmagrove_kernels.edge.spline import bspline, bspline_bases

REMEDIES = {
    "triton": "install triton (`pip install kalmagrove[gpu]`)",
    "cuda": "it needs nvcc and a GPU of compute capability 9.0",
}

__all__ = [
    "BASES",
    "Kept",
    "bspline",
    "bspline_bases",
    "edge_topk",
    "largest",
]


def edge_topk(
    h_NM: Tensor,
    coef: Tensor,
    scale: Tensor | None,
    range_: Tensor,
    k: int,
    *,
    basis: str,
    degree: int,
    grid: int,
    base: str,
    group_N: Tensor | None = None,
    index_NK: Tensor | None = None,
    backend: str = "reference",
) -> Kept:
    """E = phi(h) and its k largest |E| a row, differentiable in h, coef and scale.

    Gradients pass through `value_NK` only. |E| is compared in fp32 and of equal values the lower
    index is kept, so the result is one on every device but where rounding flips a near-tie.

    Args:
        h_NM: pre-activations [N, M], bf16, fp16 or fp32 (arithmetic in fp32; the reference also
            takes fp64).
        coef, scale, range_: [M, P], [M] (None: no base term) and [2]; with `group_N` one of each a
            grove: [G, M, P], [G, M], [G, 2].
        k: at most M.
        basis: a key of `basis.BASES`, with its `degree` and `grid`.
        base: a key of `BASES`, unused when `scale` is None.
        group_N: int32 [N], the grove of each row, not decreasing.
        index_NK: channels to keep instead of the largest, without repetition in a row.
        backend: "reference", "triton" or "cuda".
    Raises:
        RuntimeError: the backend is missing here.
    """
    function = reference.edge_topk if backend == "reference" else partial(_kernel, backend)
    return function(
        h_NM,
        coef,
        scale,
        range_,
        k,
        basis=basis,
        degree=degree,
        grid=grid,
        base=base,
        group_N=group_N,
        index_NK=index_NK,
    )


@torch.compiler.disable  # launches that torch.compile cannot trace
def _kernel(backend: str, *tensors: Any, **options: Any) -> Kept:
    kept: Kept = _backend(backend).edge_topk(*tensors, **options)
    return kept


def _backend(name: str) -> Any:
    """The module of a backend, imported when it is first asked for."""
    if name not in REMEDIES:
        raise RuntimeError(f"backend={name} of the edge op must be reference, triton or cuda")
    try:
        return import_module(f"kalmagrove_kernels.edge.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"backend={name} of the edge op is missing here ({error}); {REMEDIES[name]}"
        ) from error

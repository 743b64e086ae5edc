"""What follows ADA's sum over tokens: RMSNorm per head, then the gate SiLU(g).

Called by the attention layer between the attention and the output projection; `norm_gate` of the
backend "reference" is the specification.
Letters: B batch, T tokens, H heads, V value width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kalmagrove_kernels.ada.backends import module_of
from kalmagrove_kernels.ada.reference import upcast


def norm_gate(
    o_BTHV: Tensor,
    g_BTHV: Tensor | None,
    weight_V: Tensor | None,
    *,
    eps: float = 1e-5,
    backend: str = "reference",
) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * weight * silu(g) over V, in the dtype of o.

    Computed in fp32 (fp64 stays) and rounded once; differentiable in o, g and weight.

    Args:
        o_BTHV: fp32, bf16 or fp16 (the reference: fp64 too).
        g_BTHV: None: no gate.
        weight_V: None: no norm.
        backend: one of `backends.BACKENDS`.
    Raises:
        KeyError: there is no such backend.
        RuntimeError: the backend is "triton" and Triton is not installed.
        ValueError: shapes do not fit.
        TypeError: "triton" takes bf16, fp16 and fp32 alone.
    """
    if g_BTHV is not None and g_BTHV.shape != o_BTHV.shape:
        raise ValueError(f"g {tuple(g_BTHV.shape)} must have the shape of o {tuple(o_BTHV.shape)}")
    if weight_V is not None and weight_V.shape != o_BTHV.shape[-1:]:
        raise ValueError(f"weight {tuple(weight_V.shape)} must be [V={o_BTHV.shape[-1]}]")
    if g_BTHV is None and weight_V is None:
        return o_BTHV
    if backend == "reference":
        return _norm_gate(o_BTHV, g_BTHV, weight_V, eps)
    return _kernel(backend, o_BTHV, g_BTHV, weight_V, eps)


def _norm_gate(
    o_BTHV: Tensor, g_BTHV: Tensor | None, weight_V: Tensor | None, eps: float
) -> Tensor:
    y = upcast(o_BTHV)
    if weight_V is not None:
        y = F.rms_norm(y, weight_V.shape, weight_V.to(y.dtype), eps)
    if g_BTHV is not None:
        y = y * F.silu(upcast(g_BTHV))
    return y.to(o_BTHV.dtype)


@torch.compiler.disable  # launches that torch.compile cannot trace
def _kernel(
    backend: str, o_BTHV: Tensor, g_BTHV: Tensor | None, weight_V: Tensor | None, eps: float
) -> Tensor:
    y_BTHV: Tensor = module_of("epilogue", backend).norm_gate(o_BTHV, g_BTHV, weight_V, eps)
    return y_BTHV

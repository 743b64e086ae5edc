"""The polynomial op: a KAN layer whose edge functions are polynomials (or short Fourier series).

    y_j = b_j + sum_p sum_i c_pji B_p(s(x_i))

A feed-forward for the retrofit of pretrained transformers; `reference` is the specification.
Letters: N tokens, I inputs, J outputs, P basis functions.
"""

import importlib
import importlib.util
from typing import Literal

import torch
from torch import Tensor

from kalmagrove_kernels.polynomial.reference import BASES, degree_of, materialised

Squash = Literal["tanh", "affine", "none"]

BACKENDS = ("reference", "triton")
SQUASHES = ("tanh", "affine", "none")
MAX_DEGREE = 8

__all__ = ["BACKENDS", "BASES", "SQUASHES", "degree_of", "materialised", "polynomial"]


def polynomial(
    x_NI: Tensor,
    coef_PJI: Tensor,
    bias_J: Tensor | None,
    *,
    basis: str,
    squash: Squash,
    scale_I: Tensor | None = None,
    shift_I: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """y [N, J] in the dtype of x, differentiable in x, coef, bias, scale and shift.

    Args:
        x_NI: tokens; fp16, bf16 or fp32 (the reference: fp64 too).
        coef_PJI: coefficients, in the dtype of x. P fixes the degree d, 1..8: P = d + 1, or 2d + 1
            with basis "fourier".
        bias_J: or None.
        basis: a key of `BASES`, on [-1, 1]; polynomials clamp there, Fourier has the period 2.
        squash: how s brings x to [-1, 1]: "tanh", "affine" (scale_i * x_i + shift_i) or "none".
        scale_I, shift_I: with squash="affine", and only then.
        backend: one of `BACKENDS`.
    Raises:
        KeyError: there is no such backend or basis.
        RuntimeError: the backend is "triton" and Triton is not installed.
        ValueError: shapes, dtypes, the degree or the squash do not fit.
    """
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    if basis not in BASES:
        raise KeyError(f"basis={basis!r} must be one of {tuple(BASES)}")
    _check(x_NI, coef_PJI, bias_J, basis, squash, scale_I, shift_I)
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs the package triton: install kalmagrove[gpu]")
    module = importlib.import_module(f"kalmagrove_kernels.polynomial.{backend}")
    y_NJ: Tensor = module.polynomial(
        x_NI, coef_PJI, bias_J, basis=basis, squash=squash, scale_I=scale_I, shift_I=shift_I
    )
    return y_NJ


def _check(
    x: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    basis: str,
    squash: str,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if x.ndim != 2 or coef.ndim != 3 or coef.shape[2] != x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and coef {tuple(coef.shape)} must be [N, I] and [P, J, I]"
        )
    if coef.dtype != x.dtype:
        raise ValueError(f"coef is {coef.dtype}, x is {x.dtype}: cast one to the other's dtype")
    if not 1 <= degree_of(basis, coef.shape[0]) <= MAX_DEGREE:
        raise ValueError(f"coef has P={coef.shape[0]}: the degree must be 1..{MAX_DEGREE}")
    if bias is not None and bias.shape != coef.shape[1:2]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [J={coef.shape[1]}]")
    if squash not in SQUASHES:
        raise ValueError(f"squash={squash!r} must be one of {SQUASHES}")
    for name, value in (("scale", scale), ("shift", shift)):
        if (value is not None) != (squash == "affine"):
            raise ValueError(f"{name}_I belongs to squash='affine', and only there; got {squash!r}")
        if value is not None and value.shape != x.shape[1:]:
            raise ValueError(f"{name} {tuple(value.shape)} must be [I={x.shape[1]}]")
    if len({t.device for t in (x, coef, bias, scale, shift) if isinstance(t, torch.Tensor)}) > 1:
        raise ValueError("x, coef, bias, scale and shift must be on one device")

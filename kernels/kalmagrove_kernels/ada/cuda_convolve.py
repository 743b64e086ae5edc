"""The key convolution in CUDA C++ (`csrc/ada`): every number is read once, also in the gradients.

`triton_prepare` uses it where `backend="cuda"`; all else of ADA's kernels is Triton's.
Letters: B batch, T tokens, C channels, P taps.
"""

import torch
from torch import Tensor

from kalmagrove_kernels import jit

MOST_TAPS = 8  # more do not stay in registers
# Tokens that a thread walks along, and threads of a block, forward and backward.
SPANS, THREADS = (32, 64), (128, 128)


def refusal(x_BTC: Tensor, taps: int) -> str | None:
    """Why the kernels cannot take this, or None."""
    vector = 16 // x_BTC.element_size()
    if x_BTC.dtype not in jit.DTYPES:
        return f"dtype {x_BTC.dtype}"
    if taps > MOST_TAPS:
        return f"{taps} taps"
    if x_BTC.shape[-1] % vector or x_BTC.data_ptr() % 16:
        return f"{x_BTC.shape[-1]} channels, or rows that do not begin at multiples of 16 bytes"
    return None


def convolve(x_BTC: Tensor, taps_PC: Tensor, segments_BT: Tensor | None) -> Tensor:
    """y_t = sum_p taps[p] x_(t - p), not across segments (int32). Tensors are contiguous."""
    y_BTC = torch.empty_like(x_BTC)
    if y_BTC.numel():
        sizes = (*x_BTC.shape, SPANS[0], THREADS[0])
        _library(x_BTC, taps_PC).launch(
            "convolve", x_BTC, taps_PC.float(), segments_BT, y_BTC, *sizes
        )
    return y_BTC


def unconvolve(
    dz_BTC: Tensor, x_BTC: Tensor, taps_PC: Tensor, segments_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of the taps [P, C] in fp32."""
    if dz_BTC.data_ptr() % 16:
        dz_BTC = dz_BTC.clone()
    batch, tokens, channels = x_BTC.shape
    spans = -(-tokens // SPANS[1])
    dx_BTC = torch.empty_like(x_BTC)
    parts = taps_PC.new_empty((batch * spans, *taps_PC.shape), dtype=torch.float32)
    if x_BTC.numel():
        _library(x_BTC, taps_PC).launch(
            "unconvolve", dz_BTC, x_BTC, taps_PC.float(), segments_BT, dx_BTC, parts,
            batch, tokens, channels, SPANS[1], THREADS[1],
        )  # fmt: skip
    return dx_BTC, parts.sum(0)


def _library(x: Tensor, taps_PC: Tensor) -> jit.Library:
    return jit.library("ada", x.device, **constants(len(taps_PC), x.dtype))


def constants(taps: int, dtype: torch.dtype) -> dict[str, int]:
    """What a build is made for."""
    return {"DTYPE": jit.DTYPES[dtype], "TAPS": taps}

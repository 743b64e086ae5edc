"""The prepare op: what ADA does to queries and keys between their projection and the attention.

    y = rotate(norm(silu(x * kappa)))        each step where it is asked for

Called by `kalmagrove.nn.attention.ada`; `prepare_reference` is the specification.
Letters: B batch, T tokens, C packed channels, H heads, R width of the widest head, P taps, r pairs.
"""

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kalmagrove_kernels.ada.reference import upcast
from kalmagrove_kernels.ada.steps import Steps

BACKENDS = ("reference", "triton", "cuda")

logger = logging.getLogger(__name__)


def prepare(
    x_BTC: Tensor,
    *,
    heads: int,
    width: int,
    taps_CP: Tensor | None = None,
    tail_BPC: Tensor | None = None,
    segments_BT: Tensor | None = None,
    silu: bool = False,
    norm_eps: float | None = None,
    angles_THr: Tensor | None = None,
    slot_S: Tensor | None = None,
    rank_H: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """Queries or keys ready to attend, [B, T, H, R] in the dtype of x.

    Differentiable in x, taps and tail.

    Args:
        x_BTC: the projection's output, heads side by side.
        taps_CP: causal depthwise convolution y_t = sum_p taps[:, p] x_(t - p); None: none.
        tail_BPC: the P - 1 rows before the first; None: zeros.
        segments_BT: documents, which the convolution does not cross; with a tail those of its rows
            come first.
        silu: after the convolution.
        norm_eps: of the RMS norm per head, without weight; None: no norm.
        angles_THr: rotary angles, fp32 [T, 1 or H, R / 2]; pairs are (i, R / 2 + i). None: none.
        slot_S: the channel that each of the H * R entries shows, C for none (a zero); None: heads
            of R channels each.
        rank_H: channels of each head, which the norm averages over; None: R.
        backend: one of `BACKENDS`. All steps are computed in fp32 (the reference: fp64 stays).
            "cuda": the convolution's kernels are CUDA C++, the others Triton's; where those cannot
            take x this is logged once, and Triton's convolve too.
    Raises:
        KeyError: there is no such backend.
        RuntimeError: Triton is not installed, or for "cuda" nvcc is missing.
        ValueError: a tail without taps.
    """
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    if tail_BPC is not None and taps_CP is None:
        raise ValueError("tail_BPC needs taps_CP: without a convolution nothing reaches back")
    before = 0
    if tail_BPC is not None:
        before = tail_BPC.shape[1]
        x_BTC = torch.cat([tail_BPC.to(x_BTC.dtype), x_BTC], dim=1)
        if angles_THr is not None:
            angles_THr = F.pad(angles_THr, (0, 0, 0, 0, before, 0))
    steps = Steps(heads, width, silu, norm_eps, angles_THr, segments_BT, slot_S, rank_H)
    if backend == "reference":
        y_BTHR = prepare_reference(x_BTC, taps_CP, steps)
    else:
        y_BTHR = _kernels(backend, x_BTC, taps_CP, steps)
    return y_BTHR[:, before:] if before else y_BTHR


def prepare_reference(x_BTC: Tensor, taps_CP: Tensor | None, steps: Steps) -> Tensor:
    """The steps one after the other."""
    y = upcast(x_BTC)
    if taps_CP is not None:
        y = _convolve(y, taps_CP.to(y.dtype), steps.segments_BT)
    if steps.silu:
        y = F.silu(y)
    if steps.slot_S is not None:
        y = F.pad(y, (0, 1)).index_select(
            -1, steps.slot_S
        )  # the pad is the zero of what is missing
    y = y.unflatten(-1, (steps.heads, steps.width))
    if steps.norm_eps is not None:
        ranks = steps.width if steps.rank_H is None else steps.rank_H[:, None]
        y = y * (y.square().sum(-1, keepdim=True) / ranks + steps.norm_eps).rsqrt()
    if steps.angles_THr is not None:
        cos, sin = (f(steps.angles_THr).to(y.dtype) for f in (torch.cos, torch.sin))
        low, high = y.chunk(2, dim=-1)
        y = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    return y.to(x_BTC.dtype)


def _convolve(x_BTC: Tensor, taps_CP: Tensor, segments_BT: Tensor | None) -> Tensor:
    y = x_BTC * taps_CP[:, 0]
    for lag in range(1, min(taps_CP.shape[1], x_BTC.shape[1])):
        shifted = F.pad(x_BTC[:, :-lag], (0, 0, lag, 0))
        if segments_BT is not None:
            same = F.pad(segments_BT[:, lag:] == segments_BT[:, :-lag], (lag, 0))
            shifted = shifted.masked_fill(~same.unsqueeze(-1), 0.0)
        y = y + shifted * taps_CP[:, lag]
    return y


@torch.compiler.disable  # launches that torch.compile cannot trace
def _kernels(backend: str, x_BTC: Tensor, taps_CP: Tensor | None, steps: Steps) -> Tensor:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"backend={backend!r} needs the package triton: install kalmagrove[gpu]")
    from kalmagrove_kernels.ada import triton_prepare

    angles, segments = steps.angles_THr, steps.segments_BT
    steps = steps._replace(
        angles_THr=None if angles is None else angles.float().contiguous(),
        segments_BT=None if segments is None else segments.to(torch.int32).contiguous(),
    )
    cuda = backend == "cuda" and taps_CP is not None and _in_cuda(x_BTC, taps_CP.shape[1])
    return triton_prepare.prepare(x_BTC, taps_CP, steps, cuda)


def _in_cuda(x_BTC: Tensor, taps: int) -> bool:
    from kalmagrove_kernels.ada import cuda_convolve

    why = cuda_convolve.refusal(x_BTC, taps)
    if why:
        _log_once(f"ADA's convolution: triton (the cuda kernels are made for no {why})")
    return why is None


@cache
def _log_once(text: str) -> None:
    logger.info(text)

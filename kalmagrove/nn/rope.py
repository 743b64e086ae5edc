"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the half-split layout of Llama.

The attentions rotate queries and keys with it; only differences of positions reach the scores.

Legend: B batch, T tokens, H heads, R width of a query/key head; pairs are (i, R/2 + i).
"""

from functools import lru_cache

import torch
from torch import Tensor

from kalmagrove.nn.norm import upcast


def rotary_angles(
    start: int,
    tokens: int,
    width: int,
    theta: float,
    device: torch.device,
    ranks_H: Tensor | None = None,
) -> Tensor:
    """Angles in radians of positions start .. start + tokens - 1, fp32 [T, 1, width / 2].

    Pair i turns by position * theta^(-2i / width). With `ranks_H`, head h has its own width
    ranks_H[h] <= width and the result is [T, H, width / 2]; pairs beyond a head's rank are unused.
    Without, all layers of a forward pass are given the same tensor: do not write into it.
    """
    if ranks_H is None and not torch.compiler.is_compiling():
        return _shared(start, tokens, width, theta, device)
    return _angles(start, tokens, width, theta, device, ranks_H)


@lru_cache(maxsize=2)
def _shared(start: int, tokens: int, width: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may be the next to ask
        return _angles(start, tokens, width, theta, device, None)


def _angles(
    start: int,
    tokens: int,
    width: int,
    theta: float,
    device: torch.device,
    ranks_H: Tensor | None,
) -> Tensor:
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    widths = ranks_H.float() if ranks_H is not None else torch.full((1,), width, device=device)
    frequencies = theta ** (-2.0 * pairs / widths[:, None])
    positions = torch.arange(start, start + tokens, dtype=torch.float32, device=device)
    return positions[:, None, None] * frequencies


def rotate(x_BTHR: Tensor, angles_THr: Tensor) -> Tensor:
    """Turn each pair (i, R/2 + i) of [B, T, H, R] by its angle [T, H or 1, R/2]; same type out."""
    x = upcast(x_BTHR)
    cos, sin = angles_THr.cos().to(x.dtype), angles_THr.sin().to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_BTHR.dtype)

"""Edge activations and top-k in plain PyTorch: the specification, and the path every machine runs.

Letters: N tokens, M edges, P basis functions, K kept, G groves.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove_kernels.edge.basis import BASES as UNIVARIATE

BASES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "identity": lambda h: h}


class Kept(NamedTuple):
    """The kept edges of every token, and two sums over all its edges (fp32 scalars, detached)."""

    value_NK: Tensor  # E of the kept edges, fp32, by descending magnitude
    index_NK: Tensor  # their channel numbers grove * M + edge, int64
    energy: Tensor  # sum of the squares of all E
    outside: Tensor  # number of pre-activations outside their range


def largest(value_NM: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k largest non-negative values a row, descending; exactly k, always.

    Compared in fp32; of equal values the lower index wins, on every device. (A fp32 that is not
    negative orders like the integer of its bits; the index fills the low half of an int64 key.)
    """
    bits_NM = value_NM.detach().float().contiguous().view(torch.int32).to(torch.int64)
    edges = value_NM.shape[1]
    order_M = torch.arange(edges - 1, -1, -1, device=value_NM.device)
    return ((bits_NM << 32) | order_M).topk(k, dim=1).indices


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
) -> Kept:
    """See `kalmagrove_kernels.edge.edge_topk`; fp64 h gives fp64 values."""
    wide = torch.float64 if h_NM.dtype == torch.float64 else torch.float32
    h_NM, edges = h_NM.to(wide), h_NM.shape[1]
    function = UNIVARIATE[basis](degree, grid)

    def activate(h_NM: Tensor, coef: Tensor, scale: Tensor | None, range_2: Tensor) -> Tensor:
        value_NM = function.phi(h_NM, coef.to(wide), range_2)
        return value_NM if scale is None else value_NM + scale.to(wide) * BASES[base](h_NM)

    first_N1: Tensor | int = 0
    if group_N is None:
        e_NM, range_N2 = activate(h_NM, coef, scale, range_), range_[None]
    else:
        rows = torch.bincount(group_N, minlength=len(coef)).tolist()
        scales = [None] * len(coef) if scale is None else scale.unbind()
        parts = zip(h_NM.split(rows), coef.unbind(), scales, range_.unbind(), strict=True)
        e_NM = torch.cat([activate(*part) for part in parts])
        range_N2, first_N1 = range_[group_N.long()], group_N[:, None].long() * edges
    if index_NK is None:
        index_NK = largest(e_NM.abs(), k) + first_N1
    with torch.no_grad():
        energy = e_NM.square().sum().float()
        outside = ((h_NM < range_N2[:, :1]) | (h_NM > range_N2[:, 1:])).sum().float()
    return Kept(e_NM.gather(1, index_NK - first_N1), index_NK, energy, outside)

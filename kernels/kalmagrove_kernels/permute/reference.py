"""The counting sort in plain PyTorch: the specification.

Letters: N tokens, K kept, C channels, S = N * K pairs of token and channel.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Pairs n * K + k in the order of their channels; of one channel, in their own order."""

    order_S: Tensor  # int32: sorted place -> pair
    place_S: Tensor  # int32: pair -> sorted place
    start_C1: Tensor  # int32: channel c has the places start[c] up to start[c + 1]


def sort_pairs(index_NK: Tensor, channels: int) -> Sorted:
    """See `kalmagrove_kernels.permute.sort_pairs`."""
    channel_S, order_S = index_NK.flatten().sort(stable=True)
    place_S = torch.empty_like(order_S)
    place_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    bounds_C1 = torch.arange(channels + 1, dtype=channel_S.dtype, device=channel_S.device)
    start_C1 = torch.searchsorted(channel_S, bounds_C1, out_int32=True)
    return Sorted(order_S.to(torch.int32), place_S.to(torch.int32), start_C1)

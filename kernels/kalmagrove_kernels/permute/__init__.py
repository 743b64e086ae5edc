"""The permutation op: (token, channel) pairs sorted by channel, as index arrays only.

Called by the sparse backends of `kalmagrove_kernels.projection` and `kalmagrove_kernels.edge`,
whose kernels work on all tokens of a channel at once; `reference` is the specification.
"""

import importlib

from torch import Tensor

from kalmagrove_kernels.permute.reference import Sorted

BACKENDS = ("reference", "triton", "cuda")

__all__ = ["BACKENDS", "Sorted", "sort_pairs"]


def sort_pairs(index_NK: Tensor, channels: int, *, backend: str = "reference") -> Sorted:
    """Counting sort of the pairs n * K + k by channel, stable; never waits for the device.

    Args:
        index_NK: channel numbers 0..channels-1, int64 or int32 [N, K]; N * K < 2^31.
        channels: C.
        backend: one of `BACKENDS`.
    Returns:
        `Sorted`: order [S], place [S] and start [C + 1], all int32.
    Raises:
        KeyError: there is no such backend.
        RuntimeError: what the backend needs is not installed.
    """
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    try:
        module = importlib.import_module(f"kalmagrove_kernels.permute.{backend}")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"sort_pairs has no backend={backend!r} here ({error}): "
            "install kalmagrove[gpu], or use backend='reference'"
        ) from error
    result: Sorted = module.sort_pairs(index_NK, channels)
    return result

"""Which steps `prepare` takes, for its backends."""

from typing import NamedTuple

from torch import Tensor


class Steps(NamedTuple):
    """The arguments of `prepare` that take no part in differentiation. None: no such step."""

    heads: int
    width: int
    silu: bool
    norm_eps: float | None
    angles_THr: Tensor | None
    segments_BT: Tensor | None
    slot_S: Tensor | None
    rank_H: Tensor | None

    @property
    def linear(self) -> bool:
        """Nothing but the convolution, which leaves channels where they are."""
        others = (self.norm_eps, self.angles_THr, self.slot_S)
        return not self.silu and all(other is None for other in others)

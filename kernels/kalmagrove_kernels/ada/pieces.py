"""Decayed causal linear attention of a row cut into pieces of T tokens: what joins the pieces.

Each piece attends within itself, by any form of `reference`. What the tokens before it add passes
through one state, as in LASP-2 (arXiv:2502.07563):

    output = form(q, k, v) + from_state(q, entering_state(end states of the pieces, piece))

Pure functions: `kalmagrove.nn.attention.ada` joins the pieces that context-parallel ranks hold.
Arguments and letters as in `reference`; N pieces.
"""

import torch
from torch import Tensor

from kalmagrove_kernels.ada.reference import decay_after, upcast


def entering_state(
    ends_BHNRV: Tensor,
    piece: int,
    tokens: int,
    *,
    log_decay_H: Tensor | None = None,
    last_segments_BN: Tensor | None = None,
) -> Tensor:
    """The state before the first token of a piece (zero for piece 0), fp32 [B, H, R, V].

    Args:
        ends_BHNRV: the `end_state` of every piece, fp32; those of later ones count for nothing.
        piece: the piece's index among them.
        tokens: of each piece.
        last_segments_BN: the segment of every piece's last token. The state holds that of the last
            token before the piece.
    """
    index = torch.arange(ends_BHNRV.shape[2], device=ends_BHNRV.device)
    between = (piece - 1 - index) * tokens  # from the end of each piece to the start of this one
    weight_HN = decay_after(between.clamp(min=0), log_decay_H, like=ends_BHNRV) * (between >= 0)
    weight_BHN = weight_HN.expand(*ends_BHNRV.shape[:3])
    if last_segments_BN is not None:
        same = last_segments_BN == last_segments_BN[:, max(piece - 1, 0), None]
        weight_BHN = weight_BHN.masked_fill(~same[:, None], 0.0)
    return torch.einsum("bhnrv,bhn->bhrv", ends_BHNRV, weight_BHN)


def from_state(
    q_BHTR: Tensor,
    state_BHRV: Tensor,
    *,
    scale: float,
    log_decay_H: Tensor | None = None,
    continues_BT: Tensor | None = None,
) -> Tensor:
    """What the state before the first token adds to the outputs, fp32 [B, H, T, V].

    continues_BT: whether a token belongs to the segment that the state holds; None: all do.
    """
    q = upcast(q_BHTR) * scale
    steps = torch.arange(1, q.shape[2] + 1, device=q.device)
    q = q * decay_after(steps, log_decay_H, like=q)[:, :, None]
    if continues_BT is not None:
        q = q.masked_fill(~continues_BT[:, None, :, None], 0.0)
    return q @ state_BHRV

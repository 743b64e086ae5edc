"""Causal linear attention with one constant decay per head: the core of Arnold Diffusion Attention.

`kalmagrove.nn.attention.ada` calls these. Ops with backends: `prepare` (what comes before), then
`attention` and `final_state` (rows of tokens) or `decode_step` (one token, all before it included),
then `norm_gate`. `reference` is the specification, `pieces` joins what forms of it give for pieces
of a row.
"""

from kalmagrove_kernels.ada.attention import attention, final_state
from kalmagrove_kernels.ada.backends import BACKENDS
from kalmagrove_kernels.ada.decode import decode_step
from kalmagrove_kernels.ada.epilogue import norm_gate
from kalmagrove_kernels.ada.pieces import entering_state, from_state
from kalmagrove_kernels.ada.prepare import prepare
from kalmagrove_kernels.ada.reference import chunked, end_state, quadratic, recurrent

__all__ = [
    "BACKENDS",
    "attention",
    "chunked",
    "decode_step",
    "end_state",
    "entering_state",
    "final_state",
    "from_state",
    "norm_gate",
    "prepare",
    "quadratic",
    "recurrent",
]

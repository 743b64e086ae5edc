"""Causal linear attention with one constant decay per head: the core of Arnold Diffusion Attention.

`kalmagrove.nn.attention.ada` calls these forms; faster siblings of `reference` belong in this
folder. `pieces` joins what the forms give for pieces of a row.
"""

from kalmagrove_kernels.ada.pieces import entering_state, from_state
from kalmagrove_kernels.ada.reference import chunked, end_state, quadratic, recurrent

__all__ = ["chunked", "end_state", "entering_state", "from_state", "quadratic", "recurrent"]

"""Causal linear attention with one constant decay per head: the core of Arnold Diffusion Attention.

`kalmagrove.nn.attention.ada` calls these forms; faster siblings of `reference` belong in this
folder.
"""

from kalmagrove_kernels.ada.reference import chunked, quadratic, recurrent

__all__ = ["chunked", "quadratic", "recurrent"]

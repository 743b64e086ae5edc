"""The projection's Triton kernels behind the counting sort of CUDA C++, which is faster.

There is no CUDA form of the products themselves: docs/kernels.md has the count.
"""

from functools import partial

from kalmagrove_kernels.permute.cuda import sort_pairs
from kalmagrove_kernels.projection import triton

basis_projection = partial(triton.basis_projection, sort=sort_pairs)
grouped_linear = triton.grouped_linear

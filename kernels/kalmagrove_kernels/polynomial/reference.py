"""The polynomial layer in plain PyTorch: the specification, and the form others would write.

`polynomial` is the formula, a product an order, in the dtype of its inputs. `materialised` expands
x to [N, (P-1) * I] and multiplies once: the peer of benchmarks.
Letters: N tokens, I inputs, J outputs, P basis functions.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove_kernels.edge import basis as table


class Monomial(table.Basis):
    """1, u, u^2, ..."""

    def terms(self, u: Tensor) -> Iterator[Tensor]:
        power = torch.ones_like(u)
        yield power
        for _ in range(self.degree):
            power = power * u
            yield power


# Those of the table that are fixed functions of u and start with B_0 = 1.
BASES: dict[str, type[table.Basis]] = {
    name: table.BASES[name]
    for name in ("chebyshev1", "chebyshev2", "legendre", "hermite", "fourier")
} | {"monomial": Monomial}


def degree_of(basis: str, size: int) -> int:
    """The degree at which the basis has `size` functions.

    Raises:
        ValueError: there is none.
    """
    if basis != "fourier":
        return size - 1
    if size % 2 == 0:
        raise ValueError(f"coef has P={size}: basis 'fourier' has 2 * degree + 1 functions")
    return size // 2


def expand(
    x_NI: Tensor,
    size: int,
    *,
    basis: str,
    squash: str,
    scale_I: Tensor | None = None,
    shift_I: Tensor | None = None,
) -> Iterator[Tensor]:
    """B_0(s(x)), B_1(s(x)), ...: `size` tensors [N, I] in the dtype of x."""
    if squash == "tanh":
        x_NI = x_NI.tanh()
    elif scale_I is not None and shift_I is not None:
        x_NI = x_NI * scale_I.to(x_NI.dtype) + shift_I.to(x_NI.dtype)
    # `coordinate` for the range [-1, 1], without its roundings.
    u_NI = x_NI * math.pi if basis == "fourier" else x_NI.clamp(-1, 1)
    return BASES[basis](degree_of(basis, size)).terms(u_NI)


def polynomial(
    x_NI: Tensor,
    coef_PJI: Tensor,
    bias_J: Tensor | None,
    *,
    basis: str,
    squash: str,
    scale_I: Tensor | None = None,
    shift_I: Tensor | None = None,
) -> Tensor:
    """See `kalmagrove_kernels.polynomial.polynomial`."""
    y_NJ = x_NI.new_zeros(x_NI.shape[0], coef_PJI.shape[1])
    if bias_J is not None:
        y_NJ = y_NJ + bias_J.to(x_NI.dtype)
    terms = expand(
        x_NI, coef_PJI.shape[0], basis=basis, squash=squash, scale_I=scale_I, shift_I=shift_I
    )
    for term_NI, coef_JI in zip(terms, coef_PJI.unbind(0), strict=True):
        y_NJ = y_NJ + F.linear(term_NI, coef_JI)
    return y_NJ


def materialised(
    x_NI: Tensor,
    coef_PJI: Tensor,
    bias_J: Tensor | None,
    *,
    basis: str,
    squash: str,
    scale_I: Tensor | None = None,
    shift_I: Tensor | None = None,
) -> Tensor:
    """The same function by one product with the expansion [N, (P-1) * I], which autograd keeps."""
    terms = expand(
        x_NI, coef_PJI.shape[0], basis=basis, squash=squash, scale_I=scale_I, shift_I=shift_I
    )
    next(terms)
    offset_J = coef_PJI[0].sum(1)
    if bias_J is not None:
        offset_J = offset_J + bias_J.to(x_NI.dtype)
    weight_JX = coef_PJI[1:].transpose(0, 1).flatten(1)
    return F.linear(torch.cat(list(terms), dim=1), weight_JX, offset_J)

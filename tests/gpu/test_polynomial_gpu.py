"""The polynomial op in Triton on a GPU: every gradient, at production shapes and awkward ones.

Compared with the reference in fp64 at small shapes and in fp32 at large ones. In half precision
the error may be twice that of the reference run in the same precision.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import polynomial as op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def case(
    shape: tuple[int, int, int], size: int, squash: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """x, coef, bias and, with squash="affine", scale and shift; and the gradient of y."""
    n, i, j = shape
    torch.manual_seed(n + i + j + size)
    make = {"device": "cuda"}
    tensors = [torch.randn(n, i, **make), torch.randn(size, j, i, **make) / i**0.5]
    tensors.append(torch.randn(j, **make))
    if squash == "affine":
        tensors += [torch.rand(i, **make) + 0.2, 0.3 * torch.randn(i, **make)]
    return [t.to(dtype) for t in tensors], torch.randn(n, j, **make).to(dtype)


def run(
    form: Callable[..., Tensor],
    tensors: list[Tensor],
    dy: Tensor,
    dtype: torch.dtype | None = None,
    **kind: str,
) -> list[Tensor]:
    """The output and the gradients of `tensors`, computed in `dtype`."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    names = dict(zip(("scale_I", "shift_I"), leaves[3:], strict=False))
    y = form(*leaves[:3], **names, **kind)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check_half(
    shape: tuple[int, int, int],
    size: int,
    dtype: torch.dtype = torch.bfloat16,
    exact: torch.dtype = torch.float64,
    **kind: str,
) -> None:
    tensors, dy = case(shape, size, kind["squash"], dtype)
    ours = run(op.polynomial, tensors, dy, backend="triton", **kind)
    again = run(op.polynomial, tensors, dy, backend="triton", **kind)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    theirs = run(op.polynomial, tensors, dy, **kind)
    truth = run(op.polynomial, tensors, dy, exact, **kind)
    names = ("y", "x", "coef", "bias", "scale", "shift")
    errors = {
        name: (relative(a, c), relative(b, c))
        for name, a, b, c in zip(names, ours, theirs, truth, strict=False)
    }
    assert all(a <= 2 * b + 1e-4 for a, b in errors.values()), errors


@pytest.mark.parametrize("shape", [(16384, 2048, 2048), (4096, 2048, 8192)])
def test_production_shapes(shape: tuple[int, int, int]) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    check_half(shape, 4, exact=torch.float32, basis="chebyshev1", squash="tanh")


@pytest.mark.parametrize("shape", [(63, 60, 24), (1, 104, 7), (300, 130, 200), (5000, 60, 72)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    check_half(shape, 4, basis="chebyshev1", squash="affine")


@pytest.mark.parametrize(("basis", "size"), [("legendre", 6), ("fourier", 3)])
def test_other_bases(basis: str, size: int) -> None:
    check_half((300, 160, 144), size, basis=basis, squash="tanh")


def test_fp16_unsquashed() -> None:
    check_half((300, 160, 144), 2, torch.float16, basis="chebyshev2", squash="none")


def test_no_tokens() -> None:
    tensors, dy = case((0, 60, 72), 4, "affine", torch.bfloat16)
    y, dx, *others = run(
        op.polynomial, tensors, dy, backend="triton", basis="chebyshev1", squash="affine"
    )
    assert y.shape == (0, 72)
    assert dx.shape == (0, 60)
    assert all(not t.any() for t in others)


@pytest.mark.parametrize(("precision", "bound"), [("highest", 5e-6), ("high", 3e-3)])
def test_fp32(precision: str, bound: float) -> None:
    tensors, dy = case((300, 160, 144), 3, "affine", torch.float32)
    kind = {"basis": "chebyshev1", "squash": "affine"}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = run(op.polynomial, tensors, dy, backend="triton", **kind)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = run(op.polynomial, tensors, dy, torch.float64, **kind)
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) < bound


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    tensors, dy = case((5000, 60, 72), 4, "affine", torch.bfloat16)
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    kind = {"basis": "chebyshev1", "squash": "affine"}
    for result in run(op.polynomial, tensors, dy, backend="triton", **kind):
        assert result.isfinite().all()


def test_nothing_waits_for_the_device() -> None:
    tensors, dy = case((300, 130, 200), 4, "affine", torch.bfloat16)
    kind = {"basis": "chebyshev1", "squash": "affine"}
    run(op.polynomial, tensors, dy, backend="triton", **kind)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(op.polynomial, tensors, dy, backend="triton", **kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")

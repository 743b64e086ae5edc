"""ADA's norm and gate in Triton on a GPU: every gradient, at production shapes and awkward ones.

The truth is the reference in fp64; in half precision the error may be twice that of the reference.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels.ada.epilogue import norm_gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FLOOR = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 5e-6}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def case(
    shape: tuple[int, ...], dtype: torch.dtype, norm: bool = True, gate: bool = True
) -> tuple[list[Tensor | None], Tensor]:
    """o, g and an fp32 weight; the gradient of y."""
    torch.manual_seed(sum(shape))
    o, g, dy = torch.randn(3, *shape, device="cuda").to(dtype)
    weight = 1 + 0.3 * torch.randn(shape[-1], device="cuda")
    return [3 * o, g if gate else None, weight if norm else None], dy


def run(
    tensors: list[Tensor | None],
    dy: Tensor,
    backend: str = "reference",
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The output and the gradients of `tensors`, computed in `dtype`."""
    inputs = [None if t is None else t.detach().to(dtype or t.dtype) for t in tensors]
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    y = norm_gate(*inputs, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def check(shape: tuple[int, ...], dtype: torch.dtype, norm: bool = True, gate: bool = True) -> None:
    tensors, dy = case(shape, dtype, norm, gate)
    ours, again = run(tensors, dy, "triton"), run(tensors, dy, "triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    theirs, truth = run(tensors, dy), run(tensors, dy, dtype=torch.float64)
    errors = [(relative(a, c), relative(b, c)) for a, b, c in zip(ours, theirs, truth, strict=True)]
    assert all(a <= 2 * b + FLOOR[dtype] for a, b in errors), errors


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("shape", [(4, 2048, 16, 128), (2, 100, 8, 64), (1, 300, 4, 256)])
def test_production_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(shape, dtype)


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5, 24), (1, 1, 1, 60), (2, 501, 3, 129)])
@pytest.mark.parametrize(("norm", "gate"), [(True, True), (True, False), (False, True)])
def test_odd_shapes(shape: tuple[int, ...], dtype: torch.dtype, norm: bool, gate: bool) -> None:
    check(shape, dtype, norm, gate)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    tensors, dy = case((2, 501, 3, 60), torch.bfloat16)
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    for result in run(tensors, dy, "triton"):
        assert result.isfinite().all()


def test_nothing_waits_for_the_device() -> None:
    tensors, dy = case((2, 501, 3, 60), torch.bfloat16)
    run(tensors, dy, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tensors, dy, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""ADA's norm and gate in Triton against the reference in fp64: forward and every gradient.

Runs in Triton's interpreter where there is no GPU.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kalmagrove_kernels.ada import triton_epilogue
from kalmagrove_kernels.ada.epilogue import norm_gate

pytestmark = pytest.mark.unit
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6  # relative RMS of fp32 against fp64


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few programs, and NaN in all memory that is not yet written."""
    monkeypatch.setitem(triton_epilogue.TILES, "programs", 3)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def case(shape: tuple[int, ...], norm: bool, gate: bool) -> list[Tensor | None]:
    torch.manual_seed(sum(shape))
    o, g = 3 * torch.randn(2, *shape, device=DEVICE)
    weight = 1 + 0.3 * torch.randn(shape[-1], device=DEVICE)
    return [o, g if gate else None, weight if norm else None]


def run(tensors: list[Tensor | None], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """The output and the gradients of every tensor, for one random cotangent."""
    inputs = [None if t is None else t.to(dtype).requires_grad_() for t in tensors]
    y = norm_gate(*inputs, eps=1e-5, backend=backend)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    leaves = [t for t in inputs if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y))]


@pytest.mark.parametrize("shape", [(2, 5, 3, 24), (1, 1, 1, 60), (3, 7, 5, 16), (2, 31, 2, 129)])
@pytest.mark.parametrize(("norm", "gate"), [(True, True), (True, False), (False, True)])
def test_it_is_the_reference(shape: tuple[int, ...], norm: bool, gate: bool) -> None:
    tensors = case(shape, norm, gate)
    ours = run(tensors, torch.float32, "triton")
    theirs = run(tensors, torch.float64, "reference")
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= TOLERANCE * b.norm()
    again = run(tensors, torch.float32, "triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_no_tokens() -> None:
    for backend in ("reference", "triton"):
        y, do, dg, dweight = run(case((2, 0, 3, 24), True, True), torch.float32, backend)
        assert y.shape == do.shape == dg.shape == (2, 0, 3, 24)
        assert not dweight.any()


def test_rows_may_lie_anywhere_and_dtypes_differ() -> None:
    o, g, weight = case((2, 5, 3, 24), True, True)
    assert o is not None
    assert g is not None
    assert weight is not None
    o = o.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    g = torch.cat([g, g], dim=-1)[..., :24].half().requires_grad_()
    weight.requires_grad_()
    y = norm_gate(o, g, weight, backend="triton")
    expected = norm_gate(o, g, weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.float().square().sum(), [o, g, weight])
    assert [t.dtype for t in grads] == [torch.bfloat16, torch.float16, torch.float32]


def test_without_norm_and_gate_nothing_happens() -> None:
    o = torch.randn(1, 2, 3, 16)
    assert norm_gate(o, None, None, backend="triton") is o


def test_what_cannot_be_is_refused() -> None:
    o = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="shape of o"):
        norm_gate(o, o[:, :1], None)
    with pytest.raises(ValueError, match="weight"):
        norm_gate(o, None, torch.ones(8))
    with pytest.raises(KeyError, match="backend='none'"):
        norm_gate(o, o, None, backend="none")
    with pytest.raises(TypeError, match="float64"):
        norm_gate(o.double(), o, None, backend="triton")

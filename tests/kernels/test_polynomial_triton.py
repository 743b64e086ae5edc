"""The polynomial op: the reference against the definition, the Triton form against the reference.

Every comparison is of the output and of every gradient, by relative RMS, at shapes that fill no
tile; outputs are poisoned with NaN before the kernels write them.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import polynomial as op

pytestmark = pytest.mark.unit
BASES = sorted(op.BASES)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def case(
    shape: tuple[int, int, int], size: int, squash: str, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, coef, bias and, with squash="affine", scale and shift, which send some of x outside."""
    n, i, j = shape
    torch.manual_seed(n + i + j + size)
    tensors = [torch.randn(n, i), torch.randn(size, j, i) / i**0.5, torch.randn(j)]
    if squash == "affine":
        tensors += [torch.rand(i) + 0.2, 0.3 * torch.randn(i)]
    return [t.to(dtype) for t in tensors]


def run(
    form: Callable[..., Tensor],
    tensors: list[Tensor],
    dtype: torch.dtype | None = None,
    **kind: str,
) -> list[Tensor]:
    """The output and the gradients of `tensors`, computed in `dtype`."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    names = dict(zip(("scale_I", "shift_I"), leaves[3:], strict=False))
    y = form(*leaves[:3], **names, **kind)
    torch.manual_seed(0)
    dy = torch.randn(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(tensors: list[Tensor], bound: float, **kind: str) -> None:
    pytest.importorskip("triton")
    ours = run(op.polynomial, tensors, backend="triton", **kind)
    for a, b in zip(ours, run(op.polynomial, tensors, torch.float64, **kind), strict=True):
        assert relative(a, b) < bound


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unwritten elements of new tensors are NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


@pytest.mark.parametrize("basis", BASES)
def test_the_reference_is_the_definition(basis: str) -> None:
    size = 7
    x, coef, bias, scale, shift = case((9, 5, 4), size, "affine", torch.float64)
    functions = op.BASES[basis](op.degree_of(basis, size))
    span = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for squash, s in (("tanh", x.tanh()), ("affine", scale * x + shift), ("none", x)):
        values = functions.evaluate(s, span)
        affine = {"scale_I": scale, "shift_I": shift} if squash == "affine" else {}
        kind = {"basis": basis, "squash": squash, **affine}
        want = torch.einsum("nip,pji->nj", values, coef) + bias
        torch.testing.assert_close(op.polynomial(x, coef, bias, **kind), want)
        torch.testing.assert_close(op.materialised(x, coef, bias, **kind), want)


@pytest.mark.parametrize("basis", BASES)
def test_the_recurrence_is_the_table(basis: str) -> None:
    if basis == "fourier":
        pytest.skip("its terms follow from cos and sin")
    pytest.importorskip("triton")
    from kalmagrove_kernels.polynomial.triton import recurrence

    u = torch.linspace(-1, 1, 33, dtype=torch.float64)
    older, old = torch.zeros_like(u), torch.ones_like(u)
    terms = list(op.BASES[basis](8).terms(u))
    for (a, b), want in zip(recurrence(basis, 8), terms[1:], strict=True):
        older, old = old, a * u * old - b * older
        torch.testing.assert_close(old, want)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("basis", "squash"),
    [
        ("chebyshev1", "tanh"),
        ("chebyshev2", "none"),
        ("legendre", "affine"),
        ("hermite", "tanh"),
        ("fourier", "affine"),
        ("monomial", "none"),
    ],
)
def test_triton_is_the_reference(basis: str, squash: str) -> None:
    size = 5 if basis == "fourier" else 4
    check(case((33, 28, 20), size, squash), 2e-6, basis=basis, squash=squash)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 5, 3), (70, 3, 66)])
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    check(case(shape, 3, "affine"), 2e-6, basis="legendre", squash="affine")


@pytest.mark.parametrize("size", [2, 9])
def test_the_lowest_and_the_highest_degree(size: int) -> None:
    check(case((17, 20, 18), size, "tanh"), 5e-6, basis="chebyshev1", squash="tanh")


def test_half_precision() -> None:
    tensors = case((33, 20, 18), 4, "tanh", torch.float16)
    kind = {"basis": "chebyshev2", "squash": "tanh"}
    exact = run(op.polynomial, tensors, torch.float64, **kind)
    theirs = run(op.polynomial, tensors, **kind)
    pytest.importorskip("triton")
    ours = run(op.polynomial, tensors, backend="triton", **kind)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert relative(a, c) <= 2 * relative(b, c) + 1e-4


@pytest.mark.usefixtures("_poisoned")
def test_split_tokens_and_several_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tiles: a contraction over tokens in parts, orders in groups of unequal size."""
    pytest.importorskip("triton")
    from kalmagrove_kernels.polynomial import tiles

    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(tiles, "MIN_SPLIT", 32)
    for kernel in ("inputs", "coef"):
        tile = tiles.Tile(16, 32, 16, warps=4, stages=2, orders=2)
        monkeypatch.setitem(tiles.TILES, (kernel, "ieee"), tile)
    assert tiles.parts(1, 100) == 3
    check(case((100, 20, 33), 4, "affine"), 2e-6, basis="hermite", squash="affine")


def test_two_runs_are_equal() -> None:
    pytest.importorskip("triton")
    tensors, kind = case((20, 18, 12), 4, "affine"), {"basis": "legendre", "squash": "affine"}
    first, second = (run(op.polynomial, tensors, backend="triton", **kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_need_not_be_contiguous_nor_differentiable() -> None:
    pytest.importorskip("triton")
    x, coef, _ = case((20, 18, 12), 4, "tanh")
    x, coef = x.t().contiguous().t(), coef.transpose(1, 2).contiguous().transpose(1, 2)
    coef.requires_grad_()
    kind = {"basis": "monomial", "squash": "tanh"}
    ours = op.polynomial(x, coef, None, backend="triton", **kind).sum(0)
    theirs = op.polynomial(x, coef, None, **kind).sum(0)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours[3], coef), torch.autograd.grad(theirs[3], coef), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_tiles_fit_the_multiprocessor() -> None:
    from kalmagrove_kernels.polynomial import tiles

    for (kernel, precision), tile in tiles.TILES.items():
        size = 2 if precision == "half" else 4
        for orders in range(1, 17):
            at_once = {"forward": orders, "coef": 1}.get(
                kernel, tiles.split_evenly(orders, tile.orders)
            )
            fitted = tiles.fit(tile, at_once, size)
            stage = (fitted.rows + at_once * fitted.cols) * fitted.depth * size
            assert fitted.stages == 1 or fitted.stages * stage <= tiles.SHARED_BYTES
            assert fitted.depth >= 16
    assert [tiles.split_evenly(q, 3) for q in (1, 3, 4, 7, 8)] == [1, 3, 2, 3, 3]


def test_what_does_not_fit_is_refused() -> None:
    x, coef, bias, scale, shift = case((3, 4, 5), 4, "affine")
    kind = {"basis": "legendre", "squash": "tanh"}
    with pytest.raises(KeyError, match="backend='fpga'"):
        op.polynomial(x, coef, bias, backend="fpga", **kind)
    with pytest.raises(KeyError, match="basis='rbf'"):
        op.polynomial(x, coef, bias, basis="rbf", squash="tanh")
    wrong = [
        ((x[0], coef, bias), {}, "must be"),
        ((x, coef.double(), bias), {}, "cast"),
        ((x, coef[:1], bias), {}, "degree must be 1..8"),
        ((x, coef, bias[1:]), {}, "bias"),
        ((x, coef, bias), {"basis": "fourier"}, "2 \\* degree \\+ 1"),
        ((x, coef, bias), {"squash": "sigmoid"}, "squash='sigmoid'"),
        ((x, coef, bias), {"squash": "affine", "scale_I": scale}, "shift_I belongs"),
        ((x, coef, bias), {"scale_I": scale, "shift_I": shift}, "scale_I belongs"),
        ((x, coef, bias), {"squash": "affine", "scale_I": scale, "shift_I": shift[1:]}, "shift"),
    ]
    for args, extra, match in wrong:
        with pytest.raises(ValueError, match=match):
            op.polynomial(*args, **(kind | extra))


def test_triton_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, coef, bias = case((3, 4, 5), 4, "tanh")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the package triton"):
        op.polynomial(x, coef, bias, basis="legendre", squash="tanh", backend="triton")


def test_triton_takes_no_fp64() -> None:
    pytest.importorskip("triton")
    x, coef, bias = case((3, 4, 5), 4, "tanh", torch.float64)
    with pytest.raises(ValueError, match="float64"):
        op.polynomial(x, coef, bias, basis="legendre", squash="tanh", backend="triton")

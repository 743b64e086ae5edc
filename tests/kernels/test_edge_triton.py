"""The fused edge activation and top-k in Triton against its reference in fp64, at tiny sizes."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import edge
from kalmagrove_kernels.edge.basis import BASES

pytest.importorskip("triton")
pytestmark = pytest.mark.unit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor | None]  # h, coef, scale
    range_: Tensor
    k: int
    options: dict[str, Any]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds what no test would take for a result."""
    real = Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        fresh = real(self, *size, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 2**30)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


def case(
    tokens: int,
    edges: int,
    k: int,
    basis: str = "bspline",
    degree: int = 3,
    grid: int = 5,
    base: str = "silu",
    groves: int = 0,
) -> Case:
    lead = (groves,) if groves else ()
    size = BASES[basis](degree, grid).size
    h = 2 * torch.randn(tokens, edges, device=DEVICE)
    coef = torch.randn(*lead, edges, size, device=DEVICE)
    scale = None if base == "none" else torch.randn(*lead, edges, device=DEVICE)
    range_ = torch.tensor([-2.0, 3.0], device=DEVICE) + torch.rand(*lead, 2, device=DEVICE)
    options: dict[str, Any] = {"basis": basis, "degree": degree, "grid": grid, "base": base}
    if groves:
        group = torch.randint(groves - 1, (tokens,), device=DEVICE)  # the last one has no rows
        options["group_N"] = group.sort().values.int()
    return Case((h, coef, scale), range_, k, options)


def run(case: Case, backend: str, index: Tensor | None = None) -> tuple[edge.Kept, list[Tensor]]:
    """What is kept and the gradients of h, coef and scale; the reference in fp64."""
    wide = torch.float64 if backend == "reference" else torch.float32
    leaves = [None if t is None else t.to(wide).requires_grad_() for t in case.tensors]
    kept = edge.edge_topk(
        *leaves, case.range_, case.k, **case.options, index_NK=index, backend=backend
    )
    torch.manual_seed(1)
    weight = torch.randn(kept.value_NK.shape).to(kept.value_NK)
    given = [leaf for leaf in leaves if leaf is not None]
    return kept, list(torch.autograd.grad((kept.value_NK * weight).sum(), given))


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-9))


def check(case: Case, index: Tensor | None = None) -> None:
    ours, our_grads = run(case, "triton", index)
    theirs, grads = run(case, "reference", index)
    assert torch.equal(ours.index_NK, theirs.index_NK)
    assert ours.value_NK.dtype == torch.float32
    assert distance(ours.value_NK, theirs.value_NK) < 1e-6
    assert distance(ours.energy, theirs.energy) < 1e-6
    assert ours.outside == theirs.outside
    for ours_, theirs_ in zip(our_grads, grads, strict=True):
        assert distance(ours_, theirs_) < 3e-6
    assert bool((our_grads[0] != 0).sum(1).le(case.k).all())


@pytest.mark.parametrize("basis", sorted(BASES))
def test_every_basis_is_the_reference(basis: str) -> None:
    torch.manual_seed(0)
    place = sorted(BASES).index(basis)
    check(case(13, 7, 3, basis, base=("silu", "identity", "none")[place % 3]))
    check(case(9, 20, 2, basis, base=("none", "silu", "identity")[place % 3], groves=3))


@pytest.mark.parametrize(
    ("tokens", "edges", "k", "degree", "grid"),
    [(0, 5, 2, 3, 4), (1, 1, 1, 3, 4), (3, 40, 8, 2, 3), (5, 6, 6, 1, 1), (2, 9, 3, 5, 2)],
)
def test_odd_shapes(tokens: int, edges: int, k: int, degree: int, grid: int) -> None:
    torch.manual_seed(1)
    check(case(tokens, edges, k, "bspline", degree, grid))


def plain(h: Tensor, k: int) -> Case:
    """E = h: exact, so that the order of near-equal values can be told."""
    coef, scale = torch.zeros(h.shape[1], 4, device=DEVICE), torch.ones(h.shape[1], device=DEVICE)
    options = {"basis": "bspline", "degree": 3, "grid": 1, "base": "identity"}
    return Case((h, coef, scale), torch.tensor([-1.0, 1.0], device=DEVICE), k, options)


def test_ties_and_near_ties_are_ordered_by_all_bits_then_by_the_lower_index() -> None:
    torch.manual_seed(2)
    bits = torch.tensor([0.75]).view(torch.int32)
    near = (bits + torch.randint(0, 9, (6, 33))).view(torch.float32).to(DEVICE)
    near *= torch.randint(0, 2, near.shape, device=DEVICE) * 2 - 1
    near[0] = 0
    near[1, ::2] = 0
    kept, _ = run(plain(near, 5), "triton")
    assert torch.equal(kept.index_NK, edge.largest(near.abs(), 5))
    assert torch.equal(kept.value_NK, near.gather(1, kept.index_NK))


def test_all_tokens_on_one_edge_and_given_edges() -> None:
    torch.manual_seed(3)
    one = case(20, 6, 1)
    check(one, torch.full((20, 1), 4, device=DEVICE))
    some = case(8, 6, 2, groves=2)
    index = torch.rand(8, 6, device=DEVICE).topk(2).indices
    check(some, index + 6 * some.options["group_N"][:, None])


def test_what_is_not_finite_stays_in_its_row() -> None:
    torch.manual_seed(4)
    for basis in ("bspline", "chebyshev1", "rbf"):
        given = case(4, 6, 2, basis)
        h = given.tensors[0]
        h[0, 1], h[1, 2], h[2, 3] = float("nan"), float("inf"), float("-inf")
        kept = edge.edge_topk(
            *given.tensors, given.range_, given.k, **given.options, backend="triton"
        )
        assert bool(((kept.index_NK >= 0) & (kept.index_NK < 6)).all())
        assert kept.index_NK[:3, 0].tolist() == [1, 2, 3]
        assert bool(kept.value_NK[3].isfinite().all())
        assert bool(kept.value_NK[0, 0].isnan())


def test_the_matrix_product_with_the_same_epilogue() -> None:
    from kalmagrove_kernels.edge.triton_linear import edge_topk_linear

    torch.manual_seed(5)
    (_, coef, scale), range_, k, options = case(1, 9, 3)
    x, w = torch.randn(11, 20, device=DEVICE), torch.randn(9, 20, device=DEVICE) / 4
    wide = [t.double().requires_grad_() for t in (x, w, coef, scale)]
    theirs = edge.edge_topk(wide[0] @ wide[1].mT, *wide[2:], range_, k, **options)
    narrow = [t.clone().requires_grad_() for t in (x, w, coef, scale)]
    ours = edge_topk_linear(*narrow, range_, k, **options)
    assert torch.equal(ours.index_NK, theirs.index_NK)
    assert distance(ours.value_NK, theirs.value_NK) < 1e-5
    assert distance(ours.energy, theirs.energy) < 1e-5
    weight = torch.randn(11, 3, device=DEVICE)
    our_grads = torch.autograd.grad((ours.value_NK * weight).sum(), narrow)
    for grad, expected in zip(
        our_grads, torch.autograd.grad((theirs.value_NK * weight).sum(), wide), strict=True
    ):
        assert distance(grad, expected) < 1e-5
    with pytest.raises(ValueError, match="edges=300 must be at most 256"):
        edge_topk_linear(x, torch.zeros(300, 20), coef, scale, range_, k, **options)


def test_only_small_tensors_are_saved_beside_h() -> None:
    torch.manual_seed(6)
    given = case(16, 12, 2)
    saved: list[Tensor] = []
    leaves = [t.requires_grad_() for t in given.tensors if t is not None]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kept = edge.edge_topk(*leaves, given.range_, 2, **given.options, backend="triton")
    elements = sum(t.numel() for t in saved)
    assert elements == sum(t.numel() for t in (*leaves, given.range_, kept.index_NK))

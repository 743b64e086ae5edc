"""The fused edge activation and top-k in Triton on a GPU: production shapes, odd ones, every basis.

Values and gradients are compared with the reference in fp64 on the edges that the kernel kept, as
rounding flips near-ties; what it kept is compared separately. Where h is bf16 the error may be
twice that of the reference run on the same bf16 tensors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import edge
from kalmagrove_kernels.edge.basis import BASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


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
    dtype: torch.dtype = torch.bfloat16,
    basis: str = "bspline",
    base: str = "silu",
    groves: int = 0,
) -> Case:
    lead, make = ((groves,) if groves else ()), {"device": "cuda"}
    h = 1.5 * torch.randn(tokens, edges, **make)
    coef = torch.randn(*lead, edges, BASES[basis](3, 8).size, **make)
    scale = None if base == "none" else torch.randn(*lead, edges, **make)
    range_ = torch.tensor([-3.0, 3.0], **make) + torch.rand(*lead, 2, **make)
    options: dict[str, Any] = {"basis": basis, "degree": 3, "grid": 8, "base": base}
    if groves:
        group = torch.randint(groves - 1, (tokens,), **make)  # the last one has no rows
        options["group_N"] = group.sort().values.int()
    return Case((h.to(dtype), coef, scale), range_, k, options)


def run(
    case: Case, backend: str, wide: torch.dtype | None = None, index: Tensor | None = None
) -> tuple[edge.Kept, list[Tensor]]:
    """What is kept, and the gradients of h, coef and scale; computed from tensors in `wide`."""
    leaves = [
        None if t is None else t.detach().to(wide or t.dtype).requires_grad_() for t in case.tensors
    ]
    kept = edge.edge_topk(
        *leaves, case.range_, case.k, **case.options, index_NK=index, backend=backend
    )
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(kept.value_NK.shape, generator=generator, device="cuda")
    given = [leaf for leaf in leaves if leaf is not None]
    return kept, list(torch.autograd.grad((kept.value_NK * weight).sum(), given))


def distance(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-9))


def check(case: Case) -> None:
    ours, our_grads = run(case, "triton")
    free, _ = run(case, "reference", torch.float64)
    if len(free.value_NK):
        assert float((ours.index_NK == free.index_NK).double().mean()) > 0.999
    assert distance(ours.value_NK.abs(), free.value_NK.abs()) < 2e-6
    assert distance(ours.energy, free.energy) < 1e-5
    assert abs(float(ours.outside - free.outside)) <= 1e-6 * case.tensors[0].numel()
    _, exact = run(case, "reference", torch.float64, ours.index_NK)
    _, plain = run(case, "reference", None, ours.index_NK)
    for ours_, plain_, exact_ in zip(our_grads, plain, exact, strict=True):
        assert distance(ours_, exact_) < 2 * distance(plain_, exact_) + 1e-5
    assert bool((our_grads[0] != 0).sum(1).le(case.k).all())


@pytest.mark.parametrize(
    ("tokens", "edges", "k", "dtype", "groves"),
    [
        (16384, 104, 8, torch.bfloat16, 0),
        (16384, 32, 8, torch.bfloat16, 8),
        (63, 104, 8, torch.bfloat16, 0),
        (1, 104, 8, torch.bfloat16, 0),
        (0, 104, 8, torch.bfloat16, 0),
        (5, 32, 8, torch.bfloat16, 8),
        (1000, 104, 8, torch.float32, 0),
        (2048, 256, 16, torch.bfloat16, 0),
    ],
)
def test_shapes(tokens: int, edges: int, k: int, dtype: torch.dtype, groves: int) -> None:
    torch.manual_seed(tokens + edges)
    check(case(tokens, edges, k, dtype, groves=groves))


@pytest.mark.parametrize("basis", sorted(BASES))
def test_every_basis(basis: str) -> None:
    torch.manual_seed(0)
    base = ("silu", "identity", "none")[sorted(BASES).index(basis) % 3]
    check(case(517, 13, 3, torch.float32, basis, base))


def test_two_runs_give_the_same_bits_and_nothing_waits_for_the_gpu() -> None:
    torch.manual_seed(1)
    for given in (case(16384, 104, 8), case(16384, 32, 8, groves=8)):
        run(given, "triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [run(given, "triton") for _ in range(2)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        first, second = ([*kept, *grads] for kept, grads in results)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


def test_ties_and_what_is_not_finite() -> None:
    torch.manual_seed(2)
    given = case(4096, 104, 8)
    h, coef, scale = given.tensors
    same = coef[:1].expand_as(coef).contiguous(), torch.ones_like(scale)
    tied = (h.float() * 2).round().to(h.dtype)  # a dozen values, so every row has ties
    tied[:100] = 0
    kept = edge.edge_topk(tied, *same, given.range_, 8, **given.options, backend="triton")
    # Equal h give equal E: of each value the lower indices come first, without gaps.
    value, index = kept.value_NK, kept.index_NK
    equal = value[:, 1:] == value[:, :-1]
    assert bool((index[:, 1:] > index[:, :-1])[equal].all())
    assert torch.equal(index[:100], torch.arange(8, device="cuda").expand(100, 8))
    magnitude = value.abs()
    assert bool((magnitude[:, 1:] <= magnitude[:, :-1]).all())
    h[0, 1], h[1, 2], h[2, 3] = float("nan"), float("inf"), float("-inf")
    kept = edge.edge_topk(h, coef, scale, given.range_, 8, **given.options, backend="triton")
    assert kept.index_NK[:3, 0].tolist() == [1, 2, 3]
    assert bool(((kept.index_NK >= 0) & (kept.index_NK < 104)).all())
    assert bool(kept.value_NK[3:].isfinite().all())


def test_all_tokens_on_one_edge() -> None:
    torch.manual_seed(3)
    given = case(5000, 104, 1)
    index = torch.full((5000, 1), 103, device="cuda")
    _, ours = run(given, "triton", index=index)
    _, exact = run(given, "reference", torch.float64, index)
    _, plain = run(given, "reference", None, index)
    for ours_, plain_, exact_ in zip(ours, plain, exact, strict=True):
        assert distance(ours_, exact_) < 2 * distance(plain_, exact_) + 1e-5


@pytest.mark.parametrize("tokens", [16384, 63])
def test_the_matrix_product_with_the_same_epilogue(tokens: int) -> None:
    """The unfused path, with h as the fused kernel wrote it for its backward pass."""
    from kalmagrove_kernels.edge.triton_linear import edge_topk_linear

    torch.manual_seed(4)
    (_, coef, scale), range_, k, options = case(1, 104, 8)
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    w = (torch.randn(104, 1024, device="cuda") / 32).bfloat16()

    def through(function: Callable[[Tensor, Tensor], edge.Kept]) -> tuple[edge.Kept, list[Tensor]]:
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        kept = function(*leaves)
        return kept, list(torch.autograd.grad(kept.value_NK.sum(), leaves))

    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours, our_grads = through(
            lambda x, w: edge_topk_linear(x, w, coef, scale, range_, k, **options)
        )
    (h,) = (t for t in saved if t.shape == (tokens, 104) and t.dtype == torch.bfloat16)
    assert distance(h, x.double() @ w.double().mT) < 3e-3
    same = edge.edge_topk(h, coef, scale, range_, k, **options, backend="triton")
    assert torch.equal(ours.index_NK, same.index_NK)
    assert distance(ours.value_NK, same.value_NK) < 1e-6
    _, grads = through(
        lambda x, w: edge.edge_topk(
            x @ w.mT, coef, scale, range_, k, **options, index_NK=ours.index_NK
        )
    )
    for ours_, theirs in zip(our_grads, grads, strict=True):
        assert distance(ours_, theirs) < 2e-2

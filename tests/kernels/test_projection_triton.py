"""The Triton projection against the formula in fp64: forward and every gradient, awkward shapes.

Runs in Triton's interpreter where there is no GPU.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kalmagrove_kernels import permute, projection
from kalmagrove_kernels.permute.reference import Sorted
from kalmagrove_kernels.projection import stages, tiles
from kalmagrove_kernels.projection import triton as triton_projection
from kalmagrove_kernels.projection.tiles import Tile
from kalmagrove_kernels.projection.triton import Summation

pytestmark = pytest.mark.unit
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(rows=16, ranks=16, depth=32, columns=32, group=2, stages=2)
TOLERANCE = 1e-5  # relative RMS of fp32 against fp64


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, and NaN in all memory that is not yet written."""
    for table in tiles.TILES.values():
        monkeypatch.setitem(table, "ieee", SMALL)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def case(tokens: int, width: int, channels: int, rank: int, kept: int) -> list[Tensor]:
    gate, index = torch.randn(tokens, channels).topk(kept)
    v, u = torch.randn(2, channels, rank, width).unbind()
    tensors = [torch.randn(tokens, width), gate, index, v, u / rank]
    return [t.to(DEVICE) for t in tensors]


def run(form: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of every floating tensor, for one random cotangent."""
    inputs = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in tensors]
    y = form(*inputs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    leaves = [t for t in inputs if t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, cotangent.to(y))]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for name, a, b in zip(("y", "dx", "dgate", "dv", "du"), ours, theirs, strict=False):
        error = torch.linalg.vector_norm(a.double() - b) / (torch.linalg.vector_norm(b) + 1e-30)
        assert error < TOLERANCE, (name, float(error))


@pytest.mark.parametrize(
    ("shape", "inner_silu"),
    [
        ((23, 60, 5, 24, 2), True),
        ((20, 32, 2, 33, 1), False),
        ((1, 17, 7, 1, 1), True),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_projection_is_the_formula(
    shape: tuple[int, ...], inner_silu: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr(tiles, "FUSED", {"ieee"})
        monkeypatch.setitem(tiles.TILES["fused"], "ieee", Tile(16, 64, 32, 32, stages=2))
    tensors = case(*shape)

    def ours(*args: Tensor) -> Tensor:
        return projection.basis_projection(*args, inner_silu=inner_silu, backend="triton")

    def formula(*args: Tensor) -> Tensor:
        return projection.gathered(*args, inner_silu=inner_silu)

    first = run(ours, tensors, torch.float32)
    assert_same(first, run(formula, tensors, torch.float64))
    again = run(ours, tensors, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("inner_silu", [False, True])
def test_another_way_to_sum_takes_the_place_of_rows(inner_silu: bool) -> None:
    tensors = case(23, 32, 5, 24, 2)
    calls = []

    def summation(pairs: Sorted) -> Summation:
        token_S = pairs.order_S.long() // 2
        channel_S = torch.arange(5, device=DEVICE).repeat_interleave(pairs.start_C1.diff())

        def sums(a_SR: Tensor, w_CRD: Tensor) -> Tensor:
            calls.append(a_SR.shape)
            row_SD = torch.einsum("sr,srd->sd", a_SR, w_CRD[channel_S])
            return row_SD.new_zeros(23, 32).index_add(0, token_S, row_SD)

        return sums

    def ours(*args: Tensor) -> Tensor:
        return triton_projection.basis_projection(*args, inner_silu=inner_silu, summation=summation)

    def formula(*args: Tensor) -> Tensor:
        return projection.gathered(*args, inner_silu=inner_silu)

    found = run(ours, tensors, torch.float32)
    assert calls == [(46, 24), (46, 24)]
    assert_same(found, run(formula, tensors, torch.float64))


def test_all_tokens_on_one_channel_and_channels_without() -> None:
    x, gate, index, v, u = case(40, 32, 3, 16, 1)
    tensors = [x, gate, torch.full_like(index, 1), v, u]
    form = {"inner_silu": True}
    ours = run(
        lambda *args: projection.basis_projection(*args, **form, backend="triton"),
        tensors,
        torch.float32,
    )
    assert_same(ours, run(lambda *args: projection.gathered(*args, **form), tensors, torch.float64))
    assert ours[3][::2].abs().max() == 0  # written, not left over


def test_no_tokens() -> None:
    tensors = case(0, 32, 6, 16, 2)
    y, *grads = run(
        lambda *args: projection.basis_projection(*args, inner_silu=True, backend="triton"),
        tensors,
        torch.float32,
    )
    assert y.shape == (0, 32)
    assert [g.shape for g in grads] == [tensors[i].shape for i in (0, 1, 3, 4)]
    assert all(not g.any() for g in grads)


def test_weights_of_another_dtype_get_their_own_gradients() -> None:
    x, gate, index, v, u = case(8, 16, 3, 16, 2)
    v, gate = v.double().requires_grad_(), gate.half().requires_grad_()
    y = projection.basis_projection(x, gate, index, v, u, inner_silu=True, backend="triton")
    y.sum().backward()
    assert y.dtype == torch.float32
    assert v.grad is not None
    assert gate.grad is not None
    assert (v.grad.dtype, gate.grad.dtype) == (torch.float64, torch.float16)
    with pytest.raises(TypeError, match="float64"):
        projection.basis_projection(
            x.double(), gate, index, v, u.double(), inner_silu=True, backend="triton"
        )


@pytest.mark.parametrize(
    "start", [[0, 5, 5, 20, 21], [0, 0, 0, 0, 19], [0, 0, 0, 0, 0], [0, 700, 700, 1900, 1901]]
)
def test_grouped_linear_is_the_reference(start: list[int]) -> None:
    rows = start[-1]
    start_G1 = torch.tensor(start, device=DEVICE)
    tensors = [torch.randn(rows, 36, device=DEVICE), torch.randn(4, 7, 36, device=DEVICE)]
    ours, theirs = (
        run(
            lambda x, w, backend=backend: projection.grouped_linear(
                x, w, start_G1, backend=backend
            ),
            tensors,
            dtype,
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert_same(ours, theirs)


def test_few_channels_of_many_rows_are_split_and_added_up() -> None:
    x, gate, index, v, u = case(1100, 20, 2, 5, 1)
    assert stages._parts(2 * 1 * 2, 1100 // 2, stages.tile_of("weights", 5, x.dtype)) > 1
    ours, theirs = (
        run(
            lambda *t, backend=backend: projection.basis_projection(
                t[0], t[1], index, t[2], t[3], inner_silu=True, backend=backend
            ),
            [x, gate, v, u],
            dtype,
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert_same(ours, theirs)


def test_every_order_of_tiles_visits_every_row() -> None:
    x, _, index, v, _ = case(40, 16, 5, 16, 2)
    order, _, start = permute.sort_pairs(index, 5)
    expected = stages.rank(x, v, order, start, 2, tile=SMALL)
    for group in (1, 3, 5, 8):
        tile = Tile(16, 16, 16, 32, group=group, stages=2)
        assert torch.equal(stages.rank(x, v, order, start, 2, tile=tile), expected)


def test_every_way_to_expand_is_one() -> None:
    _, gate, index, _, u = case(20, 48, 3, 16, 2)
    order, _, start = permute.sort_pairs(index, 3)
    z = torch.randn(40, 16, device=DEVICE)
    expected = stages.expand(z, u, order, start, gate, inner_silu=True, tile=SMALL)
    for pieces in (2, 3):
        tile = Tile(16, 16, columns=16, pieces=pieces, held=True, evict=True, registers=128)
        rows = stages.expand(z, u, order, start, gate, inner_silu=True, tile=tile)
        torch.testing.assert_close(rows, expected)


def test_tiles_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Tile.rows=48"):
        Tile(rows=48)
    with pytest.raises(ValueError, match=r"Tile.group=0"):
        Tile(group=0)
    x, gate, index, v, u = case(4, 16, 3, 24, 2)
    order, _, start = permute.sort_pairs(index, 3)
    with pytest.raises(ValueError, match="all 24 ranks"):
        stages.fused(x, gate, v, u, order, start, inner_silu=True, tile=SMALL)


def test_every_candidate_is_a_tile_of_its_rank() -> None:
    for stage in tiles.TILES:
        for rank in (64, 128, 256):
            found = list(tiles.candidates(stage, rank))
            assert len(found) == len(set(found)) > 1
            assert stage == "combine" or {tile.ranks for tile in found} == {rank}

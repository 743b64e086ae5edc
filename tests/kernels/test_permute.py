"""The counting sort: its definition, and the Triton form against the reference, bit for bit."""

import pytest
import torch

from kalmagrove_kernels import permute

pytestmark = pytest.mark.unit


def index_of(tokens: int, kept: int, channels: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(channels, (tokens, kept))


def test_the_sort_is_stable_and_invertible() -> None:
    index = index_of(50, 3, 7)
    order, place, start = permute.sort_pairs(index, 7)
    pairs = sorted(range(150), key=lambda pair: (int(index.flatten()[pair]), pair))
    assert order.tolist() == pairs
    assert place[order.long()].tolist() == list(range(150))
    channel = index.flatten()[order.long()].tolist()
    for c in range(7):
        assert set(channel[start[c] : start[c + 1]]) <= {c}
    assert start[0] == 0
    assert start[7] == 150
    assert {t.dtype for t in (order, place, start)} == {torch.int32}


@pytest.mark.parametrize(
    ("tokens", "kept", "channels"),
    [(0, 2, 3), (1, 1, 1), (63, 8, 104), (300, 3, 5), (257, 1, 2), (2, 4, 2000)],
)
def test_triton_is_the_reference(tokens: int, kept: int, channels: int) -> None:
    pytest.importorskip("triton")
    for dtype in (torch.int64, torch.int32):
        index = index_of(tokens, kept, channels).to(dtype)
        ours = permute.sort_pairs(index, channels, backend="triton")
        theirs = permute.sort_pairs(index, channels)
        for name, a, b in zip(ours._fields, ours, theirs, strict=True):
            assert a.dtype == torch.int32, name
            assert torch.equal(a, b), name


def test_all_pairs_in_one_channel_and_rows_out_of_order() -> None:
    pytest.importorskip("triton")
    one = torch.full((300, 2), 3)
    transposed = index_of(4, 90, 6).t()  # not contiguous
    for index in (one, transposed):
        ours = permute.sort_pairs(index, 6, backend="triton")
        theirs = permute.sort_pairs(index, 6)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(KeyError, match="fpga"):
        permute.sort_pairs(torch.zeros(1, 1, dtype=torch.int64), 1, backend="fpga")

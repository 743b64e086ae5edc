"""How tokens are copied for their parts, against the plain formulas."""

import pytest
import torch
from torch import Tensor

from kalmagrove.parallel import Group, Traffic, preprocess
from kalmagrove.parallel.expert import Copies, count_parts

pytestmark = pytest.mark.unit


def chosen(rows: int, slots: int, parts: int, made: float, *, of: int | None = None) -> Tensor:
    """Parts below `of`, different in a row; the share `made` of the choices, `parts` for others."""
    torch.manual_seed(rows + slots + parts)
    index = torch.rand(rows, of or parts).argsort(1)[:, :slots]
    return index.masked_fill(torch.rand(rows, slots) >= made, parts)


SHAPES = [  # the largest number of places of each type of key, and one more
    *[(rows, slots, 8) for rows in (0, 1, 7, 131) for slots in (1, 3, 8)],
    *[(300, 2, places) for places in (255, 256, 32767, 32768)],
]


@pytest.mark.parametrize("made", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(("rows", "slots", "places"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_copies_are_those_of_sorting_whole_numbers(
    rows: int, slots: int, places: int, made: float, dtype: torch.dtype
) -> None:
    place = chosen(rows, slots, places, made).to(dtype)
    copies = int((place < places).sum())
    found = Copies.to(place, places, copies)
    slot = place.flatten().argsort(stable=True)[:copies]
    count = (place < places).sum(1)
    expected = (slot, slot // slots, slot.argsort(), count.cumsum(0) - count)
    for name, value in zip(("slot_S", "row_S", "by_row_S", "start_P"), expected, strict=True):
        ours = getattr(found, name)
        assert ours.dtype == value.dtype, name
        assert torch.equal(ours, value), name
        assert ours.is_contiguous(), name
    assert torch.equal(found.place_S.to(dtype), place.flatten()[slot])


@pytest.mark.parametrize("made", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(("rows", "slots", "parts"), SHAPES)
def test_parts_are_counted_as_bincount_does(rows: int, slots: int, parts: int, made: float) -> None:
    index = chosen(rows, slots, parts, made)
    found = count_parts(index, parts)
    assert torch.equal(found, torch.bincount(index.flatten(), minlength=parts + 1)[:parts])


@pytest.mark.parametrize(("made", "of"), [(1.0, 8), (1.0, 5), (0.5, 5)])
def test_a_plan_in_a_group_of_one_knows_its_pairs_and_reads_the_rest_later(
    made: float, of: int
) -> None:
    index = chosen(31, 3, 8, made, of=of)  # of 5: the last three parts are empty
    group = Group.alone()
    plan = preprocess(index, 8, group, Traffic(), dropless=made == 1)
    assert plan.pairs == int((index < 8).sum())
    assert (plan.counted is None) == (made == 1)
    assert plan.read_rows() == [int((index == part).sum()) for part in range(8)]

"""Each rank's own time, told by the reduction of a line."""

import pytest
import torch

from kalmagrove.track.stragglers import Stragglers, rank_figures, straggler_text

pytestmark = pytest.mark.unit


def test_ranks_fill_one_place_each_and_only_own_time_counts() -> None:
    sums = [
        [{"data": 0.5, "forward": 1.5, "backward": 9.0}, {"data": 0.5, "forward": 3.5}],
        [{"data": 1.0, "forward": 3.0, "optimizer": 9.0}, {"data": 5.0, "forward": 6.0}],
    ]
    ranks = [Stragglers(rank, 2) for rank in range(2)]
    lines = []
    for number, steps in enumerate((2, 4)):
        told = [rank.own(sums[i][number], steps) for i, rank in enumerate(ranks)]
        lines.append(rank_figures(torch.stack(told).sum(0)))
    first = {"rank_seconds_min": 1.0, "rank_seconds_mean": 1.5, "rank_seconds_max": 2.0}
    second = {"rank_seconds_min": 0.5, "rank_seconds_mean": 1.125, "rank_seconds_max": 1.75}
    assert lines == [first | {"slowest_rank": 1}, second | {"slowest_rank": 1}]


def test_the_console_names_a_rank_that_stands_out() -> None:
    def said(*seconds: float) -> str | None:
        return straggler_text(rank_figures(torch.tensor(seconds, dtype=torch.float64)))

    assert said(1.0, 1.0, 1.0, 1.12) is None, "12% over the others, 9% over the mean of all"
    assert said(1.0, 1.0, 1.0, 2.0) == "rank 3 slow +60%"
    assert said(0.0) is None, "nothing was measured"
    assert straggler_text({"event": "step"}) is None, "a line of an older version"

"""What `kalmagrove bench layouts` makes of its words, before it measures."""

import pytest

from kalmagrove.bench.layouts import candidates
from kalmagrove.cli.arguments import UsageError
from kalmagrove.cli.bench_layouts import layouts as main
from kalmagrove.config import ConfigError, KalmaGroveError

pytestmark = pytest.mark.unit


def test_no_layout_of_that_name() -> None:
    with pytest.raises(KalmaGroveError, match="none is named xp 7"):
        main(["--only", "xp 7", "launch.nproc=1"])


@pytest.mark.parametrize(
    ("words", "error"),
    [(["--steps", "0"], ConfigError), (["--steps", "few"], UsageError), (["--out"], UsageError)],
)
def test_mistakes_are_one_line(words: list[str], error: type[KalmaGroveError]) -> None:
    with pytest.raises(error):
        main(words)


def test_candidates_take_each_dimension_as_far_as_it_goes() -> None:
    assert [layout.name for layout in candidates(1)] == [f"dp 1, ZeRO {s}" for s in (1, 2, 3)]
    words = {word for layout in candidates(8) for word in layout.overrides}
    assert {"parallel.tp=8", "parallel.ep=8", "parallel.cp=8", "parallel.sequence=true"} <= words

"""The learning rate: warm-up, shape, and that it depends on nothing but the step."""

import itertools

import pytest

from kalmagrove.config import Schedule
from kalmagrove.engine.schedule import lr_factor

pytestmark = pytest.mark.unit


def curve(steps: int, **fields: object) -> list[float]:
    schedule = Schedule(**fields)
    return [lr_factor(step, steps, schedule) for step in range(steps)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert curve(100, kind=kind, warmup=4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_to_final_through_its_middle() -> None:
    rates = curve(104, kind="cosine", warmup=4, final=0.1)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[53] == pytest.approx(0.55)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_wsd_is_flat_then_linear() -> None:
    rates = curve(100, kind="wsd", warmup=10, decay=0.2, final=0.0)
    assert set(rates[9:80]) == {1.0}
    assert rates[80:] == pytest.approx([1 - (i + 1) / 20 for i in range(20)])


def test_wsd_decay_never_reaches_into_the_warmup() -> None:
    rates = curve(10, kind="wsd", warmup=6, decay=1.0, final=0.0)
    assert rates[:6] == pytest.approx([(i + 1) / 6 for i in range(6)])
    assert rates[6:] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_constant_stays() -> None:
    assert curve(5, kind="constant") == [1.0] * 5


def test_single_step_and_warmup_over_the_whole_run() -> None:
    assert curve(1, kind="cosine", final=0.1) == [pytest.approx(0.1)]
    assert curve(3, kind="cosine", warmup=3)[-1] == 1.0

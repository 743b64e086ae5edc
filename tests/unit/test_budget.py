"""Caps: told early, projected, kept, and binding for the sessions after them."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_energy import Gpu
from test_meters import Session
from tiny_run import make_run

from kalmagrove.config import Budget, ConfigError, validate
from kalmagrove.track import Spent
from kalmagrove.track.budget import Pace, Watch
from kalmagrove.track.energy import Energy
from kalmagrove.track.ledger import History

pytestmark = pytest.mark.unit


def watch(lines: tuple[dict[str, Any], ...] = (), **caps: float) -> Watch:
    return Watch(validate(Budget, caps), History(lines))


def spent(usd: str | None, hours: float = 0.0) -> Spent:
    return Spent(0.0, None if usd is None else Decimal(usd), 3600 * hours)


def test_dollars_need_a_price() -> None:
    with pytest.raises(ConfigError, match=r"budget\.usd=5\.0 needs a price, and price=p has none"):
        make_run(budget={"usd": 5.0}, price={"usd_per_core_hour": None})
    with pytest.raises(ConfigError, match=r"budget\.hours=0\.0"):
        make_run(budget={"hours": 0.0})
    assert make_run(budget={"usd": 5.0}).run_name == make_run().run_name, "not part of the result"


def test_the_price_must_be_that_of_the_device(tmp_path: Path) -> None:
    price = {"usd_per_core_hour": None, "usd_per_gpu_hour": 2.0}
    run = make_run(budget={"usd": 5.0}, price=price)
    with pytest.raises(ConfigError, match="needs a price of a core, and price=p has none; set pri"):
        Session(tmp_path, run)


def test_priced_energy_must_be_measurable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalmagrove.track.energy.POWERCAP", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"price\.usd_per_kwh=0\.3 needs a counter of energy"):
        Session(tmp_path, make_run(price={"usd_per_kwh": 0.3}))


def test_a_step_that_would_not_fit_is_not_begun() -> None:
    caps = watch(usd=1.0, hours=2.0)
    assert caps.reached(spent("0.90", 1.0), spent("1.00", 1.5), 0, 16) is None
    assert caps.reached(spent("0.95", 1.0), spent("1.05", 1.5), 0, 16) == (
        "budget.usd=1 is reached: $0.95 spent, and another step with its checkpoint takes $0.10"
    )
    assert caps.met == {"usd": 1.0}
    assert watch(hours=2.0).reached(spent(None, 1.75), spent(None, 2.25), 0, 16) == (
        "budget.hours=2 is reached: 1.75 hours spent, and another step with its checkpoint takes "
        "0.50 hours"
    )
    assert watch(tokens=100).reached(spent(None), spent(None), 84, 16) is None
    assert "100 tokens spent" in str(watch(tokens=100).reached(spent("0"), spent("0"), 100, 16))
    unknown = watch(usd=1.0).reached(spent(None), spent(None), 0, 16)
    assert unknown == "budget.usd=1 cannot be kept: what the run has cost is unknown"


def test_a_cap_that_ended_the_run_must_be_raised() -> None:
    last = {"event": "stop", "budget": {"usd": 1.0}}
    little = (spent("0.5", 1.0), spent("0.6", 1.0), 0, 16)
    assert watch((last,), usd=1.0).reached(*little) is not None
    assert watch((last,), usd=2.0).reached(*little) is None
    assert watch((last,), hours=1.5).reached(*little) is None, "another cap was never reached"


def test_shares_are_told_once_with_what_the_run_will_take() -> None:
    caps = watch(usd=1.0, tokens=100)
    whole = (spent("1.5"), spent("1.4"), spent("1.6"))
    assert caps.notices(spent("0.49"), 49, lambda: whole, 200) == []
    (usd,) = caps.notices(spent("0.81"), 49, lambda: whole, 200)
    assert (usd.cap, usd.limit, usd.share) == ("usd", 1.0, 0.81), "50% is passed over"
    assert (usd.whole, usd.low, usd.high) == (1.5, 1.4, 1.6)
    assert caps.notices(spent("0.82"), 49, lambda: whole, 200) == []
    usd, tokens = caps.notices(spent("0.96"), 50, lambda: (None,) * 3, 200)
    assert (usd.share, usd.whole) == (0.96, None)
    assert (tokens.cap, tokens.share, tokens.whole) == ("tokens", 0.5, None)


def test_the_interval_is_as_wide_as_the_steps_differ() -> None:
    pace = Pace(History(()), 100)
    assert (pace.step, pace.margin(10)) == (0.0, None)
    for seconds in (1.0, 3.0, 1.0, 3.0, 2.0):
        pace.add(seconds)
    assert pace.step == 2.0
    # The mean of 5 with a standard deviation of 1: 100 more take 200 s, give or take
    # sqrt(100 + 100^2 / 5) of them.
    assert pace.margin(100) == pytest.approx(1.645 * 2100**0.5)
    steady = Pace(History(()), 100)
    for _ in range(9):
        steady.add(2.0)
    assert steady.margin(100) == 0


def test_intervals_cover_what_they_promise() -> None:
    """Of runs of 40 independent steps, about 90% end in the interval drawn after the first 20."""
    import random

    draw, covered = random.Random(0), 0
    for _ in range(200):
        steps = [draw.gauss(1.0, 0.2) for _ in range(40)]
        pace = Pace(History(()), 100)
        for seconds in steps[:20]:
            pace.add(seconds)
        margin = pace.margin(20)
        assert margin is not None
        covered += abs(sum(steps[20:]) - sum(steps[:20])) <= margin
    assert 0.85 < covered / 200 < 0.95


def session(run_dir: Path, **budget: float) -> Session:
    """2 s and 2 cents a step."""
    return Session(run_dir, make_run(steps=100, budget=budget))


def train(run: Session, first: int) -> tuple[int, str]:
    """Steps until the budget ends it; the last one and why."""
    step = first
    said = run.meters.over_budget()
    while said is None:
        run.step(step)
        if step % 5 == 0:
            run.clock.add(1.0)
            run.meters.checkpointed(step, 16 * step, run.path / "c", 1.0)
        said, step = run.meters.over_budget(), step + 1
    return step - 1, said


def test_a_run_keeps_to_its_dollars(tmp_path: Path) -> None:
    run = session(tmp_path, usd=0.30)
    run.meters.start(0, 0)
    last, said = train(run, 1)
    run.clock.add(1.0)
    run.meters.checkpointed(last, 16 * last, tmp_path / "c", 1.0)
    run.meters.stop("budget", step=last, reason=said)
    assert last == 13, "26 s of steps, 2 s of saving; after another step and its save 31 s"
    assert said.startswith("budget.usd=0.3 is reached: $0.28 spent, and another step")
    (stop,) = run.lines("stop")
    assert (stop["usd"], stop["status"], stop["budget"]) == (0.29, "budget", {"usd": 0.3})
    told = [(x["share"], x["whole"], x["low"], x["high"]) for x in run.lines("budget")]
    assert [round(share, 3) for share, *_ in told] == [0.5, 0.8]
    assert all(low <= whole <= high for _, whole, low, high in told)
    assert "50% of budget.usd=0.3 used; the whole run takes $2." in run.out.getvalue()
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "budget"


def test_what_ended_goes_on_only_with_more(tmp_path: Path) -> None:
    test_a_run_keeps_to_its_dollars(tmp_path)
    again = session(tmp_path, usd=0.30)
    again.meters.load_state_dict(again_state())
    again.meters.start(13, 208)
    assert "budget.usd=0.3 is reached" in str(again.meters.over_budget())
    again.meters.stop("budget", step=13, reason="refused")
    more = session(tmp_path, usd=0.40)
    more.meters.load_state_dict(again_state())
    more.meters.start(13, 208)
    assert more.meters.over_budget() is None
    last, _ = train(more, 14)
    assert last == 17
    assert more.meters.spent.usd is not None
    assert more.meters.spent.usd <= Decimal("0.40")


def again_state() -> dict[str, Any]:
    """Of the checkpoint at step 13."""
    return {
        "device_seconds": 28.0, "wall_seconds": 28.0, "lost_device_seconds": 0.0, "usd": 0.28,
        "joules": None, "val_loss": None,
    }  # fmt: skip


def test_hours_count_all_sessions_and_tokens_those_that_lasted(tmp_path: Path) -> None:
    first = session(tmp_path)
    first.meters.start(0, 0)
    for step in range(1, 11):
        first.step(step)
    second = session(tmp_path, hours=40.5 / 3600)
    second.meters.start(0, 0)
    assert train(second, 1)[0] == 9, "20 s were lost, 19 more: the next step and save take 3"
    third = session(tmp_path, tokens=80)
    third.meters.start(0, 0)
    assert train(third, 1)[0] == 5


def test_other_ranks_say_nothing_and_no_cap_costs_nothing(tmp_path: Path) -> None:
    run = session(tmp_path)
    run.meters.start(0, 0)
    run.step(1)
    assert run.meters.over_budget() is None
    assert run.lines("budget") == []
    capped = session(tmp_path / "other", usd=0.01)
    capped.clock.add(5.0)
    capped.meters._main = False
    assert capped.meters.over_budget() is None


def test_energy_is_paid_for_as_it_is_measured(tmp_path: Path) -> None:
    gpu = Gpu()
    price = {"usd_per_kwh": 0.36}
    run = Session(tmp_path, make_run(price=price), energy=Energy(gpu))
    run.meters.start(0, 0)
    gpu.joules = 1000.0 + 1e5
    run.step(2)
    (line,) = run.lines("step")
    assert line["usd"] == pytest.approx(0.02 + 0.01), "2 core-seconds, and 0.1 MJ at $0.1 a MJ"
    gpu.joules = None
    run.step(4)
    assert run.lines("step")[-1]["usd"] is None, "unknown, not free"

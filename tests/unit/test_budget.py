"""Caps: told early, projected, kept, and binding for the sessions after them."""

import json
import random
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_energy import Gpu
from test_meters import Session
from tiny_run import make_run

from kalmagrove.config import Budget, ConfigError, validate
from kalmagrove.track import Spent
from kalmagrove.track.budget import Pace, Watch, show
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
        "budget.usd=1 is reached: $0.95 spent, and another step with what follows it takes $0.10",
        "a higher cap",
    )
    assert caps.met == {"usd": 1.0}
    assert watch(hours=2.0).reached(spent(None, 1.75), spent(None, 2.25), 0, 16) == (
        "budget.hours=2 is reached: 1.75 hours spent, and another step with what follows it takes "
        "30 min",
        "a higher cap",
    )
    assert watch(tokens=100).reached(spent(None), spent(None), 84, 16) is None
    over = watch(tokens=100).reached(spent("0"), spent("0"), 100, 16)
    assert over == ("budget.tokens=100 is reached: 100 tokens spent", "a higher cap")
    unknown = watch(usd=1.0).reached(spent(None), spent(None), 0, 16)
    assert unknown == (
        "budget.usd=1 cannot be kept: what the run has cost is unknown", "budget.usd=null"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cap", "amount", "text"),
    [
        ("usd", 1234.565, "$1,234.57"), ("usd", 0.1, "$0.10"), ("usd", 0.28, "$0.28"),
        ("usd", 0.0412, "$0.0412"), ("usd", 0.000523, "$0.000523"), ("usd", 0.0, "$0.00"),
        ("usd", 1.23e-7, "$0.000000123"),
        ("hours", 1234.5, "1,234.50 hours"), ("hours", 1.0, "1.00 hours"),
        ("hours", 0.1604, "9.62 min"), ("hours", 1 / 60, "1 min"), ("hours", 0.00963, "34.7 s"),
        ("hours", 1e-5, "0.036 s"), ("hours", 0.0, "0 s"), ("tokens", 1e6, "1,000,000 tokens"),
        ("usd", None, "-"),
    ],
)  # fmt: skip
def test_small_amounts_keep_their_digits(cap: str, amount: float | None, text: str) -> None:
    assert show(cap, amount) == text


def test_small_caps_are_reached_in_figures_that_tell() -> None:
    said = watch(usd=0.0006).reached(spent("0.000567"), spent("0.000612"), 0, 16)
    assert said is not None
    assert said[0] == (
        "budget.usd=0.0006 is reached: $0.000567 spent, and another step with what follows it "
        "takes $0.0000450"
    )
    said = watch(hours=0.012).reached(spent(None, 0.0115), spent(None, 0.0121), 0, 16)
    assert said is not None
    assert said[0].startswith("budget.hours=0.012 (43.2 s) is reached: 41.4 s spent, and")


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


def pace(steps: int, evals: int = 10**6, saves: int = 10**6, *lines: dict[str, Any]) -> Pace:
    return Pace(
        History(lines), make_run(steps=steps, eval={"every": evals}, checkpoint={"every": saves})
    )


def trained(pace: Pace, seconds: Iterable[float], first: int = 2) -> tuple[int, float]:
    """Take steps from `first` on, one after the other, after one that does not count; the last
    one's number, and the time.
    """
    now = 500.0
    pace.train(first - 1, 100.0, now)
    step = first - 1
    for step, took in enumerate(seconds, start=first):
        now += took
        pace.train(step, took, now)
    return step, now


def test_the_interval_is_as_wide_as_the_steps_differ() -> None:
    few = pace(105)
    assert (few.step, few.left(0, 0.0)) == (0.0, None)
    step, now = trained(few, [1.0, 3.0, 1.0, 3.0])
    left = few.left(step, now)
    assert left == 200.0
    assert few.interval(step, left) == (None, None), "too few to tell"
    step, now = trained(five := pace(106), [1.0, 3.0, 1.0, 3.0, 2.0])
    assert five.step == 2.0
    left = five.left(step, now)
    assert left == 200.0
    # The mean of 5 with a standard deviation of 1: 100 more take 200 s, give or take
    # sqrt(100 + 100^2 / 5) of them; 2.132 is Student's t of four degrees of freedom.
    low, high = five.interval(step, left)
    assert low is not None
    assert high is not None
    assert (low + high) / 2 == pytest.approx(200)
    assert high - low == pytest.approx(2 * 2.132 * 2100**0.5, rel=0.01)
    step, now = trained(steady := pace(110), [2.0] * 9)
    assert steady.interval(step, steady.left(step, now)) == (200.0, 200.0)


@pytest.mark.parametrize(("before", "known"), [(0, 5), (0, 50), (60, 50), (60, 120)])
@pytest.mark.parametrize("more", [20, 1000])
def test_intervals_cover_what_they_promise(before: int, known: int, more: int) -> None:
    """Of runs whose steps are independent, about 90% end in the interval, whatever the pace was
    more than 50 steps ago.
    """
    draw, covered, runs = random.Random(before + known + more), 0, 200
    config = make_run(steps=1 + before + known + more)
    for _ in range(runs):
        times = [draw.gauss(1.0, 0.1) for _ in range(before)]
        times += [draw.gauss(3.0, 0.6) for _ in range(known)]
        run = Pace(History(()), config)
        step, now = trained(run, times)
        low, high = run.interval(step, run.left(step, now))
        assert low is not None
        assert high is not None
        covered += low <= sum(draw.gauss(3.0, 0.6) for _ in range(more)) <= high
    assert 0.85 < covered / runs < 0.95


def test_a_new_pace_is_believed_after_fifty_steps() -> None:
    run = pace(2101)
    step, now = trained(run, [1.0] * 1000 + [3.0] * 100)
    assert run.left(step, now) == 3000
    assert run.interval(step, 3000.0) == (3000.0, 3000.0)
    run = pace(2101)
    step, now = trained(run, [1.0] * 1000 + [3.0] * 30)
    left = run.left(step, now)
    assert left == pytest.approx(2.2 * 1070)
    low, high = run.interval(step, left)
    assert low is not None
    assert high is not None
    assert 1070 < low < 3 * 1070 < high, "the new pace is held to be possible before"


def test_neighbouring_steps_that_are_alike_widen_the_interval() -> None:
    """In tens of slow and fast ones the mean is less sure than with as many in turns."""
    widths = []
    for times in ([1.0, 3.0] * 25, ([1.0] * 10 + [3.0] * 10) * 2 + [1.0] * 10):
        step, now = trained(run := pace(1051), times)
        low, high = run.interval(step, run.left(step, now))
        assert low is not None
        assert high is not None
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_pauses_are_foreseen_as_often_as_they_are_due() -> None:
    run = pace(95, 10, 40)
    step, now = trained(run, [2.0] * 9)
    assert (step, run.left(step, now)) == (10, 170.0), "no evaluation is known"
    run.evaluated(10, 5.0)
    assert run.left(step, now + 5) == 170 + 9 * 5, "at 20, 30 ... 90, and at the end"
    run.waited(10, 7.0)  # a stop, say
    assert run.left(step, now + 12) == 170 + 9 * 5 + 3 * 7, "at 40 and 80, and at the end"
    now += 12
    for step in range(11, 21):
        now += 2
        run.train(step, 2.0, now)
    assert run.left(20, now) == 150 + 9 * 5 + 3 * 7, "that of step 20 is still to come"
    run.evaluated(20, 7.0)
    assert run.left(20, now + 7) == 150 + 8 * 6 + 3 * 7
    low, high = run.interval(20, 219.0)
    assert low is not None
    assert high is not None
    # Evaluations of 5 and 7 s: 8 more take sqrt(2 * (8 + 8^2 / 2)) s more or less
    assert (low + high) / 2 == pytest.approx(219)
    assert high - low == pytest.approx(2 * 2.015 * 80**0.5, rel=0.01)
    now += 7 + 10
    assert run.left(20, now) == pytest.approx(219 + 75 * 10 / 19), "idle for 10 s in 19 steps"


def test_after_the_last_step_its_pauses_are_left() -> None:
    run = pace(20, 10, 10)
    step, now = trained(run, [2.0] * 9)
    run.evaluated(10, 4.0)
    run.waited(10, 1.0)
    for step in range(11, 21):
        run.train(step, 2.0, now + 5 + 2 * (step - 10))
    assert run.left(20, now + 25) == 5.0
    run.evaluated(20, 4.0)
    assert run.left(20, now + 29) == 1.0
    run.waited(20, 1.0)
    assert run.left(20, now + 30) == 0.0


@pytest.mark.parametrize(("most", "tokens"), [(None, 960), (96, 96)])
def test_the_first_evaluation_is_guessed_by_its_tokens(most: int | None, tokens: int) -> None:
    """Forward passes are a third of steps, which have 16 tokens here."""
    run = Pace(History(()), make_run(steps=40, eval={"every": 20, "max_tokens": most}), 960)
    assert run.evaluation == 0.0, "no step is known"
    step, now = trained(run, [2.0] * 9)
    guess = tokens / 16 / 3 * 2
    assert run.evaluation == pytest.approx(guess)
    assert run.left(step, now) == pytest.approx(30 * 2 + 2 * guess)
    run.evaluated(20, 7.0)
    assert run.evaluation == 7.0


def test_a_checkpoint_in_the_background_is_what_training_waits_for() -> None:
    run = pace(41, 10**6, 20)
    trained(run, [2.0] * 19)
    run.waited(20, 1.0)
    run.train(21, 2.0, 542.0)
    run.waited(20, 0.5)
    assert run.left(21, 541.5) == 20 * 2 + 2 * 1.5, "at 40 and 41"


def test_pauses_of_earlier_sessions_stand_for_those_to_come() -> None:
    at = {"step": 20, "seconds": 9.0}
    lines = [{"event": "step", "step_seconds": 2.0, **at}, {"event": "eval", **at}]
    run = pace(40, 20, 20, *lines, {"event": "checkpoint", **at})
    assert (run.step, run.evaluation, run.checkpoint) == (2.0, 9.0, 9.0)
    step, now = trained(run, [2.0, 2.0], first=22)
    assert run.left(step, now) == 17 * 2 + 9 + 9
    run = pace(40, 20, 20, *lines, {"event": "checkpoint", "saved": 20, **at})
    assert run.checkpoint == 9.0
    step, now = trained(run, [2.0, 2.0], first=22)
    assert run.left(step, now) == 17 * 2 + 9, "it was written in the background"


def session(run_dir: Path, **budget: float) -> Session:
    """2 s and 2 cents a step."""
    return Session(run_dir, make_run(steps=100, budget=budget))


def train(run: Session, first: int) -> tuple[int, tuple[str, str]]:
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
    run.meters.stop("budget", step=last, reason=said[0])
    assert last == 13, "26 s of steps, 2 s of saving; after another step and its save 31 s"
    assert said[0].startswith("budget.usd=0.3 is reached: $0.28 spent, and another step")
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

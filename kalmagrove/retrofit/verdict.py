"""What a comparison comes to, in a word and in one plain sentence.

Used by `statistics`, whose docstring says why three seeds decide as they do.
"""

from typing import Literal

from kalmagrove.retrofit.resampling import ALPHA, Interval

Outcome = Literal["none", "unconfirmed", "detected"]


def judge(interval: Interval, p: float, spread: Interval | None) -> Outcome:
    """Detected: not 0 by the interval and by the corrected p, nor by the spread over seeds."""
    if p >= ALPHA or interval[0] <= 0 <= interval[1]:
        return "none"
    if spread is not None and spread[0] <= 0 <= spread[1]:
        return "unconfirmed"
    return "detected"


def detectable(interval: Interval, spread: Interval | None) -> float:
    """The difference below which `judge` would not say detected: half the wider interval."""
    return max((high - low) / 2 for low, high in (interval, spread or interval))


def accuracy_verdict(
    names: tuple[str, str],
    difference: float,
    interval: Interval,
    outcome: Outcome,
    seeds: int,
    spread: Interval | None,
    comparisons: int,
) -> str:
    """One plain sentence."""
    said = (
        f"{names[0]} vs {names[1]}: {points(difference)} points of accuracy, 95% interval "
        f"[{points(interval[0])}, {points(interval[1])}]: "
    )
    if outcome == "none":
        said += "no difference detected at this sample size"
        if not interval[0] <= 0 <= interval[1]:
            said += f" once {comparisons} comparisons are allowed for"
        least = detectable(interval, spread)
        by_seeds = f" with {seeds} seeds" if least > detectable(interval, None) else ""
        said += (
            f" (differences below about {100 * least:.1f} points would not be seen{by_seeds})"
            if least
            else " (the answers are the same)"
        )
    elif outcome == "unconfirmed" and spread is not None:
        said += (
            f"these runs differ, but {seeds} seeds do not show that others would (over seeds alone "
            f"[{points(spread[0])}, {points(spread[1])}])"
        )
    else:
        said += f"{names[0]} is {'better' if difference > 0 else 'worse'}"
    return said + ("; one seed says nothing of others" if seeds == 1 else "")


def loss_verdict(
    names: tuple[str, str],
    difference: float,
    interval: Interval | None,
    outcome: Outcome,
    pairs: int,
) -> str:
    """One plain sentence."""
    said = f"{names[0]} vs {names[1]}: {nats(difference)} nats of held-out loss"
    if interval is None:
        return f"{said}; one pair of runs says nothing of others"
    low, high = interval
    said += f", 95% interval [{nats(low)}, {nats(high)}] over {pairs} seeds: "
    if outcome == "none":
        return (
            f"{said}no difference detected at this sample size (differences below about "
            f"{(high - low) / 2:.4f} nats would not be seen)"
        )
    return said + f"{names[0]} is {'better' if difference < 0 else 'worse'}"


def baseline_verdict(
    name: str, accuracy: float, interval: Interval, random: float, majority: float
) -> str:
    """One plain sentence. The baselines are taken as known: they are of these very items."""
    above = [interval[0] > baseline for baseline in (majority, random)]
    over = ["above" if is_above else "not above" for is_above in above]
    return (
        f"{name}: {100 * accuracy:.1f}% [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}] is "
        f"{over[0]} always giving the commonest answer ({100 * majority:.1f}%) "
        f"{'and' if above[0] == above[1] else 'but'} {over[1]} guessing ({100 * random:.1f}%)"
    )


def points(share: float) -> str:
    """A difference of shares in signed points.

    >>> points(-0.0041), points(0.0), points(-0.0001)
    ('-0.4', '0.0', '0.0')
    """
    return signed(100 * share, 1)


def nats(value: float) -> str:
    return signed(value, 4)


def signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]

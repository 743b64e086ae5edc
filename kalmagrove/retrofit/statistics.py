"""What an experiment with arms and seeds shows, and what it does not.

`summarise` reads finished runs (`results`) and compares their arms; `table` writes what it finds.

How arms are compared. Accuracy is the macro average over tasks. Each of many resamples draws the
items of every task anew, the same ones for all runs, and the seeds, the same ones for both arms:
the 2.5% and 97.5% quantiles of the difference are its interval (a crossed, paired bootstrap). An
arm that trains nothing has one run, which stands beside each seed of the other. Tasks are not
drawn: nothing is said of other tasks. P-values are corrected for the number of comparisons (Holm).

What three seeds can show. The bootstrap redraws the seeds there are; of others it knows nothing.
Where the spread is one of seeds, its 95% interval of three seeds covers the truth about 75 times in
100, however many items there are. Hence a difference counts as detected only if the t interval of
the paired differences, one a seed, leaves out zero too: with three seeds that takes a mean of 2.5
of their standard deviations, so true differences will often be missed. On the other hand, where
runs answer at random, the bootstrap counts that noise twice, once as items and once as seeds, and
its interval is up to 1.5 times too wide. With one seed nothing is said of others, and a verdict
says so.

Letters: N items of a task, R runs, B resamples, S seeds.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kalmagrove.config.errors import ConfigError
from kalmagrove.retrofit.resampling import (
    LEVEL,
    Interval,
    Matrix,
    Vector,
    bootstrap_p,
    draw_items,
    holm,
    interval_of,
    t_interval,
    t_test,
)
from kalmagrove.retrofit.results import Arm, ArmRecord, Results, Task, read_results
from kalmagrove.retrofit.verdict import (
    Outcome,
    accuracy_verdict,
    baseline_verdict,
    detectable,
    judge,
    loss_verdict,
)


@dataclass(frozen=True)
class Spread:
    """Of one number over the seeds of an arm."""

    mean: float
    sd: float | None  # sample standard deviation; None of one run
    values: tuple[float, ...]  # by seed


@dataclass(frozen=True)
class ArmSummary:
    """One arm. Accuracies are shares; of figures that some run does not know there is None."""

    arm: str
    seeds: tuple[int, ...]
    fixed: bool  # trains nothing and has one run
    macro: Spread
    macro_interval: Interval
    micro: Spread
    tasks: dict[str, Spread]
    parse_failures: Spread | None  # macro average over the tasks that count them
    val_nats: Spread | None
    bits_per_byte: Spread | None
    trainable_parameters: int
    total_parameters: int
    peak_bytes: int | None  # the largest
    tokens_per_second: Spread | None
    train_seconds: Spread | None
    usd: Spread | None  # of one run
    devices: tuple[str, ...]
    above_random: bool
    above_majority: bool
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `arm` less that of `reference`, as shares."""

    arm: str
    reference: str
    seeds: int  # over which pairs vary: 0 if neither arm has any
    difference: float  # of macro averages
    interval: Interval  # bootstrap over items and seeds
    p: float
    p_holm: float
    detectable: float  # half the width of the wider interval: less would not be seen
    seed_interval: Interval | None  # t, over seeds alone
    micro_difference: float
    micro_interval: Interval
    tasks: dict[str, float]  # difference of each task, for looking at only
    outcome: Outcome
    verdict: str


@dataclass(frozen=True)
class LossComparison:
    """Held-out loss of `arm` less that of `reference`, in nats: paired t over seeds.

    The held-out text is taken as given. With one pair there is a difference and nothing else.
    """

    arm: str
    reference: str
    seeds: int
    difference: float
    interval: Interval | None
    p: float | None
    p_holm: float | None
    detectable: float | None
    outcome: Outcome
    verdict: str


@dataclass(frozen=True)
class Summary:
    """The whole experiment."""

    reference: str
    seeds: tuple[int, ...]
    tasks: tuple[Task, ...]
    random: float  # macro averages
    majority: float
    arms: tuple[ArmSummary, ...]
    comparisons: tuple[Comparison, ...]
    losses: tuple[LossComparison, ...]
    level: float
    resamples: int
    bootstrap_seed: int

    @property
    def items(self) -> int:
        return sum(task.items for task in self.tasks)


def summarise(
    folders: Sequence[str | Path],
    *,
    reference: str,
    pairs: Sequence[tuple[str, str]] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Summary:
    """Compare every arm with `reference`, and the first of each pair with its second.

    Args:
        folders: one a run; see `read_results`.
        resamples: of the bootstrap, which begins from `seed`.

    Raises:
        DataError: the runs cannot be read or compared.
        ConfigError: an arm that is named is not there, or there are too few resamples.
    """
    return compare(read_results(folders), reference, pairs, resamples, seed)


def compare(
    results: Results,
    reference: str,
    pairs: Sequence[tuple[str, str]] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Summary:
    """See `summarise`."""
    chosen = _comparisons(results, reference, pairs or ())
    if resamples < 100:
        raise ConfigError("resamples", resamples, "must be at least 100", "try 10000")
    drawn = Resampled(results, resamples, np.random.default_rng(seed))
    random, majority = (
        float(np.mean([getattr(task, key) for task in results.tasks]))
        for key in ("random", "majority")
    )
    return Summary(
        reference=reference,
        seeds=results.seeds,
        tasks=results.tasks,
        random=random,
        majority=majority,
        arms=tuple(_arm(results, arm, drawn, random, majority) for arm in results.arms),
        comparisons=_accuracy(results, chosen, drawn),
        losses=_loss(results, chosen),
        level=LEVEL,
        resamples=resamples,
        bootstrap_seed=seed,
    )


def _comparisons(
    results: Results, reference: str, pairs: Sequence[tuple[str, str]]
) -> list[tuple[Arm, Arm]]:
    """Every comparison once, in whichever order it is asked for first."""
    names = [arm.name for arm in results.arms]
    for key, name in (("reference", reference), *(("pairs", name) for p in pairs for name in p)):
        if name not in names:
            raise ConfigError(key, name, "is no arm of these runs", f"use one of {names}")
    if same := [one for one, other in pairs if one == other]:
        raise ConfigError("pairs", same[0], "must be two arms, not one twice")
    wanted = [*((name, reference) for name in names if name != reference), *pairs]
    once = {frozenset(pair): pair for pair in reversed(wanted)}
    return [
        (results.arm(one), results.arm(other))
        for one, other in wanted
        if once.pop(frozenset((one, other)), None)
    ]


class Resampled:
    """Accuracies of all runs on drawn items, and drawn seeds: the same for every comparison.

    Items are drawn within tasks. `count_BS` says how often each seed was drawn.
    """

    def __init__(self, results: Results, resamples: int, rng: np.random.Generator) -> None:
        runs = len(results.records)
        self.macro_BR: Matrix = np.zeros((resamples, runs))
        self.micro_BR: Matrix = np.zeros((resamples, runs))
        items = sum(task.items for task in results.tasks)
        for correct_NR in results.correct:
            count = len(correct_NR)
            right_BR = draw_items(correct_NR, resamples, rng)
            self.macro_BR += right_BR / (count * len(results.tasks))
            self.micro_BR += right_BR / items
        size = len(results.seeds)
        self.share_BS: Matrix = rng.multinomial(size, [1 / size] * size, resamples) / size

    def arm(self, values_BR: Matrix, arm: Arm) -> Vector:
        """Its mean over the drawn seeds [B]."""
        own_BS = values_BR[:, arm.columns]
        return own_BS[:, 0] if arm.fixed else (own_BS * self.share_BS).sum(axis=1)

    def difference(self, values_BR: Matrix, arm: Arm, other: Arm) -> Vector:
        """Of two arms, paired by item and seed [B]."""
        apart_BS = values_BR[:, arm.columns] - values_BR[:, other.columns]
        both_fixed = arm.fixed and other.fixed
        return apart_BS[:, 0] if both_fixed else (apart_BS * self.share_BS).sum(axis=1)


def _accuracy(
    results: Results, chosen: list[tuple[Arm, Arm]], drawn: Resampled
) -> tuple[Comparison, ...]:
    tasks_R = [correct_NR.mean(axis=0) for correct_NR in results.correct]
    macro_R, micro_R = np.mean(tasks_R, axis=0), np.concatenate(results.correct).mean(axis=0)
    draws = [drawn.difference(drawn.macro_BR, *pair) for pair in chosen]
    p = [bootstrap_p(draw_B) for draw_B in draws]
    found = []
    for pair, draw_B, own, corrected in zip(chosen, draws, p, holm(p), strict=True):
        by_seed = paired(macro_R, *pair)
        low, high = interval_of(draw_B)
        seeds = 0 if all(arm.fixed for arm in pair) else len(by_seed)
        spread = t_interval(by_seed) if seeds > 1 else None
        outcome = judge((low, high), corrected, spread)
        found.append(
            Comparison(
                arm=pair[0].name,
                reference=pair[1].name,
                seeds=seeds,
                difference=float(by_seed.mean()),
                interval=(low, high),
                p=own,
                p_holm=corrected,
                detectable=detectable((low, high), spread),
                seed_interval=spread,
                micro_difference=float(paired(micro_R, *pair).mean()),
                micro_interval=interval_of(drawn.difference(drawn.micro_BR, *pair)),
                tasks={
                    task.name: float(paired(of_R, *pair).mean())
                    for task, of_R in zip(results.tasks, tasks_R, strict=True)
                },
                outcome=outcome,
                verdict=accuracy_verdict(
                    (pair[0].name, pair[1].name),
                    float(by_seed.mean()),
                    (low, high),
                    outcome,
                    seeds,
                    spread,
                    len(chosen),
                ),
            )
        )
    return tuple(found)


def _loss(results: Results, chosen: list[tuple[Arm, Arm]]) -> tuple[LossComparison, ...]:
    """Of the pairs whose runs all know their held-out loss."""
    known = [record.val_nats for record in results.records]
    loss_R = np.array([math.nan if nats is None else nats for nats in known])
    pairs = [(pair, paired(loss_R, *pair)) for pair in chosen]
    pairs = [(pair, by_seed) for pair, by_seed in pairs if not np.isnan(by_seed).any()]
    p = [t_test(by_seed) for _, by_seed in pairs]
    tested = iter(holm([value for value in p if value is not None]))
    found = []
    for (pair, by_seed), own in zip(pairs, p, strict=True):
        corrected = None if own is None else next(tested)
        interval = None if own is None else t_interval(by_seed)
        outcome: Outcome = "none"
        if interval is not None and corrected is not None:
            outcome = judge(interval, corrected, None)
        names = pair[0].name, pair[1].name
        difference = float(by_seed.mean())
        found.append(
            LossComparison(
                arm=names[0],
                reference=names[1],
                seeds=0 if all(arm.fixed for arm in pair) else len(by_seed),
                difference=difference,
                interval=interval,
                p=own,
                p_holm=corrected,
                detectable=None if interval is None else (interval[1] - interval[0]) / 2,
                outcome=outcome,
                verdict=loss_verdict(names, difference, interval, outcome, len(by_seed)),
            )
        )
    return tuple(found)


def _arm(
    results: Results, arm: Arm, drawn: Resampled, random: float, majority: float
) -> ArmSummary:
    records, columns = results.of_arm(arm), list(arm.columns)
    tasks = [correct_NR[:, columns].mean(axis=0) for correct_NR in results.correct]
    low, high = interval_of(drawn.arm(drawn.macro_BR, arm))
    macro = spread_of(np.mean(tasks, axis=0))
    above_random, above_majority = low > random, low > majority

    def over_seeds(key: str) -> Spread | None:
        return known_spread([getattr(record, key) for record in records])

    return ArmSummary(
        arm=arm.name,
        seeds=arm.seeds,
        fixed=arm.fixed,
        macro=macro,
        macro_interval=(low, high),
        micro=spread_of(np.concatenate(results.correct)[:, columns].mean(axis=0)),
        tasks={task.name: spread_of(of) for task, of in zip(results.tasks, tasks, strict=True)},
        parse_failures=known_spread(list(_parse_failures(results, columns))),
        val_nats=over_seeds("val_nats"),
        bits_per_byte=over_seeds("bits_per_byte"),
        trainable_parameters=records[0].trainable_parameters,
        total_parameters=records[0].total_parameters,
        peak_bytes=_largest(records),
        tokens_per_second=over_seeds("tokens_per_second"),
        train_seconds=over_seeds("train_seconds"),
        usd=over_seeds("usd"),
        devices=tuple(sorted({record.device for record in records if record.device})),
        above_random=above_random,
        above_majority=above_majority,
        verdict=baseline_verdict(arm.name, macro.mean, (low, high), random, majority),
    )


def _parse_failures(results: Results, columns: list[int]) -> Iterator[float | None]:
    """By run, the mean over the tasks that count them."""
    for column in columns:
        shares = [row[column] for row in results.parse_failures]
        told = [share for share in shares if share is not None]
        yield float(np.mean(told)) if told else None


def _largest(records: Iterable[ArmRecord]) -> int | None:
    return max((r.peak_bytes for r in records if r.peak_bytes is not None), default=None)


def paired(values_R: Vector, arm: Arm, other: Arm) -> Vector:
    """Differences by seed; a single one between arms without seeds."""
    mine, its = values_R[list(arm.columns)], values_R[list(other.columns)]
    return np.asarray(mine - its, dtype=np.float64)  # one run broadcasts over seeds


def spread_of(values: Sequence[float] | Vector) -> Spread:
    array = np.asarray(values, dtype=np.float64)
    sd = float(array.std(ddof=1)) if len(array) > 1 else None
    return Spread(float(array.mean()), sd, tuple(array.tolist()))


def known_spread(values: Sequence[float | None]) -> Spread | None:
    """None if any value is not known."""
    known = [value for value in values if value is not None]
    return spread_of(known) if len(known) == len(values) else None

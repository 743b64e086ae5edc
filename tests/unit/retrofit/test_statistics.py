"""Arms compared: reading of runs, intervals on simulated answers, verdicts, tables."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from kalmagrove.config.errors import ConfigError, DataError
from kalmagrove.retrofit.resampling import (
    bootstrap_p,
    draw_items,
    holm,
    t_inside,
    t_interval,
    t_quantile,
    t_test,
)
from kalmagrove.retrofit.results import Arm, ArmRecord, Results, Task, read_results
from kalmagrove.retrofit.statistics import Resampled, compare, summarise
from kalmagrove.retrofit.table import to_console, to_json, to_markdown
from kalmagrove.retrofit.verdict import points

pytestmark = pytest.mark.unit
SEEDS = (1, 2, 3)
TASKS = 3
GOLDEN = """\
2 arms, seeds 1, 2, 2 tasks, 8 items. Accuracy is the mean over tasks; ± is the standard deviation \
over seeds; intervals are of 95%, by 100 resamples of items and seeds (bootstrap seed 0).

**Results**

| arm | seeds | accuracy % | interval | by items % | parse failures % | held-out nats | bits/byte |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| untouched | one run | 0.0 | [0.0, 0.0] | 0.0 | 1.0 | 2.5000 | - |
| kan | 2 | 100.0 ± 0.0 | [100.0, 100.0] | 100.0 ± 0.0 | 1.0 ± 0.0 | 1.2500 ± 0.0707 | - |
| commonest answer | - | 30.0 | - | - | - | - | - |
| guessing | - | 25.0 | - | - | - | - | - |

**Cost**

| arm | trainable | total | peak GiB | tokens/s | seconds | \\$ a run | device |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| untouched | 0 | 2,000 | - | - | - | - | cpu |
| kan | 1,000 | 2,000 | 1.50 | 1,234 | 60 | &lt;\\$0.01 | cpu |

**Accuracy by task, %**

| task | items | guessing | commonest | untouched | kan |
| --- | ---: | ---: | ---: | ---: | ---: |
| a | 4 | 25.0 | 30.0 | 0.0 | 100.0 ± 0.0 |
| b | 4 | 25.0 | 30.0 | 0.0 | 100.0 ± 0.0 |

**Differences**

| accuracy, points | difference | interval | seeds alone | p | p (Holm) | least seen | outcome |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| kan - untouched | +100.0 | [+100.0, +100.0] | [+100.0, +100.0] | 0.020 | 0.020 | 0.0 | detected |

**Differences of held-out loss**

| held-out loss, nats | difference | interval | p | p (Holm) | least seen | outcome |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| kan - untouched | -1.2500 | [-1.8853, -0.6147] | 0.025 | 0.025 | 0.6353 | detected |

**Arms against one another**

- kan vs untouched: +100.0 points of accuracy, 95% interval [+100.0, +100.0]: kan is better

**Held-out loss**

- kan vs untouched: -1.2500 nats of held-out loss, 95% interval [-1.8853, -0.6147] over 2 seeds: \
kan is better

**Arms against answers that need no model**

- untouched: 0.0% [0.0, 0.0] is not above always giving the commonest answer (30.0%) and not above \
guessing (25.0%)
- kan: 100.0% [100.0, 100.0] is above always giving the commonest answer (30.0%) and above \
guessing (25.0%)
"""


def write_run(folder: Path, arm: str, seed: int, answers: dict[str, list[int]], **more: Any) -> str:
    """A finished run as training and evaluation leave it."""
    record = {
        "arm": arm, "seed": seed, "trainable_parameters": 1000, "total_parameters": 2000,
        "peak_bytes": 3 * 2**29, "tokens_per_second": 1234.0, "usd": 0.002, "train_seconds": 60.0,
        "val_nats": None, "bits_per_byte": None, "device": "cpu",
    } | more  # fmt: skip
    items = folder / "evaluation" / "bbh" / "items"
    items.mkdir(parents=True)
    (folder / "arm.json").write_text(json.dumps(record))
    tasks = {}
    for name, right in answers.items():
        lines = [json.dumps({"id": i, "correct": c}) for i, c in enumerate(right)]
        (items / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        acc = {"value": sum(right) / len(right), "stderr": 0.0}
        tasks[name] = {
            "n": len(right), "metrics": {"acc": acc}, "random": 0.25, "majority": 0.3,
            "parse_failures": 0.01,
        }  # fmt: skip
    (items.parent / "results.json").write_text(json.dumps({"tasks": tasks}))
    return str(folder)


def small(tmp_path: Path) -> list[str]:
    """An untouched model that is always wrong and two seeds of one that is always right."""
    wrong, right = ({name: [value] * 4 for name in "ab"} for value in (0, 1))
    nothing = {"trainable_parameters": 0, "peak_bytes": None, "usd": None, "val_nats": 2.5}
    nothing |= {"tokens_per_second": None, "train_seconds": None}
    return [
        write_run(tmp_path / "untouched", "untouched", 0, wrong, **nothing),
        *(write_run(tmp_path / f"kan{s}", "kan", s, right, val_nats=1.1 + 0.1 * s) for s in (1, 2)),
    ]


def simulated(correct_NR: np.ndarray, arms: dict[str, int], **more: list[float]) -> Results:
    """Answers by item and run; `arms`: name -> runs, those with one run being fixed."""
    made, records = [], []
    for name, runs in arms.items():
        columns = tuple(range(len(records), len(records) + runs))
        made.append(Arm(name, SEEDS[:runs], columns, fixed=runs == 1))
        records += [
            ArmRecord(
                arm=name,
                seed=SEEDS[i],
                trainable_parameters=int(runs > 1),
                total_parameters=1,
                **{key: values[columns[i]] for key, values in more.items()},
            )
            for i in range(runs)
        ]
    parts = np.array_split(correct_NR.astype(float), TASKS)
    tasks = tuple(Task(f"t{i}", len(part), 0.25, 0.3) for i, part in enumerate(parts))
    none = tuple((None,) * len(records) for _ in tasks)
    return Results(tuple(made), tasks, tuple(records), tuple(parts), none)


def answers(rng: np.random.Generator, by_run: list[float], items: int = 600) -> np.ndarray:
    """Runs answer the items of a common difficulty, each with its own chance beside it."""
    hard_N1 = rng.beta(2, 2, size=(items, 1))
    return rng.random((items, len(by_run))) < np.clip(hard_N1 + np.array(by_run), 0, 1)


def test_intervals_over_items_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for trial in range(150):
        results = simulated(answers(rng, [0.0, 0.0]), {"a": 1, "b": 1})
        (found,) = compare(results, "b", resamples=300, seed=trial).comparisons
        assert (found.seeds, found.seed_interval) == (0, None)
        inside.append(found.interval[0] <= 0 <= found.interval[1])
    assert 0.9 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize(("seed_sd", "least"), [(0.0, 0.95), (0.3, 0.6)])
def test_three_seeds_do_not_detect_what_is_not_there(seed_sd: float, least: float) -> None:
    rng = np.random.default_rng(1)
    inside, outcomes = [], []
    for trial in range(100):
        by_run = rng.normal(0, seed_sd, size=6).tolist()
        results = simulated(answers(rng, by_run), {"a": 3, "b": 3})
        (found,) = compare(results, "b", resamples=200, seed=trial).comparisons
        inside.append(found.interval[0] <= 0 <= found.interval[1])
        outcomes.append(found.outcome)
    assert np.mean(inside) >= least
    assert outcomes.count("detected") <= 10
    if seed_sd:  # as the module says: the bootstrap alone would be wrong about one time in four
        assert np.mean(inside) <= 0.85
        assert outcomes.count("unconfirmed") >= 10


def test_a_known_difference_is_detected() -> None:
    rng = np.random.default_rng(2)
    results = simulated(
        answers(rng, [0.15] * 3 + [0.0] * 3 + [0.0], 3000), {"a": 3, "b": 3, "c": 1}
    )
    summary = compare(results, "b", [("a", "c"), ("b", "c"), ("b", "a")], resamples=1000)
    pairs = [(c.arm, c.reference) for c in summary.comparisons]
    assert pairs == [("a", "b"), ("c", "b"), ("a", "c")], "every comparison once"
    truth = np.clip(rng.beta(2, 2, size=100_000) + 0.15, 0, 1).mean() - 0.5
    by_pair = dict(zip(pairs, summary.comparisons, strict=True))
    for pair in (("a", "b"), ("a", "c")):
        found = by_pair[pair]
        assert found.outcome == "detected"
        assert found.interval[0] < truth < found.interval[1]
        assert found.p_holm == pytest.approx(3 * found.p)
        assert found.verdict.endswith("a is better")
    assert by_pair["c", "b"].outcome == "none"
    assert by_pair["c", "b"].seeds == 3
    assert "no difference detected at this sample size (differences below about" in (
        by_pair["c", "b"].verdict
    )


def test_identical_arms_show_no_difference() -> None:
    rng = np.random.default_rng(3)
    own = answers(rng, [0.0] * 3)
    loss = [1.0, 1.1, 1.2] * 2
    results = simulated(np.hstack([own, own]), {"a": 3, "b": 3}, val_nats=loss)
    summary = compare(results, "b", resamples=500)
    (found,) = summary.comparisons
    assert (found.difference, found.interval, found.micro_interval) == (0.0, (0.0, 0.0), (0.0, 0.0))
    assert (found.p, found.p_holm, found.detectable, found.outcome) == (1.0, 1.0, 0.0, "none")
    assert found.verdict == (
        "a vs b: 0.0 points of accuracy, 95% interval [0.0, 0.0]: no difference detected at this "
        "sample size (the answers are the same)"
    )
    (lost,) = summary.losses
    assert (lost.difference, lost.p, lost.outcome) == (0.0, 1.0, "none")


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(4)
    own = answers(rng, [0.0] * 3)
    other = own ^ (rng.random(own.shape) < 0.05)
    apart = np.concatenate([rng.permutation(part) for part in np.array_split(other, TASKS)])
    widths = []
    for its in (other, apart):
        results = simulated(np.hstack([own, its]), {"a": 3, "b": 3})
        (found,) = compare(results, "b", resamples=1000).comparisons
        widths.append(found.interval[1] - found.interval[0])
    assert widths[0] < 0.6 * widths[1]


def test_one_seed_says_so() -> None:
    rng = np.random.default_rng(5)
    results = simulated(answers(rng, [0.0, 0.0]), {"a": 1, "b": 1}, val_nats=[1.0, 2.0])
    arms = tuple(Arm(arm.name, arm.seeds, arm.columns, fixed=False) for arm in results.arms)
    results = Results(arms, results.tasks, results.records, results.correct, results.parse_failures)
    summary = compare(results, "b", resamples=200)
    assert summary.comparisons[0].verdict.endswith("; one seed says nothing of others")
    assert summary.arms[0].macro.sd is None
    (lost,) = summary.losses
    assert (lost.interval, lost.p, lost.outcome) == (None, None, "none")
    assert lost.verdict == (
        "a vs b: -1.0000 nats of held-out loss; one pair of runs says nothing of others"
    )


def test_an_arm_at_the_baseline_is_called_so() -> None:
    rng = np.random.default_rng(6)
    right = rng.random((600, 2)) < np.array([0.3, 0.27])
    summary = compare(simulated(right, {"a": 1, "b": 1}), "b", resamples=500)
    assert [arm.above_majority for arm in summary.arms] == [False, False]
    assert "is not above always giving the commonest answer (30.0%)" in summary.arms[1].verdict


def test_draws_are_of_whole_items() -> None:
    """Runs see the same items: those with equal answers have equal sums in every draw."""
    rng = np.random.default_rng(7)
    correct_NR = (rng.random((50, 3)) < 0.5).astype(float)
    correct_NR[:, 2] = 1 - correct_NR[:, 0]
    right_BR = draw_items(correct_NR, 4000, rng)
    assert np.array_equal(right_BR[:, 0] + right_BR[:, 2], np.full(4000, 50.0))
    share = correct_NR.mean(axis=0)
    assert right_BR.mean(axis=0) / 50 == pytest.approx(share, abs=0.005)
    want = 50 * share * (1 - share)
    assert right_BR.var(axis=0) == pytest.approx(want, rel=0.1)


def test_the_bootstrap_seed_decides() -> None:
    results = simulated(answers(np.random.default_rng(8), [0.0] * 4), {"a": 3, "b": 1})
    one, same, other = (compare(results, "b", resamples=200, seed=s) for s in (0, 0, 1))
    assert one == same
    assert one.comparisons != other.comparisons
    drawn = Resampled(results, 200, np.random.default_rng(0))
    assert drawn.share_BS.sum(axis=1) == pytest.approx(np.ones(200))


def test_small_tests_agree_with_scipy() -> None:
    for df in (1, 2, 3, 4, 7, 30):
        assert t_quantile(0.975, df) == pytest.approx(stats.t.ppf(0.975, df))
        assert t_inside(1.3, df) == pytest.approx(2 * stats.t.cdf(1.3, df) - 1)
    values = np.array([0.1, 0.4, 0.3])
    told = stats.ttest_1samp(values, 0)
    assert t_test(values) == pytest.approx(told.pvalue)
    assert t_interval(values) == pytest.approx(tuple(told.confidence_interval(0.95)))
    assert (t_test(values[:1]), t_test(np.ones(2)), t_test(np.zeros(2))) == (None, 0.0, 1.0)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert bootstrap_p(np.ones(99)) == pytest.approx(0.02)
    assert [points(x) for x in (-0.0041, 0.0, -0.0001)] == ["-0.4", "0.0", "0.0"]


def test_folders_are_read(tmp_path: Path) -> None:
    folders = small(tmp_path)
    results = read_results(folders[::-1])
    assert [(arm.name, arm.seeds, arm.fixed) for arm in results.arms] == [
        ("kan", (1, 2), False),
        ("untouched", (0,), True),
    ]
    assert results.seeds == (1, 2)
    assert [task.name for task in results.tasks] == ["a", "b"]
    other = {"acc": {"value": 0.5, "stderr": None}, "acc_norm": {"value": None, "stderr": None}}
    edit_task(folders[1], primary="acc_norm", metrics=other)
    assert read_results(folders[::-1]).tasks == results.tasks
    for folder in folders:
        shutil.copytree(Path(folder) / "evaluation" / "bbh", Path(folder) / "evaluation" / "x")
    assert [task.name for task in read_results(folders).tasks] == ["bbh/a", "bbh/b", "x/a", "x/b"]


def test_markdown_is_golden(tmp_path: Path) -> None:
    summary = summarise(small(tmp_path), reference="untouched", resamples=100)
    assert to_markdown(summary) == GOLDEN


def test_json_and_console_hold_the_numbers(tmp_path: Path) -> None:
    summary = summarise(small(tmp_path), reference="untouched", resamples=100, seed=3)
    held = json.loads(to_json(summary))
    assert (held["resamples"], held["bootstrap_seed"], held["items"]) == (100, 3, 8)
    assert held["arms"][1]["tasks"]["a"]["values"] == [1.0, 1.0]
    assert held["comparisons"][0]["tasks"] == {"a": 1.0, "b": 1.0}
    assert held["losses"][0]["difference"] == pytest.approx(-1.25)
    text = io.StringIO()
    to_console(summary, Console(file=text, width=160))
    assert "kan vs untouched: +100.0 points" in text.getvalue()
    assert "[+100.0, +100.0]" in text.getvalue()


def edit(folder: str, **changes: Any) -> None:
    path = Path(folder) / "arm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_task(folder: str, **changes: Any) -> None:
    path = Path(folder) / "evaluation" / "bbh" / "results.json"
    held = json.loads(path.read_text())
    held["tasks"]["a"] |= changes
    path.write_text(json.dumps(held))


def items(folder: str, lines: list[str]) -> None:
    path = Path(folder) / "evaluation" / "bbh" / "items" / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")


FOUR = [json.dumps({"id": i, "correct": 1}) for i in range(4)]


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda f: edit(f[2], seed=1), r"arm=kan has seed=1 twice: .*kan1 and .*kan2"),
        (lambda f: edit(f[2], arm="other"), "arm=kan lacks seed 2, which arm=other has; run it"),
        (lambda f: edit(f[0], trainable_parameters=5), "arm=untouched lacks seed 1, 2, which"),
        (lambda f: edit(f[2], trainable_parameters=5), "trainable_parameters of arm=kan differ"),
        (lambda f: edit(f[2], seed="1"), r"kan2/arm.json: seed: Input should be a valid integer"),
        (lambda f: (Path(f[1]) / "arm.json").unlink(), r"kan1/arm.json is missing; finish the run"),
        (lambda f: (Path(f[1]) / "arm.json").write_text("{"), r"kan1/arm.json is not JSON"),
        (lambda f: shutil.rmtree(Path(f[1]) / "evaluation"), "kan1 has no evaluation/<suite>"),
        (lambda f: items(f[1], FOUR[:3]), "has 3 items, .* says n=4; evaluate the run again"),
        (lambda f: items(f[1], [*FOUR[:3], '{"id": 9, "correct": 1}']), "the items of bbh/a diff"),
        (lambda f: items(f[1], [*FOUR[:3], FOUR[0]]), "line 4: id=0 is there twice"),
        (
            lambda f: items(f[1], [*FOUR[:3], '{"id": 3, "correct": 0.5}']),
            "line 4: correct=0.5 must",
        ),
        (lambda f: items(f[1], [*FOUR[:3], '{"id": 3, "correct": 0}']), "has an accuracy of 0.75"),
        (lambda f: items(f[1], [*FOUR[:3], "{"]), "line 4 is not JSON"),
        (lambda f: items(f[1], [*FOUR[:3], '{"id": 3}']), "line 4: correct: Field required"),
        (lambda f: edit_task(f[1], majority=0.4), "majority of bbh/a is 0.3 in .* and 0.4 in"),
        (lambda f: edit_task(f[1], random=None), "tasks.a.random: Input should be a valid number"),
    ],
)
def test_runs_that_cannot_be_compared(spoil: Any, rule: str, tmp_path: Path) -> None:
    folders = small(tmp_path)
    spoil(folders)
    with pytest.raises(DataError, match=rule):
        read_results(folders)


def test_a_task_in_one_run_alone(tmp_path: Path) -> None:
    folders = small(tmp_path)
    extra = {name: [1] * 4 for name in "abc"}
    folders.append(write_run(tmp_path / "more", "more", 1, extra, trainable_parameters=0))
    with pytest.raises(DataError, match=r"more was evaluated on bbh/c, .*untouched was not"):
        read_results(folders)
    with pytest.raises(DataError, match="there are no runs"):
        read_results([])


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"reference": "nan"}, "reference=nan is no arm of these runs; use one of"),
        ({"reference": "kan", "pairs": [("kan", "b")]}, "pairs=b is no arm"),
        ({"reference": "kan", "pairs": [("kan", "kan")]}, "pairs=kan must be two arms"),
        ({"reference": "kan", "resamples": 5}, "resamples=5 must be at least 100"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        summarise(small(tmp_path), **options)

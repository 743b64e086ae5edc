"""The report: its tables, and pages of runs of every kind."""

import json
import re
import threading
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError

import pytest

from kalmagrove.cli import main
from kalmagrove.cli import report as cli
from kalmagrove.config import ConfigError, DataError, KalmaGroveError
from kalmagrove.evaluate import subject
from kalmagrove.track import Ledger, Spent
from kalmagrove.track.report import (
    EdgeCurve,
    EdgePanel,
    Live,
    NotBegun,
    RunData,
    Server,
    read_run,
    render,
    run_folders,
    write,
)
from kalmagrove.track.report import cost as cost_figures
from kalmagrove.track.report.tables import config_diff, headline
from tests.unit.test_inspect import grown, retrofitted

pytestmark = pytest.mark.unit

BEGIN: dict[str, Any] = {
    "lost_steps": 0, "lost_tokens": 0, "lost_device_seconds": 0.0, "run": "r", "world_size": 2,
    "devices": 2, "unit": "gpu", "price": "$2 a gpu-hour (h100)",
}  # fmt: skip
EDGES = [
    EdgePanel(
        "0.kan", 64, 0.5, [EdgeCurve("3", (-1, 0, 1), (1, 0, 1), (0, 0, 1), (-1, 1), 0.2, 1.0)]
    )
]


class Run:
    """Writes the folder of a run, 10 device-seconds and a tenth of a dollar a step."""

    def __init__(self, folder: Path, usd: bool = True, **begin: Any) -> None:
        self.folder, self.usd, self.spent, self.wall = folder, usd, 0.0, 0.0
        times = (datetime(2026, 1, 2, tzinfo=UTC) + timedelta(seconds=i) for i in range(10**6))
        self.ledger = Ledger(folder / "ledger.jsonl", clock=lambda: 0.0, now=lambda: next(times))
        self.note("start", 0, **BEGIN | begin)

    def note(self, event: Any, step: int, **facts: Any) -> None:
        usd = Decimal(str(self.spent)) / 100 if self.usd else None
        spent = Spent(self.spent, usd, self.wall)
        self.ledger.write(event, step, step * 100, spent, **facts)

    def steps(self, first: int, last: int, **facts: Any) -> "Run":
        for step in range(first, last + 1):
            self.spent, self.wall = self.spent + 10, self.wall + 5
            told = {
                "loss": 6.0 - 0.1 * step,
                "grad_norm": 1.0,
                "tokens_per_s": 20.0,
                "mfu": 0.25,
                "train_seconds": 4.0,
                "step_seconds": 4.0,
                "seconds_split": {"data": 1.0, "forward": 2.0},
                "usd_projected": 2.0 if self.usd else None,
                "peak_memory": 2 * 10**9,
                "skipped": 0,
                "model": {
                    "0.load_max": 1.5, "1.load_max": 1.2, "load_max": 1.35, "kept_share": 0.8,
                    "dead_edges": 0.01, "out_of_range": 0.02,
                },
                "comm": {"alltoall_bytes": 1e6},
                "rank_seconds_min": 2.0,
                "rank_seconds_mean": 2.5,
                "rank_seconds_max": 3.0,
                "slowest_rank": step % 2,
            }  # fmt: skip
            self.note("step", step, **told | facts)
        return self

    def evaluate(self, step: int, loss: float = 5.0) -> "Run":
        self.spent += 2
        self.note("eval", step, val_loss=loss, val_bits_per_byte=loss / 2, seconds=1.0)
        return self

    def read(self, **more: Any) -> RunData:
        return read_run(self.folder, **more)


class Page(HTMLParser):
    """What of a page can be judged without a browser."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.found if "id" in attrs]


def page_of(*runs: RunData) -> Page:
    """The page, checked: nothing from elsewhere, every drawing named, described and unique."""
    text = render(runs)
    assert not re.search(r"url\(|@import", text)
    page = Page(text)
    links = [attrs.get(key) for _, attrs in page.found for key in ("src", "href", "action")]
    assert [link for link in links if link is not None] == ["data:,"], "the empty icon"
    ids = page.ids()
    assert len(ids) == len(set(ids))
    charts = [attrs for tag, attrs in page.found if attrs.get("role") == "img"]
    for attrs in charts:
        assert attrs["aria-labelledby"] in ids
        assert attrs["aria-describedby"] in ids
    figures = [1 for tag, _ in page.found if tag == "figure"]
    assert len({attrs["aria-labelledby"] for attrs in charts}) == len(figures)
    return page


def titles(page: Page) -> set[str]:
    return set(page.ids()) - {key for key in page.ids() if key.endswith("-says")}


# Pages


def test_a_run_that_is_done_has_every_figure(tmp_path: Path) -> None:
    run = Run(tmp_path / "one").steps(1, 10).evaluate(10)
    shares = {"0": [0.75, 0.25], "1": [0.5, 0.25, 0.25]}
    run.note("checkpoint", 10, path="checkpoints/step-000010", seconds=1.0, shares=shares)
    run.note("stop", 10, status="done", joules=7.2e6)
    (tmp_path / "one" / "samples").mkdir()
    (tmp_path / "one" / "samples" / "step-000010.txt").write_text("def main():\n")
    summary = {"unigram_nats": 7.0, "bigram_nats": 5.5, "params_total": 1_640_000}
    (tmp_path / "one" / "summary.json").write_text(json.dumps(summary))
    config = {"name": "one", "steps": 10, "budget": {"usd": 5.0}, "track": {"every": 1}}
    page = page_of(run.read(config=config, edges=EDGES))
    assert titles(page) == {
        "loss-tokens", "loss-time", "loss-dollars", "throughput", "mfu", "split", "memory", "comm",
        "ranks", "grad-norm", "groves-0", "load-0", "edges-used", "functions-0", "budget", "money",
        "hours",
    }  # fmt: skip
    for words in ("At step 10: a grove's", "from 0.5 to 1.5 of an even share", "done", "10 of 10",
                  "unigram", "bigram", "2 kWh", "$1.02", "1.64M", "def main()",
                  "track.every", "$5.00"):  # fmt: skip
        assert words in page.text, words
    tight = run.read(config={"budget": {"usd": 500.0}})
    assert "Far above, not drawn: the budget of one, $500.00." in page_of(tight).text
    assert "is left out" not in page.text.replace("what is not known is left out", "")


def test_what_a_run_does_not_have_is_left_out_with_the_reason(tmp_path: Path) -> None:
    run = Run(tmp_path / "cpu", usd=False, unit="core", price="unknown")
    run.steps(1, 3, mfu=None, model={}, comm={})
    page = page_of(run.read(edges="there is no checkpoint yet"))
    for key in ("mfu", "comm", "load-0", "edges-used", "functions-0", "budget", "loss-dollars"):
        assert key not in titles(page)
    text = page.text
    assert "the processes ran on CPU cores" in text
    assert text.count("the price is unknown") == 2
    for words in ("no layer has groves", "no edge functions", "no checkpoint yet", "plan.json",
                  "no sample is written", "no config.yaml"):  # fmt: skip
        assert words in text, words
    assert headline(run.read())["cost"] == "unknown", "never 0"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    page = page_of(Run(tmp_path / "new").read(config={"budget": {"hours": 1.0}}))
    assert titles(page) == set()
    assert "running, or killed" in page.text
    for name in ("Loss against dollars", "Budget", "Own time of ranks", "Edge activity",
                 "Dollars spent and projected", "Model FLOPs utilisation"):  # fmt: skip
        assert f"{name}  is left out: no step is written yet" in page.text, name
    assert "the price is unknown" not in page.text


def test_what_a_live_run_says_of_its_model(tmp_path: Path) -> None:
    """There is no summary.json yet."""
    facts = {"params_total": 1_640_000, "params_active": 820_000}
    facts |= {"unigram_nats": 5.9, "bigram_nats": None}
    live = Run(tmp_path / "live", **facts).steps(1, 3).read()
    assert headline(live)["parameters"] == "1.64M"
    assert headline(live)["active parameters"] == "820k"
    text = page_of(live).text
    assert "unigram" in text
    assert "bigram" not in text, "its loss is unknown"
    old = Run(tmp_path / "old").steps(1, 3)
    (old.folder / "summary.json").write_text(json.dumps({"params_total": 2000}))
    assert headline(old.read())["parameters"] == "2000", "of older ledgers in the summary alone"


def test_every_cap_is_drawn(tmp_path: Path) -> None:
    run = Run(tmp_path / "capped", usd=False).steps(1, 4, seconds_left=16.0)
    run.note("stop", 4, status="budget", reason="budget.tokens=500 is reached")
    config: dict[str, Any] = {"steps": 8, "budget": {"usd": None, "hours": 1.0, "tokens": 500}}
    page = page_of(run.read(config=config))
    assert "budget" in titles(page)
    assert "hours: 20 s of 1.00 hours, the whole run at this pace 36 s." in page.text
    assert "tokens: 400 tokens of 500 tokens, the whole run at this pace 800 tokens." in page.text
    assert "highest 80%" in page.text
    assert "highest 0.556%" in page.text
    assert "Dollars spent and projected  is left out: the price is unknown" in page.text
    assert headline(run.read(config=config))["budget"] == "1.00 hours, 500 tokens"
    free = page_of(run.read(config={"budget": {"usd": None}}))
    assert "Budget  is left out: no budget was set" in free.text
    unknown = run.read()
    assert "Budget  is left out: config.yaml is missing" in page_of(unknown).text
    assert headline(unknown)["budget"] == "unknown"
    priced = Run(tmp_path / "priced").steps(1, 4).read(config={"budget": {"usd": 2.0}})
    both = page_of(run.read(config=config), priced)
    for words in ("capped: hours", "capped: tokens", "priced: dollars: $0.40 of $2.00"):
        assert words in both.text, words


def test_stragglers(tmp_path: Path) -> None:
    run = Run(tmp_path / "two").steps(1, 3)
    run.steps(4, 4, slowest_rank=5, rank_seconds_max=5.0)
    page = page_of(run.read())
    assert "The slowest, of 4 lines: rank 1 in 2, rank 0 in 1, rank 5 in 1." in page.text
    assert "slowest: 4 points, from 3000 to 5000" in page.text
    assert re.search(r"5\s+1\s+25%\s+100%", page.text), "the table: above the mean of 2.5 s"
    one = Run(tmp_path / "one", world_size=1).steps(1, 3)
    assert "Own time of ranks  is left out: there is one rank" in page_of(one.read()).text
    one.note("resume", 3, **BEGIN)
    one.steps(4, 5)
    assert "of 2 lines" in page_of(one.read()).text, "those of the session with several"
    old = Run(tmp_path / "old").steps(1, 3).read()
    for line in old.history.lines:
        for key in [key for key in line if key.startswith("rank_")]:
            del line[key]
    assert "the ledger, of an older version, does not tell it" in page_of(old).text
    alone = Run(tmp_path / "alone", world_size=1).steps(
        1, 3, rank_seconds_min=2.5, rank_seconds_max=2.5
    )
    chart = page_of(run.read(), alone.read())
    assert "two: 4 points, from 20% to 100%" in chart.text
    assert "Left out: alone, as there is one rank." in chart.text


def test_a_comparison_names_the_runs_that_it_leaves_out(tmp_path: Path) -> None:
    runs = [
        Run(tmp_path / "priced").steps(1, 3).evaluate(3).read(),
        Run(tmp_path / "second").steps(1, 3).evaluate(3).read(),
        Run(tmp_path / "free", usd=False).steps(1, 3, model={}).evaluate(3).read(),
        Run(tmp_path / "new").read(),
    ]
    page = page_of(*runs)
    told = "Left out: free, as the price is unknown (price=NAME); new, as no step is written yet."
    assert page.text.count(told) == 2, "loss against dollars, dollars spent"
    assert (
        "Left out: free, as the price is unknown; new, as there is no held-out loss yet."
        in page.text
    )
    edges = "Left out: free, as the model has no edge functions; new, as no step is written yet."
    assert page.text.count(edges) == 3
    assert "Left out: new, as no step is written yet." in page.text
    pair = page_of(*runs[:2]).text.partition("Inside the model")[0]
    assert "as the price" not in pair
    assert "as no step" not in pair


def test_a_live_run_with_a_torn_line_and_a_stopped_and_a_failed_one(tmp_path: Path) -> None:
    live = Run(tmp_path / "live").steps(1, 4)
    with (live.folder / "ledger.jsonl").open("ab") as file:
        file.write(b'{"event": "st')
    (live.folder / "summary.json").write_text('{"status": "do')
    assert live.read().history.reached == (4, 400)
    assert "running, or killed" in page_of(live.read()).text
    stopped = Run(tmp_path / "stopped").steps(1, 4)
    stopped.note("stop", 4, status="stopped")
    assert "stopped, can go on" in page_of(stopped.read()).text
    failed = Run(tmp_path / "failed").steps(1, 4, loss=float("nan"), skipped=1)
    failed.note("stop", 4, status="failed", reason="NonFiniteError: <no> update")
    page = page_of(failed.read())
    assert "NonFiniteError: <no> update" in page.text
    assert "loss-tokens" not in titles(page), "a loss that was never finite"


def test_skips_refits_a_resume_and_lost_work(tmp_path: Path) -> None:
    run = Run(tmp_path / "long").steps(1, 3)
    run.note("checkpoint", 3, path="c", seconds=1.0)
    run.steps(4, 6, loss=9.0)
    lost = {"lost_steps": 3, "lost_tokens": 300, "lost_device_seconds": 30.0, "devices": 4}
    run.note("resume", 3, **BEGIN | lost)
    run.steps(4, 5, train_seconds=2.0)
    run.note("skip", 5, reason="loss is nan")
    run.note("refit", 5, grids={"0.kan": {"before": 0.1, "after": 0.0, "error": 0.01}})
    run.note("budget", 5, cap="usd", limit=2.0, share=0.5, whole=None, low=None, high=None)
    run.note("stop", 5, status="budget", budget={"usd": 2.0})
    read = run.read()
    assert [line["step"] for line in read.steps] == [1, 2, 3, 4, 5]
    assert max(line["loss"] for line in read.steps) < 6, "what did not last is not drawn"
    assert max(read.seconds.values()) == 40, "wall time of both sessions"
    for line in read.history.lines:
        del line["wall_seconds"]  # as in older ledgers
    reckoned = max(run.read().seconds.values()), max(replace(read).seconds.values())
    assert reckoned == (40, 60 / 2 + 20 / 4), "60 device-seconds on two devices, then 20 on four"
    share = cost_figures.spent(read)
    assert sum(share.values()) == pytest.approx(1)
    assert share["lost work"] == pytest.approx(30 / 80)
    assert share["training"] == pytest.approx((3 * 2 * 4 + 2 * 4 * 2) / 80)
    assert read.history.goodput == pytest.approx(share["training"])
    page = page_of(read)
    for words in ("lost 3 steps, 30 device-seconds", "no update: loss is nan",
                  "spline grids moved to their data: 1", "50% of budget.usd=2 is used",
                  "stopped by its budget"):  # fmt: skip
        assert words in page.text, words
    assert headline(read)["lost steps"] == "3"


def test_phases_say_where_the_time_went(tmp_path: Path) -> None:
    run = Run(tmp_path / "phased")
    run.steps(1, 2, phases={"startup": 3.0, "forward": 5.0, "idle": 2.0})
    lost = {"lost_steps": 1, "lost_tokens": 100, "lost_device_seconds": 10.0}
    run.note("resume", 1, **BEGIN | lost)
    run.steps(2, 2, phases={"startup": 1.0, "forward": 4.0, "idle": 0.0})
    share = cost_figures.spent(run.read())
    assert share == pytest.approx({"startup": 8 / 30, "forward": 18 / 30, "other": 4 / 30})
    assert "10 device-seconds of it were lost work" in page_of(run.read()).text


def test_killed_starts_are_told_of(tmp_path: Path) -> None:
    run = Run(tmp_path / "killed")
    run.steps(1, 2, phases={"forward": 10.0})
    killed = [{"attempt": name, "device_seconds": 3.0, "wall_seconds": 1.5, "usd": 0.03}
              for name in ("a", None)]  # fmt: skip
    run.spent += 6
    run.note("resume", 2, **BEGIN | {"lost_device_seconds": 6.0, "killed": killed})
    run.steps(3, 3, phases={"forward": 5.0})
    share = {"forward": 30 / 36, "killed": 6 / 36, "other": 0.0}
    assert cost_figures.spent(run.read()) == pytest.approx(share)
    text = page_of(run.read()).text
    assert "; after their last lines killed starts took 6 of these" in text


def test_predicted_and_actual(tmp_path: Path) -> None:
    run = Run(tmp_path / "planned").steps(1, 4, hfu=0.5)
    plan = {
        "tokens": 400, "tokens_per_step": 100, "tokens_per_s": 25.0, "step_seconds": 4.0,
        "mfu": 0.5, "hfu": None, "hours": 0.01, "usd": 0.2, "peak_bytes": 4e9,
        "step_split": {"forward": 1.0, "layers": 2.0}, "extrapolated": ["groves: measured alone"],
    }  # fmt: skip
    (run.folder / "plan.json").write_text(json.dumps(plan))
    page = page_of(run.read())
    cells = re.findall(r"<tr><th scope=row>([^<]*)</th>((?:<td>[^<]*</td>)*)</tr>",
                       render([run.read()]))  # fmt: skip
    rows = [(name, re.findall(r"<td>([^<]*)</td>", rest)) for name, rest in cells]
    found = {name: row for name, row in rows if len(row) == 3}
    assert found["tokens a second"] == ["25", "20", "0.80"]
    assert found["seconds a step"] == ["4", "5", "1.25"]
    assert found["MFU"] == ["50%", "25%", "0.50"]
    assert found["HFU"] == ["-", "50%", "-"]
    assert found["peak memory of a device (bytes)"] == ["4G", "2G", "0.50"]
    assert found["milliseconds a step, forward"] == ["1000", "2000", "2.00"]
    assert found["milliseconds a step, layers"] == ["2000", "-", "-"]
    assert found["dollars, all 400 tokens"] == ["$0.20", "$0.40", "2.00"]
    assert "Not covered by measurements: groves: measured alone." in page.text
    (run.folder / "plan.json").write_text(json.dumps(plan | {"tokens": 401}))
    assert (
        "$0.40"
        not in render([run.read()]).partition("Predicted and actual")[2].partition("</section>")[0]
    ), "not before all is done"
    (run.folder / "plan.json").write_text("null")
    assert "planned has no prediction (plan.json): without a GPU" in page_of(run.read()).text


def test_a_retrofit_arm(tmp_path: Path) -> None:
    for name, loss in (("kan-0", 2.0), ("restart-0", 3.0)):
        run = Run(tmp_path / name).steps(1, 3, model={}).evaluate(3, loss)
        (run.folder / "retrofit.json").write_text(json.dumps({"replace": "kan", "blocks": [1, 2]}))
        arm = {"arm": name, "trainable_parameters": 39_000_000}
        (run.folder / "arm.json").write_text(json.dumps(arm))
        scores = {"groups": {"bbh": {"metrics": {"acc": {"value": 0.441}}}}}
        (run.folder / "evaluation" / "bbh").mkdir(parents=True)
        (run.folder / "evaluation" / "bbh" / "results.json").write_text(json.dumps(scores))
    (tmp_path / "latest").symlink_to("kan-0")
    folders = run_folders([tmp_path])
    assert [folder.name for folder in folders] == ["kan-0", "restart-0"], "the study's own runs"
    page = page_of(*(read_run(folder) for folder in folders))
    for words in ("accuracy, bbh", "44.1%", "39M", "retrofit.json", "[1, 2]"):
        assert words in page.text, words


def test_several_runs_are_overlaid(tmp_path: Path) -> None:
    runs = []
    for i, name in enumerate(("kan", "dense", "moe")):
        run = Run(tmp_path / name).steps(1, 5 + i).evaluate(5, 4.0 + i)
        runs.append(run.read(config={"seed": i, "steps": 9, "ffn": name}))
    text = render(runs)
    page = page_of(*runs)
    assert "3 runs compared" in page.text
    chart = text[text.index('aria-labelledby="loss-tokens"') :]
    chart = chart[: chart.index("</svg>")]
    named = re.findall(r'class="name t(\d)"[^>]*>(\w+)<', chart)
    assert sorted(named) == [("0", "kan"), ("1", "dense"), ("2", "moe")]
    assert chart.count('<path class="line s0 faint"') == 1
    assert {"load-0", "load-1", "load-2", "edges-dead-edges"} <= titles(page)


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    one = {"name": "a", "dir": "x", "seed": 1, "model": {"layers": 4, "pattern": ["kan"]}}
    two = {"name": "b", "dir": "y", "seed": 1, "model": {"layers": 8, "pattern": ["kan"]},
           "budget": {"usd": None}}  # fmt: skip
    runs = [Run(tmp_path / str(i)).read(config=tree) for i, tree in enumerate((one, two))]
    head, rows = config_diff(runs)
    assert head == ["setting", "0", "1"]
    assert rows == [["model.layers", "4", "8"], ["budget.usd", "-", "null"]]
    same = [Run(tmp_path / f"same{i}").read(config=one) for i in range(2)]
    assert "the runs have the same settings" in page_of(*same).text


def test_strings_of_a_run_cannot_leave_their_place(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"' onload=x"
    run = Run(tmp_path / "evil").steps(1, 2)
    (run.folder / "samples").mkdir()
    (run.folder / "samples" / "s<b>.txt").write_text(evil + "\0</pre>")
    (run.folder / "plan.json").write_text(
        json.dumps({"extrapolated": [evil], "step_split": {evil: 1.0}})
    )
    run.note("stop", 2, status=evil, reason=evil)
    edges = [EdgePanel(evil, 1, 0.5, [EdgeCurve(evil, (0, 1), (0, 1), None, (0, 1), 1.0, 1.0)])]
    data = run.read(config={evil: evil}, edges=edges)
    other = Run(tmp_path / "other").steps(1, 2).read(config={}, edges=evil)
    named = [RunData(**{**vars_of(run), "name": evil}) for run in (data, other)]
    for runs in (named[:1], named[1:], named):
        page = page_of(*runs)
        assert sum(tag == "script" for tag, _ in page.found) == 1
        assert not any("onload" in attrs for _, attrs in page.found)
        assert evil in page.text


def vars_of(run: RunData) -> dict[str, Any]:
    return {name: getattr(run, name) for name in RunData.__dataclass_fields__}


def test_a_long_run_stays_small_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "long").mkdir()
    Run(tmp_path / "long").steps(1, 1)
    path = tmp_path / "long" / "ledger.jsonl"
    first, line = path.read_bytes().splitlines(keepends=True)
    facts = json.loads(line)
    del facts["digest"]  # that of another line
    lines = [first]
    for step in range(1, 6001):
        facts |= {"step": step, "tokens": step * 1000, "loss": 5 + step * 7919 % 1000 / 1000}
        lines.append(json.dumps(facts).encode() + b"\n")
    path.write_bytes(b"".join(lines))
    text = render([read_run(path.parent)])
    assert len(text) < 1_000_000
    assert "Of up to 6,000 points a line at most 2,000 are drawn, extremes kept." in text


# Folders, files, server, command


def test_ledgers_that_are_missing_empty_or_spoilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match=r"has no ledger\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(DataError, match=r"has no ledger\.jsonl"):
        run_folders([tmp_path])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(NotBegun, match=r"no ledger\.jsonl yet: the run has not begun; try again"):
        run_folders([tmp_path])
    assert run_folders([tmp_path], starting=True) == [tmp_path]
    with pytest.raises(DataError, match=r"name the folder of a run"):
        run_folders([tmp_path / "typo"], starting=True)
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(NotBegun, match="is empty: the run has not begun"):
        read_run(tmp_path)
    (tmp_path / "ledger.jsonl").write_text("x\n{}\n")
    with pytest.raises(DataError, match="holds no line that can be read; see kalmagrove ledger"):
        read_run(tmp_path)
    assert "1 damaged or changed lines are left out (1)" in caplog.text


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, "one")
    write(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KalmaGroveError, match=r"cannot be written .*--out"):
        write(tmp_path / "missing" / "report.html", "x")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_follows_the_ledger(tmp_path: Path) -> None:
    run = Run(tmp_path / "live").steps(1, 2)
    made: list[int] = []

    def make(version: str) -> str:
        made.append(1)
        if len(made) == 1:
            run.steps(3, 3)  # while the page is made
        return render([run.read()], Live(5, version))

    with Server("127.0.0.1", 0, [run.folder], make) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert server.url.startswith("http://127.0.0.1:")
            status, page = get(server.url)
            assert status == 200
            assert "location.reload" in page
            assert "connect-src 'self'" in page
            _, version = get(server.url + "version")
            assert f'!== "{version}"' not in page, "older than what the page asks for"
            _, page = get(server.url)
            assert f'!== "{version}"' in page
            assert get(server.url) == (200, page)
            assert len(made) == 2, "nothing new: not made again"
            for name in ("ledger.jsonl", "summary.json", "samples/a.txt", "checkpoints/step-1"):
                (run.folder / name).parent.mkdir(exist_ok=True)
                with (run.folder / name).open("a") as file:
                    file.write("{}")
                before, version = version, get(server.url + "version")[1]
                assert version != before, name
            assert get(server.url + "../../etc/passwd")[0] == 404
            request = urllib.request.Request(server.url, method="HEAD")
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert (answer.status, answer.read()) == (200, b"")
                assert int(answer.headers["Content-Length"]) > 10_000
            (run.folder / "ledger.jsonl").write_text("")
            assert get(server.url)[0] == 503
        finally:
            server.shutdown()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with Server("127.0.0.1", 0, [tmp_path], str) as server:
        port = server.server_address[1]
        with pytest.raises(ConfigError, match=rf"--serve=127\.0\.0\.1:{port} cannot be served"):
            Server("127.0.0.1", port, [tmp_path], str)


def test_a_run_that_is_starting_up_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "new" / ".alive").mkdir(parents=True)
    one = Run(tmp_path / "one").steps(1, 2)
    reader = cli.Reader([tmp_path / "new", one.folder], None)
    runs, starting = reader.begun()
    assert ([run.name for run in runs], starting) == (["one"], ["new"])
    for found in (runs, []):
        page = Page(render(found, Live(5, "v1", starting)))
        assert "new is starting up: nothing is in its ledger yet" in page.text
        assert ("loss-tokens" in titles(page)) == bool(found)
    Run(tmp_path / "new").steps(1, 2)
    assert [run.name for run in reader.begun()[0]] == ["new", "one"]
    assert "is starting up" not in render(reader.begun()[0], Live(5, "v2"))


def command(*words: object) -> int:
    return main(["report", *map(str, words)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = Run(tmp_path / "one").steps(1, 3)
    (run.folder / "config.yaml").write_text("steps: 3\nseed: 17\n")
    assert command(run.folder, "--no-edges") == 0
    page = Page((run.folder / "report.html").read_text())
    assert "seed" in page.text
    assert "--no-edges" in page.text
    assert "report.html" in capsys.readouterr().out
    for place in ("a", "b"):
        Run(tmp_path / "study" / place / "seed-0").steps(1, 2)
    same = [tmp_path / "study" / place / "seed-0" for place in ("a", "b")]
    both = tmp_path / "both.html"
    assert command(*same, same[0] / ".." / "seed-0", "--out", both) == 0
    assert "2 runs compared" in both.read_text()
    assert "b/seed-0" in both.read_text()
    assert command(same[0].parent) == 0, "a folder of runs"
    assert (same[0].parent / "report.html").is_file()
    untouched = same[0].parent / "untouched"
    untouched.mkdir()
    (untouched / "arm.json").write_text("{}")
    capsys.readouterr()
    assert command(same[0].parent) == 0
    assert "untouched has no ledger (it trained nothing) and is left out" in capsys.readouterr().out
    out = tmp_path / "other.html"
    assert command(run.folder, "--out", out) == 0
    assert "there is no checkpoint yet" in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere has no ledger.jsonl"),
        (["x", "--out", "y", "--serve"], "has no ledger.jsonl"),
        (["x", "--sevre"], "unrecognized arguments: --sevre"),
        (["x", "--serve", "many"], "invalid int value"),
    ],
)
def test_mistakes_are_one_line(
    words: Sequence[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert command(*words) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_checkpoints_whose_edges_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "one").steps(1, 3)
    for name in ("step-000009", "step-000100", "step-000200.tmp"):
        (run.folder / "checkpoints" / name).mkdir(parents=True)
    opened: list[str] = []

    def draw(place: Path) -> list[EdgePanel]:
        opened.append(place.name)
        return EDGES

    monkeypatch.setattr(cli, "draw_edges", draw)
    reader = cli.Reader([run.folder], None)
    assert reader.read()[0].edges == EDGES
    assert reader.read()[0].edges == EDGES
    assert opened == ["step-000100"], "the newest whole one, once"
    (run.folder / "checkpoints" / "step-000300").mkdir()
    (run.folder / "checkpoints" / "step-000300" / "part").write_bytes(b"1234")
    monkeypatch.setattr(cli, "LARGE", 3)
    assert "--edges opens it all the same" in str(reader.read()[0].edges)
    reader = cli.Reader([run.folder], True)
    reader.read()
    assert opened[-1] == "step-000300"
    monkeypatch.setattr(cli, "draw_edges", lambda place: (_ for _ in ()).throw(OSError("gone")))
    told = cli.Reader([run.folder], True).read()[0].edges
    assert told == "the checkpoint cannot be opened (gone)"


def test_a_model_without_edge_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "dense").steps(1, 3)
    (run.folder / "checkpoints" / "step-000003").mkdir(parents=True)
    model = SimpleNamespace(model=grown("dense"))
    monkeypatch.setattr(subject, "open_model", lambda place, device, precision: model)
    assert cli.Reader([run.folder], None).read()[0].edges == "the model has no edge functions"


@pytest.mark.parametrize(
    ("make", "name", "title"), [(grown, "0.", "edge "), (retrofitted, "1.", "→")]
)
def test_functions_of_both_kinds_of_models_are_drawn(
    make: Any, name: str, title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = SimpleNamespace(model=make())
    monkeypatch.setattr(subject, "open_model", lambda place, device, precision: model)
    panels = cli.draw_edges(tmp_path)
    assert panels[0].name.startswith(name)
    assert title in panels[0].curves[0].title
    page = page_of(Run(tmp_path / "run").steps(1, 2).read(edges=panels))
    assert "functions-0" in titles(page)
    assert f"of {len(panels)} layers and groves are drawn" in page.text or len(panels) <= 8

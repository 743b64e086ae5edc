"""What a sweep has found: of studies, and of any folder of runs; loss against dollars."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.dom import minidom

import pytest

from kalmagrove.cli import main, sweep_table
from kalmagrove.cli.study import Study
from kalmagrove.config import DataError
from kalmagrove.track.report import Outcome, as_file, pareto, render, trade
from tests.unit.test_report import Page, Run
from tests.unit.test_search import KINDS, RATE, Pretend, go, search

pytestmark = pytest.mark.unit


def runs_of(place: Path) -> Path:
    """Three runs as a sweep with -m leaves them: two done, one stopped."""
    rows: list[tuple[str, float, str]] = [("a", 4.0, "done"), ("b", 3.0, "done"), ("c", 2.0, "x")]
    for i, (name, loss, status) in enumerate(rows):
        run = Run(place / name, usd=True).steps(1, 2 + i).evaluate(2 + i, loss)
        if status == "done":
            run.note("stop", 2 + i, status="done")
        facts = {"name": name, "seed": i, "optim": {"lr": i, "eps": 1}, "model": {"name": "kan"}}
        (place / name / "config.yaml").write_text(json.dumps(facts))
        (place / name / "summary.json").write_text(json.dumps({"params_total": 1000 + i}))
    (place / "latest").symlink_to("a")
    return place


def test_a_folder_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = runs_of(tmp_path / "grid")
    assert main(["sweep", "show", str(place)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[0] == ["run", "seed", "params", "steps", "loss", "cost", "status"], "lr: as seed"
    assert lines[2][:5] == ["b", "1", "1001", "3", "3.0000"]
    assert lines[2][-3:] == ["done,", "best,", "Pareto"]
    assert lines[3][-2:] == ["done,", "Pareto"], "it was cheaper"
    assert (lines[4][0], lines[4][-1]) == ("c", "running"), "better, and not done"
    told = json.loads((place / "sweep.json").read_text())
    assert (told["best"], sorted(told["pareto"]), told["objective"]) == ("b", ["a", "b"], None)
    assert told["usd"] == pytest.approx(sum(run["usd"] for run in told["runs"]))
    with (place / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["b", "a", "c"]
    assert rows[0]["optim.lr"] == "1", "the file has all settings"
    drawing = minidom.parse(str(place / "sweep.svg"))
    assert len(drawing.getElementsByTagName("circle")) == 3


def test_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    bad = Pretend(ends=lambda run: "failed" if run.optim.lr > 0.5 else None)
    go(folder, bad, (RATE, KINDS), trials=6, search_seed=2)
    Study(folder, search(), (RATE, KINDS), {}).ask()
    summary = sweep_table.summarize(folder)
    assert summary.objective == "loss"
    done = [row for row in summary.rows if row.status == "done"]
    assert [row.loss for row in done] == sorted(row.loss or 0 for row in done)
    assert [row.best for row in summary.rows] == [True] + [False] * (len(summary.rows) - 1)
    assert [row.run for row in done if row.pareto] == [done[0].run], "they cost the same"
    statuses = {row.run: row.status for row in summary.rows}
    assert statuses["trial-006"] == "not begun"
    assert main(["sweep", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    for row in summary.rows:
        assert row.run in out
        if row.status == "failed":
            assert f"{row.run}: no luck" in out
    (folder / done[0].run / "ledger.jsonl").unlink()
    (row,) = [row for row in sweep_table.summarize(folder).rows if row.run == done[0].run]
    assert (row.loss, row.usd, row.status) == (None, None, "done"), "its folder was removed"


def test_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "show", str(tmp_path / "missing")]) == 1
    assert "is no folder; name that of a sweep" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"has no ledger.jsonl"):
        sweep_table.summarize(tmp_path)
    assert main(["sweep", "show"]) == 2
    assert "usage: kalmagrove sweep show FOLDER" in capsys.readouterr().out
    assert main(["sweep", "show", "a", "b"]) == 2
    assert "see kalmagrove sweep --help" in capsys.readouterr().err


def outcomes(*pairs: tuple[Any, Any], done: bool = True) -> list[Outcome]:
    return [Outcome(f"r{i}", usd, loss, done) for i, (usd, loss) in enumerate(pairs)]


def test_the_pareto_front() -> None:
    nan = float("nan")
    found = outcomes((3, 3), (1, 5), (2, 5), (2, 4), (2, 4.5), (None, 1), (1, None), (0, nan))
    assert [one.name for one in pareto(found)] == ["r1", "r3", "r0"]
    assert pareto(outcomes((1, 1), done=False)) == []
    assert pareto([]) == []


def test_the_plot() -> None:
    many = [*outcomes((1, 5), (2, 4), (2.5, 4.5)), Outcome("<b>", 3.0, 6.0, False)]
    figure = trade(many)
    page = Page(f"<main>{figure.legend}{figure.body}{figure.table}</main>")
    assert "r0 ($1.00, 5)" in figure.says
    assert figure.body.count(">&lt;b&gt;, not done</text>") == 2, "what is not done is named too"
    assert figure.note == ""
    nan = float("nan")
    bare = [Outcome("x", None, 1.0, True), Outcome("w", None, None, True)]
    bare += [Outcome("y", 1.0, None, False), Outcome("z", 1.0, nan, False)]
    gaps = trade([*many, *bare])
    assert gaps.note == (
        "Left out: x, w, as the price is unknown; y, as there is no held-out loss yet; "
        "z, as its held-out loss is not finite."
    )
    assert gaps.note in gaps.says
    names = [text for text in page.words if text.strip() in ("r0", "r1", "r2")]
    assert len([tag for tag, _ in page.found if tag == "circle"]) == 2 * 4, "wide and narrow"
    assert "<b>" not in figure.body
    assert names.count("r0") >= 1
    drawing = minidom.parseString(as_file(figure))
    root = drawing.documentElement
    assert root is not None
    assert root.getAttribute("xmlns") == "http://www.w3.org/2000/svg"
    one = trade(outcomes((1, 5), (None, 4)))
    assert "fewer than two runs" in one.absent
    same = trade(outcomes((1, 5), (1, 5)))
    assert same.body.count("<circle") == 2 * 2


def test_a_report_of_several_runs_has_it(tmp_path: Path) -> None:
    place = runs_of(tmp_path / "grid")
    runs = [Run.read(type("R", (), {"folder": place / name})()) for name in ("a", "b", "c")]
    page = render(runs)
    assert 'aria-labelledby="trade"' in page
    assert 'aria-labelledby="trade"' not in render(runs[:1])
    assert "is left out: fewer than two runs" in render(
        [Run(tmp_path / name, usd=False).steps(1, 2).read() for name in ("d", "e")]
    )

"""`kalmagrove track`: whole runs out of ledgers, and dashboards that name nothing unknown."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_sinks import FakeRun, fake, train
from tiny_run import make_run

from kalmagrove.cli import main
from kalmagrove.cli.run_folder import write_config
from kalmagrove.track import dashboards
from kalmagrove.track.charts import AXES, BY_USD, NAMES, axis_of
from kalmagrove.track.wandb_sink import run_id

pytestmark = pytest.mark.unit


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of two sessions: the second one's lines are those that last."""
    folder = tmp_path / "runs" / "tiny"
    for _ in range(2):
        train(folder, wandb="disabled", every=1)
    write_config(folder / "config.yaml", make_run(track={"entity": "us", "tags": ["a"]}))
    return folder


def test_sync_makes_one_run_of_what_lasted(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = FakeRun()
    given = fake(monkeypatch, run)
    assert main(["track", "sync", str(run_folder), "--project", "other"]) == 0
    assert (given["mode"], given["project"], given["entity"]) == ("offline", "other", "us")
    assert (given["id"], given["name"]) == (run_id("tiny", run_folder), "tiny")
    assert given["tags"] == ("a",)
    assert given["config"]["steps"] == 8
    assert [values["tokens"] for values in run.logged] == [16, 32, 32]
    assert run.summary["status"] == "done"
    assert "wandb sync /runs/tiny/wandb/offline-run-1" in capsys.readouterr().out


def test_online_needs_a_key_and_does_not_show_it(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("kalmagrove.track.wandb_sink.api_key_missing", lambda: True)
    for words in (["sync", "--online", str(run_folder)], ["dashboards", "--push"]):
        assert main(["track", *words]) == 1
        assert "needs an API key of W&B; run `wandb login`" in capsys.readouterr().err
    key = "k" * 40
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("kalmagrove.track.wandb_sink.api_key_missing", lambda: False)
    run = FakeRun(broken=True)
    monkeypatch.setattr(run, "log", _refuse)
    fake(monkeypatch, run)
    assert main(["track", "sync", "--online", str(run_folder)]) == 1
    said = capsys.readouterr()
    assert "W&B refused it (PermissionError: key (hidden) is unknown)" in said.err
    assert key not in said.out + said.err


def _refuse(*_: Any) -> None:
    raise PermissionError(f"key {'k' * 40} is unknown")


def test_mistakes_of_track(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["track", "sync", str(tmp_path)]) == 2
    assert "holds no ledger.jsonl; give folders such as runs/NAME" in capsys.readouterr().err
    assert main(["track", "sink"]) == 2
    assert "see kalmagrove track --help" in capsys.readouterr().err
    assert main(["track"]) == 2
    assert "sync RUN" in capsys.readouterr().out


def test_dashboards_name_only_what_is_logged() -> None:
    assert set(dashboards.PAGES) == {"learning", "cost", "throughput", "groves"}
    for chart in dashboards.charts():
        assert chart.over in AXES, chart.title
        assert chart.names, chart.title
        assert set(chart.names) <= NAMES, chart.title
    drawn = {name for chart in dashboards.charts() for name in chart.names}
    left_out = NAMES - drawn
    assert left_out == {"optim/step"}, "a chart is logged and on no page"
    assert {axis_of(name.partition("/")[0]) for name in BY_USD.values()} == {"usd"}
    (by_layer, _) = [chart for chart in dashboards.charts() if chart.layers]
    assert re.search(str(by_layer.regex), "groves/3.load_cv")
    assert not re.search(str(by_layer.regex), "groves/load_cv")


def test_dashboards_are_written_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "pages.json"
    assert main(["track", "dashboards", "--project", "p", "--out", str(out)]) == 0
    assert "kalmagrove cost: 2 sections, 9 panels" in capsys.readouterr().out
    views = json.loads(out.read_text())
    assert [view["display_name"] for view in views] == [
        f"kalmagrove {page}" for page in dashboards.PAGES
    ]
    panels = [
        panel["config"]
        for view in views
        for section in view["spec"]["section"]["panel_bank_config"]["sections"]
        for panel in section["panels"]
    ]
    assert len(panels) == len(dashboards.charts())
    for panel, chart in zip(panels, dashboards.charts(), strict=True):
        assert panel["x_axis"] == chart.over
        assert (
            (panel.get("metric_regex") == chart.regex)
            if chart.layers
            else (panel["metrics"] == list(chart.names))
        )


def test_dashboards_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboards, "find_spec", lambda _: None)
    with pytest.raises(Exception, match=r'pip install "kalmagrove\[dash\]"'):
        dashboards.build("p", "e")

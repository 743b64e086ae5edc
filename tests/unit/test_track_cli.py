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
from kalmagrove.track import dashboards, read_history
from kalmagrove.track.charts import AXES, BY_USD, NAMES, axis_of

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
    (told,) = {line["run_id"] for line in lines_of(run_folder) if "run_id" in line}
    assert (given["id"], given["name"]) == (told, "tiny")
    assert given["tags"] == ("a",)
    assert given["config"]["steps"] == 8
    assert [values["tokens"] for values in run.logged] == [16, 32, 32]
    assert (run.summary, run.finished) == (summary_in(run_folder), 0)
    assert "wandb sync /runs/tiny/wandb/offline-run-1" in capsys.readouterr().out


def test_sync_of_a_folder_that_was_moved_takes_the_place_of_what_training_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "runs" / "study"
    before = fake(monkeypatch, FakeRun())
    train(study / "tiny", wandb="online")
    write_config(study / "tiny" / "config.yaml", make_run(dir=str(study)))
    (study / "tiny").rename(tmp_path / "copy-of-tiny")
    after = fake(monkeypatch, FakeRun())
    assert main(["track", "sync", str(tmp_path / "copy-of-tiny")]) == 0
    assert {key: after[key] for key in ("id", "name", "group")} == {
        key: before[key] for key in ("id", "name", "group")
    }


def test_sync_of_a_run_without_an_end_tells_what_is_known(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """summary.json is still that of the session before."""
    train(run_folder, wandb="disabled", every=1, ends=False)
    run = FakeRun()
    fake(monkeypatch, run)
    assert main(["track", "sync", str(run_folder)]) == 0
    assert "6 lines of the ledger (no end: it goes on, or was killed)" in capsys.readouterr().out
    last = lines_of(run_folder)[-1]
    assert run.finished == 1
    expected = {
        "status": "open", "run": "tiny", "steps": 2, "val_loss_nats": 3.25, "val_tokens": 700,
        "sessions": 3, "device_seconds": last["device_seconds"],
    }  # fmt: skip
    assert {key: run.summary[key] for key in expected} == expected
    ended = summary_in(run_folder)
    assert ended["sessions"] == 2
    assert set(run.summary) <= set(ended)


def test_the_summary_of_an_end_that_is_not_in_summary_json(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill came between the ledger's last line and the summary, or while that was written."""
    stale = summary_in(run_folder) | {"device_seconds": 0.001}
    for text in (json.dumps(stale), "{"):
        (run_folder / "summary.json").write_text(text)
        run = FakeRun()
        fake(monkeypatch, run)
        assert main(["track", "sync", str(run_folder)]) == 0
        assert (run.summary["status"], run.finished) == ("done", 0)
        assert run.summary["device_seconds"] == lines_of(run_folder)[-1]["device_seconds"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_history(folder / "ledger.jsonl").lines)


def summary_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


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
    assert main(["track", "sync"]) == 2
    said = "kalmagrove: the following arguments are required: runs; see kalmagrove track --help\n"
    assert capsys.readouterr().err == said
    (tmp_path / "ledger.jsonl").touch()
    assert main(["track", "sync", str(tmp_path)]) == 2
    assert "has not begun: its ledger is empty" in capsys.readouterr().err
    for words, code in (([], 2), (["--help"], 0), (["sync", "-h"], 0)):
        assert main(["track", *words]) == code
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
    assert [view["displayName"] for view in views] == [
        f"kalmagrove {page}" for page in dashboards.PAGES
    ]
    panels = [
        panel["config"]
        for view in views
        for section in view["spec"]["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
    ]
    assert len(panels) == len(dashboards.charts())
    for panel, chart in zip(panels, dashboards.charts(), strict=True):
        assert panel["xAxis"] == chart.over
        assert (
            (panel.get("metricRegex") == chart.regex)
            if chart.layers
            else (panel["metrics"] == list(chart.names))
        )


def test_dashboards_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["track", "dashboards", "--out", str(tmp_path)]) == 2
    assert f"--out={tmp_path} cannot be written (Is a directory)" in capsys.readouterr().err


def test_what_is_written_is_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb_workspaces.workspaces import interface, internal

    sent: list[dict[str, Any]] = []

    def send(api: Any, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        sent.append(variables)
        return {"upsertView": {"view": {"id": "x", "name": variables["name"]}}}

    monkeypatch.setattr(internal, "execute_graphql", send)
    monkeypatch.setattr(internal.wandb, "Api", lambda: None)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://host")
    pages = dashboards.build("mine", "us")
    written = json.loads(dashboards.as_json(pages))
    dashboards.push(pages)
    for view in sent:
        view["spec"] = json.loads(view["spec"])
    assert written == [{key: view[key] for key in written[0]} for view in sent]
    assert set(sent[0]) - set(written[0]) == {"name", "description", "locked"}


def test_dashboards_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboards, "find_spec", lambda _: None)
    with pytest.raises(Exception, match=r'pip install "kalmagrove\[dash\]"'):
        dashboards.build("p", "e")

"""What the user reads: golden lines, and the live panel."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from kalmagrove.track.console import Console, plain_line, show_seconds, show_spent

pytestmark = pytest.mark.unit

STEP: dict[str, Any] = {
    "event": "step",
    "step": 120,
    "tokens": 1_966_080,
    "device_seconds": 900.0,
    "usd": 0.01,
    "usd_projected": 0.025,
    "loss": 3.41249,
    "val_loss": 3.601,
    "tokens_per_s": 5119.7,
    "seconds_left": 151.2,
    "lr": 9.1e-4,
    "grad_norm": 0.831,
    "mfu": None,
    "load_cv": 0.21,
    "out_of_range": 0.0031,
}


def test_golden_step_line() -> None:
    assert plain_line(STEP, 300) == (
        "step   120/300  loss 3.412  val 3.601  5,120 tok/s  2:31 left  $0.01 (of $0.03)  "
        "lr 9.1e-04  grad 0.83  load cv 0.21  out 0.3%"
    )


def test_unknown_figures_are_left_out_or_named() -> None:
    bare = STEP | {"val_loss": None, "usd": None, "usd_projected": None, "seconds_left": None}
    bare |= {"loss": None, "load_cv": None, "out_of_range": None, "grad_norm": None, "mfu": 0.412}
    assert plain_line(bare, 300) == (
        "step   120/300  loss -  5,120 tok/s  - left  unknown price  lr 9.1e-04  MFU 41.2%"
    )


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            {"event": "eval", "val_loss": 3.6, "val_bits_per_byte": 1.5, "seconds": 2.04},
            "val 3.6000 nats  1.5000 bits/byte  (2.0 s)",
        ),
        (
            {"event": "eval", "val_loss": None, "val_bits_per_byte": None, "seconds": 2.0},
            "val - nats  (2.0 s)",
        ),
        ({"event": "checkpoint", "path": "c/step-5", "seconds": 1.0}, "saved c/step-5  (1.0 s)"),
        ({"event": "skip", "reason": "loss is inf"}, "skipped: loss is inf"),
        (
            {"event": "refit", "grids": {"3": {"before": 0.12, "after": 0.001, "error": 0.0}}},
            "refitted grid of layer 3: out of range 12.0% -> 0.1%",
        ),
        (
            {
                "event": "refit",
                "grids": {f"{n}.1": {"before": n / 10, "after": 0.0} for n in range(5)},
            },
            "refitted 5 grids of layer 0.1, 1.1, 2.1, 3.1, ...: out of range 40.0% -> 0.0%",
        ),
        (
            {"event": "resume", "devices": 2, "unit": "core", "price": "unknown", "lost_steps": 3},
            "continued on 2 cores, price unknown; "
            "3 steps since the last checkpoint were lost and are paid for",
        ),
        (
            {"event": "stop", "status": "done", "usd": 1.5, "device_seconds": 7200, "unit": "gpu"},
            "done  $1.50  2.0000 gpu-hours",
        ),
    ],
)
def test_golden_event_lines(line: dict[str, Any], text: str) -> None:
    assert plain_line({"step": 5, **line}, 1000) == f"step     5/1,000  {text}"


def test_durations_and_dollars() -> None:
    assert show_seconds(0) == "0:00"
    assert show_seconds(59.6) == "1:00"
    assert show_seconds(3 * 86400) == "3d 00:00"
    assert show_spent(12.0, None) == "$12.00"
    assert show_spent(None, 1.0) == "unknown price"


def test_a_log_that_cannot_be_written_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    out = io.StringIO()
    console = Console("plain", "tiny", 300, Path("/dev/full"), RichConsole(file=out, width=110))
    console.line(STEP)
    console.show("a table")
    console.close()
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full cannot be written (No space left on device)"
    ]
    assert plain_line(STEP, 300) in out.getvalue()


@pytest.mark.parametrize("mode", ["plain", "live", "off", "auto"])
def test_the_log_gets_every_line_whatever_the_screen_shows(mode: Any, tmp_path: Path) -> None:
    out = io.StringIO()
    screen = RichConsole(file=out, force_terminal=mode == "live", width=110)
    console = Console(mode, "tiny 1.0M parameters", 300, tmp_path / "console.log", screen)
    console.start(0)
    console.progress(119)
    console.line(STEP)
    console.line({"event": "skip", "step": 121, "reason": "loss is nan", "usd": 0.01})
    console.close()
    golden = plain_line(STEP, 300)
    assert (tmp_path / "console.log").read_text().splitlines() == [
        golden,
        "step   121/300  skipped: loss is nan",
    ]
    shown = out.getvalue()
    if mode == "off":
        assert shown == ""
    elif mode == "live":
        for part in ("tiny 1.0M parameters", "121/300", "3.412", "$0.01 (of $0.03)", "skipped"):
            assert part in shown
        assert golden not in shown
    else:
        assert golden in shown

"""The doctor, with two processes that it starts itself."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import run

pytestmark = pytest.mark.e2e


def test_doctor(tmp_path: Path) -> None:
    done = run("doctor", "--nproc", "2", "--json", "found.json", cwd=tmp_path, DS_ACCELERATOR="cpu")
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    problems = [finding for finding in found if finding["level"] == "problem"]
    assert done.returncode == bool(problems), done.stdout + done.stderr
    topics = {finding["topic"]: finding for finding in found}
    assert {"packages", "memory", "runs", "cache", "clock", "ports", "W&B", "hub"} <= set(topics)
    assert "GB/s over 2 ranks" in topics["all-reduce"]["text"]
    assert "GB/s over 2 ranks" in topics["all-to-all"]["text"]
    assert topics["clocks"]["level"] == "ok", "both are on this machine"
    assert done.stdout.count("all-reduce") == 1, "one rank says it"

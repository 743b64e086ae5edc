"""Resuming is exact; kills, signals, damage, foreign checkpoints and full disks do no harm."""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import Ranks, run_ranks

pytestmark = pytest.mark.dist


def resumed_variants() -> dict[str, dict[str, Any]]:
    adam: dict[str, Any] = {"batch": {"micro": 2}, "optim": {"kind": "adamw", "lr": 0.01}}
    variants = {f"z{stage}": {**adam, "zero": {"stage": stage}} for stage in range(4)}
    for stage in (1, 2, 3):
        variants[f"z{stage} bf16"] = {**variants[f"z{stage}"], "engine": {"precision": "bf16"}}
    variants["z2 muon"] = {**variants["z2"], "optim": {"kind": "muon", "lr": 0.01}}
    return variants


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    jobs = {
        "roundtrip": {"folder": str(folder), "variants": resumed_variants()},
        "refusals": {"folder": str(folder / "refusals")},
    }
    found: dict[str, Any] = run_ranks("several", 2, jobs=jobs, timeout=300)
    return found


def test_resuming_is_bit_exact_at_every_stage(results: dict[str, Any]) -> None:
    for name in resumed_variants():
        found = results["roundtrip"][name]
        assert found["part"] == {step: found["whole"][step] for step in ("5", "6")}, name
        assert found["equal"] == [True, True], name
        assert found["random_equal"], name
        assert found["val"][0] == found["val"][1], name
        assert found["left"] == ["step-000004", "step-000006"], name
        assert found["events"][:2] == [["loaded", 4], ["start", 4, 4 * 64]], name
        exported, own = found["exported"]
        assert exported == (own if "bf16" not in name else pytest.approx(own, rel=1e-3)), name
        assert found["saved_step"] == 6, name


def test_damaged_foreign_and_unwritable_checkpoints(results: dict[str, Any]) -> None:
    result = results["refusals"]
    for rank in range(2):
        model = result["model"][rank]
        assert "model.d_model: checkpoint 12, run 16" in model
        assert "model.logit_z_loss: checkpoint 0.0, run 0.5" in model
        assert result["layout"][rank] == 6, "any ZeRO stage continues it"
        assert "optim.kind: checkpoint sgd, run adamw" in result["optim"][rank]
        assert result["longer"][rank] == 6
        assert "there is no whole checkpoint in" in result["nothing"][rank]
        assert result["own_first"][rank] == 6
        assert "lies in the run's own folder" in result["own_path"][rank]
        assert result["fallback"][rank] == 4
        assert "there is no whole checkpoint in" in result["asked_damaged"][rank]
        assert result["path"][rank] == 2
        assert result["path_again"][rank] == 4, "the command given again continues its own run"
        assert result["never"][rank] == 0
    assert result["left"] == ["step-000002", "step-000004", "step-000006.aside"]
    for rank in range(2):
        for message in result[f"full_disk_{rank}"]:
            assert "could not be written: " + f"on rank {rank}: " * (rank > 0) in message
            assert "last good checkpoint is" in message
            assert "step-000004" in message
        assert result[f"left_{rank}"] == result["left"]
    assert result["after_path"] == [result["left"], ["step-000004"]]


def wait_for(checkpoint: Path, ranks: Ranks) -> None:
    deadline = time.monotonic() + 90
    while not checkpoint.exists():
        assert time.monotonic() < deadline, ranks.output()
        assert all(p.poll() is None for p in ranks.processes), ranks.output()
        time.sleep(0.01)


def test_killed_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """SIGKILL of both processes, then SIGTERM to one of them, then to the end."""
    common: dict[str, Any] = {"sections": {"zero": {"stage": 2}, "steps": 30}}
    folder = tmp_path / "broken" / "checkpoints"

    first = Ranks("train", 2, folder=str(folder.parent), **common)
    wait_for(folder / "step-000005", first)
    first.kill()

    second = Ranks("train", 2, folder=str(folder.parent), **common)
    wait_for(folder / "step-000015", second)
    second.signal(signal.SIGTERM, 1)
    assert second.codes() == [75, 75], second.output()
    assert "the same command continues" in second.output()

    whole = str(tmp_path / "whole")
    last = run_ranks("train", 2, folder=str(folder.parent), whole=whole, **common)
    assert len(last["whole"]) == 30
    start = last["events"][1]
    assert start[0] == "start"
    assert start[1] >= 15
    assert last["steps"] == {k: v for k, v in last["whole"].items() if int(k) > start[1]}
    assert last["events"][-1] == ["stop", "done"]

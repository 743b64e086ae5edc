"""A loss or gradient that is not finite changes nothing, anywhere, and many of them end the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import run_ranks

pytestmark = pytest.mark.dist


def variants() -> dict[str, dict[str, Any]]:
    common: dict[str, Any] = {"batch": {"micro": 2}, "optim": {"kind": "adamw", "lr": 0.01}}
    found = {f"z{stage}": {**common, "zero": {"stage": stage}} for stage in range(4)}
    for stage in (1, 2, 3):
        found[f"z{stage} bf16"] = {**found[f"z{stage}"], "engine": {"precision": "bf16"}}
    found["z2 muon"] = {**found["z2"], "optim": {"kind": "muon", "lr": 0.01}}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gives-up")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    jobs = {"nonfinite": {"variants": variants()}, "gives_up": {"folder": str(folder)}}
    found: dict[str, Any] = run_ranks("several", 2, jobs=jobs, timeout=300)
    return found


def test_bad_steps_change_nothing_at_any_stage(results: dict[str, Any]) -> None:
    for name in variants():
        for rank, facts in enumerate(results["nonfinite"][name]):
            where = f"{name} on rank {rank}"
            assert facts["skipped"] == [True, True], where
            assert facts["unchanged"] == [True, True], where
            assert facts["next_equal"] == [True] * 4, where
            loss, gradient = facts["reasons"]
            assert loss == "loss not finite on rank 1, micro-batch 1 of 2", where
            assert gradient == "gradient not finite", where
            assert facts["total"] == 2, where


def test_too_many_in_a_row_end_the_run_and_bad_weights_are_never_saved(
    results: dict[str, Any], folder: Path
) -> None:
    result = results["gives_up"]
    assert "steps 3 to 5 gave no finite update" in result["message"]
    assert "optim.lr (now 0.2)" in result["message"]
    assert [e[1] for e in result["events"] if e[0] == "skipped"] == [3, 4, 5]
    assert result["events"][-1] == ["stop", "failed"]
    assert result["finite"]
    assert "weights at step 5 are not finite and are not saved" in result["poisoned"]
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]

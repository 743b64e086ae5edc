"""A loss or gradient that is not finite changes nothing, anywhere, and many of them end the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import run_ranks

pytestmark = pytest.mark.dist


def test_bad_steps_change_nothing_at_any_stage() -> None:
    common: dict[str, Any] = {"batch": {"micro": 2}, "optim": {"kind": "adamw", "lr": 0.01}}
    variants = {f"z{stage}": {**common, "zero": {"stage": stage}} for stage in range(4)}
    for stage in (1, 2, 3):
        variants[f"z{stage} bf16"] = {**variants[f"z{stage}"], "engine": {"precision": "bf16"}}
    variants["z2 muon"] = {**variants["z2"], "optim": {"kind": "muon", "lr": 0.01}}
    result = run_ranks("nonfinite", 2, variants=variants, timeout=200)
    for name in variants:
        for rank, facts in enumerate(result[name]):
            where = f"{name} on rank {rank}"
            assert facts["skipped"] == [True, True], where
            assert facts["unchanged"] == [True, True], where
            assert facts["next_equal"] == [True] * 4, where
            assert facts["reasons"] == ["loss not finite on 1 ranks", "gradient not finite"], where
            assert facts["total"] == 2, where


def test_too_many_in_a_row_end_the_run_and_bad_weights_are_never_saved(tmp_path: Path) -> None:
    result = run_ranks("gives_up", 2, folder=str(tmp_path))
    assert "steps 3 to 5 gave no finite update" in result["message"]
    assert "optim.lr (now 0.2)" in result["message"]
    assert [e[1] for e in result["events"] if e[0] == "skipped"] == [3, 4, 5]
    assert result["events"][-1] == ["stop", "failed"]
    assert result["finite"]
    assert "weights at step 5 are not finite and are not saved" in result["poisoned"]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]

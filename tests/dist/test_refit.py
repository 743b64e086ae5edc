"""A refitted grid is the same on every rank, and the optimizer does not put the old one back."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import run_ranks

pytestmark = pytest.mark.dist
MODEL = [
    "model.layers=2",
    "model.ffn.pattern=[kan,grove]",
    "model.ffn.kan.edges=33",  # its coefficients do not divide over two ranks
    "model.ffn.kan.edge={range: [-1.0, 1.0], refit_above: 0.0}",
    "model.ffn.grove.kan.edge={range: [-1.0, 1.0], refit_above: 0.0}",
    "optim.lr=0.05",
    "batch.micro=2",
]
BF16 = "engine.precision=bf16"
RESUMED = ["z0", "z2", "z3", "z1 bf16"]  # one for each of DeepSpeed's optimizers


def test_refits_at_every_stage(tmp_path: Path) -> None:
    variants = {f"z{stage}": [*MODEL, f"zero.stage={stage}"] for stage in range(4)}
    variants |= {f"z{stage} bf16": [*variants[f"z{stage}"], BF16] for stage in (1, 2, 3)}
    variants["z3 persistent"] = [*variants["z3"], "zero.persist=100000"]
    common: dict[str, Any] = {"folder": str(tmp_path), "resumed": RESUMED}
    one = run_ranks("refits", 1, variants={"z0": variants["z0"]}, **common)["z0"]
    two = run_ranks("refits", 2, variants=variants, timeout=300, **common)
    for name, found in two.items():
        first, second = found["refit"]
        assert first == second, f"{name}: the ranks differ"
        assert first["moved"].keys() >= {"0", "1.shared"}, name
        assert all(after < 0.01 < before for before, after in first["moved"].values()), name
        start, refitted, stepped = first["grids"]
        assert start["ranges"] != refitted["ranges"], name
        assert start["model"] != refitted["model"] == refitted["optimizer"], name
        assert stepped == refitted, f"{name}: the step undid the refit"

        if name not in RESUMED:
            continue
        assert [step for step, _ in found["whole_refits"]] == [2, 4], name
        assert found["part_refits"] == found["whole_refits"][1:], name
        assert found["part"] == {step: found["whole"][step] for step in ("4", "5")}, name
        if "bf16" not in name:
            assert found["whole_refits"] == one["whole_refits"], name
            for step, figures in one["whole"].items():
                assert found["whole"][step] == pytest.approx(figures, rel=2e-5), (name, step)

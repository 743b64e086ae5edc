"""Any layout of tensor, expert and context parallelism at any ZeRO stage trains like one process.

Losses, the gradient of every parameter, the global norm and the routers' biases are compared with
plain torch, with SGD (Adam would hide a wrong scale), accumulation and clipping. A representative
part runs always; `make test-matrix` runs all of it.
"""

from typing import Any

import pytest
import torch

from tests.dist.harness import WHOLE, run_ranks
from tests.dist.matrix import BF16, REPRESENTATIVE, STEPS, Case, name_of, whole_matrix

pytestmark = pytest.mark.dist


def check(
    chosen: Case, found: dict[str, Any], references: dict[str, Any], fp32: float = 2e-5
) -> None:
    """fp32: how far losses and norms may be off, relatively."""
    rounded = BF16 in chosen["overrides"]
    clip = "0.0" if "optim.clip=0" in chosen["overrides"] else "0.5"
    tolerance = 3e-2 if rounded else fp32
    torch.testing.assert_close(
        torch.tensor(found["steps"]),
        torch.tensor(references[clip][:STEPS]),
        rtol=tolerance,
        atol=tolerance,
    )
    grids, (loss, _) = found["refitted"]
    assert {"0.shared", "1"} <= set(grids)
    assert abs(loss / references[clip][STEPS][0] - 1) < 3e-2, "a refit keeps the function"
    # bf16 may choose other edges and groves where two are close: single gradients differ by more.
    limit = 0.5 if rounded else 1e-3
    wrong = {name: error for name, error in found["errors"].items() if error > limit}
    assert not wrong, f"gradients differ: {wrong}"
    if not rounded:
        assert max(found["biases"].values()) == 0


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("ranks", [2, 4] if WHOLE else [4])
def test_layouts_train_like_one_process(ranks: int) -> None:
    cases = whole_matrix(ranks) if WHOLE else REPRESENTATIVE
    found = run_ranks(
        "matrix", ranks, module="tests.dist.matrix", timeout=60 + 30 * len(cases), cases=cases
    )
    failed = []
    for chosen in cases:
        try:
            check(chosen, found["cases"][name_of(chosen)], found["reference"])
        except AssertionError as error:
            failed.append(f"{name_of(chosen)}: {error}")
    assert not failed, f"{len(failed)} of {len(cases)} cases:\n" + "\n".join(failed)

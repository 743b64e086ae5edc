"""Every feed-forward under tensor, sequence and expert parallelism is the one of a single process.

Outputs, every gradient, router state and bytes sent; the cases are data, one start a rank count.
"""

from typing import Any

import pytest

from tests.dist.harness import WHOLE, run_ranks

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not WHOLE, reason="takes minutes; `make test-matrix` runs it"),
]

SP = {"tp": 2, "sequence": True}
SOFT = {"routing": "straight_through"}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dense tp": {"kind": "dense", "tp": 2},
        "dense sp": {"kind": "dense", **SP},
        "dense cp": {"kind": "dense", "cp": 2},
        "kan tp": {"kind": "kan", "tp": 2},
        "kan tp soft": {"kind": "kan", "tp": 2, **SOFT, "basis": "rational"},
        "kan sp": {"kind": "kan", **SP, "basis": "chebyshev1", "base": "none"},
        "kan sp soft": {"kind": "kan", **SP, **SOFT},
        "grove dp": {"kind": "grove"},
        "grove ep": {"kind": "grove", "ep": 2},
        "grove ep soft": {"kind": "grove", "ep": 2, **SOFT, "basis": "rational"},
        "grove ep, no base": {"kind": "grove", "ep": 2, "base": "none", "shared": False},
        "grove ep in cp": {"kind": "grove", "cp": 2, "ep": 2},
        "grove tp": {"kind": "grove", "tp": 2},
        "grove sp": {"kind": "grove", **SP},
        "grove ep in tp": {"kind": "grove", "tp": 2, "ep": 2},
        "grove ep in sp": {"kind": "grove", **SP, "ep": 2},
        "grove ep, all choose one": {"kind": "grove", "ep": 2, "top": 1, "chosen": [3]},
        "grove ep, all choose one rank's": {"kind": "grove", "ep": 2, "chosen": [0, 1]},
        "grove ep, all groves": {"kind": "grove", "ep": 2, "top": 4},
        "grove dp capacity": {"kind": "grove", "capacity": 1.0},
        "grove ep capacity": {"kind": "grove", "ep": 2, "capacity": 0.75},
        "grove ep capacity, crowded": {
            "kind": "grove",
            "ep": 2,
            "top": 1,
            "chosen": [2],
            "capacity": 0.5,
        },
        "moe ep": {"kind": "moe", "ep": 2},
        "moe ep in tp": {"kind": "moe", "tp": 2, "ep": 2},
        "moe ep in sp": {"kind": "moe", **SP, "ep": 2, "shared": False},
        "moe ep, all choose one": {"kind": "moe", "ep": 2, "top": 1, "chosen": [0]},
        "moe sp capacity": {"kind": "moe", **SP, "ep": 2, "capacity": 0.75},
        "grove ep fp32": {"kind": "grove", **SP, "ep": 2, "dtype": "float32"},
        "moe ep fp32": {"kind": "moe", "ep": 2, "dtype": "float32"},
        "kan tp fp32": {"kind": "kan", "tp": 2, "dtype": "float32"},
    },
    4: {
        "dense tp x dp": {"kind": "dense", **SP},
        "dense tp x cp": {"kind": "dense", **SP, "cp": 2},
        "kan tp x cp": {"kind": "kan", **SP, "cp": 2},
        "kan tp 4": {"kind": "kan", "tp": 4, **SOFT},
        "grove ep 2": {"kind": "grove", "ep": 2},
        "grove ep 4": {"kind": "grove", "ep": 4, **SOFT},
        "grove tp 2, ep 1": {"kind": "grove", "tp": 2},
        "grove tp 2, ep 2": {"kind": "grove", "tp": 2, "ep": 2},
        "grove sp 2, ep 2": {"kind": "grove", **SP, "ep": 2, "top": 3},
        "grove tp 2, ep 4": {"kind": "grove", "tp": 2, "ep": 4},
        "grove sp 2, ep 4": {"kind": "grove", **SP, "ep": 4},
        "grove tp 2, cp 2, ep 4": {"kind": "grove", "tp": 2, "cp": 2, "ep": 4},
        "grove cp 2, ep 2": {"kind": "grove", "cp": 2, "ep": 2},
        "grove ep 4, all choose one": {"kind": "grove", "ep": 4, "top": 1, "chosen": [1]},
        "grove ep 4 in sp, all choose two": {"kind": "grove", **SP, "ep": 4, "chosen": [0, 3]},
        "grove ep 4 capacity": {"kind": "grove", **SP, "ep": 4, "capacity": 0.75},
        "moe ep 4": {"kind": "moe", "ep": 4, "shared": False},
        "moe tp 2, ep 4": {"kind": "moe", "tp": 2, "ep": 4, "top": 3},
        "moe sp 2, ep 2": {"kind": "moe", **SP, "ep": 2},
        "moe ep 4, all choose one": {"kind": "moe", "ep": 4, "top": 1, "chosen": [2]},
        "moe ep 2 capacity": {"kind": "moe", "ep": 2, "capacity": 0.5},
    },
}
PIECES = {  # parameters that are pieces, with tp > 1 or without, beside those of groves and experts
    "dense": {"down", "gate", "up"},
    "kan": {"u", "v"},
    "grove": {"shared.u", "shared.v"},
    "moe": {"shared.down", "shared.gate", "shared.up"},
}
EXPERTS = {
    "dense": set(),
    "kan": set(),
    "grove": {"edge.coef", "edge.scale", "edges", "u", "v"},
    "moe": {"down", "gate", "up"},
}


@pytest.mark.parametrize("ranks", CASES)
def test_feed_forwards_are_those_of_one_process(ranks: int) -> None:
    cases = CASES[ranks]
    found = run_ranks(
        "compare_all", ranks, timeout=900, module="tests.dist.ffn_workers", cases=cases
    )
    assert set(found) == set(cases)
    for name, result in found.items():
        case = cases[name]
        precise = case.get("dtype") != "float32"
        for what, error in result["errors"].items():
            counted_fp32 = what in ("load", "dropped", "aux loss")
            limit = 1e-10 if precise and not counted_fp32 else 1e-5
            assert error < limit, f"{name}: {what} is off by {error:.1e}"
        assert result["missing"] == [], f"{name}: parameters without gradient"
        assert (result["dropped"] > 0) == ("capacity" in case), name

        experts = set(EXPERTS[case["kind"]])
        if case.get("base") == "none":
            experts -= {"edge.scale"}
        assert set(result["experts"]) == experts, name
        split = case.get("tp", 1) > 1 and case.get("shared", True)
        assert set(result["tags"]) == experts | (PIECES[case["kind"]] if split else set()), name
        assert result["buffers"] == (["edge.range"] if case["kind"] == "grove" else []), name

"""A checkpoint of any layout is continued by any other as if nothing had happened.

Runs begin on one process and travel over ZeRO stages, precisions and layouts of two, with
KALMAGROVE_MATRIX (`make test-matrix`) over more of them, on four and then on two. Their losses are
those of an uninterrupted run; what is only loaded and saved again is the same, bit for bit.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kalmagrove.engine.checkpoint_files import WEIGHTS_FILE, read_index
from kalmagrove.engine.checkpoint_tools import newest, verify
from kalmagrove.engine.tensor_files import TensorReader
from kalmagrove.engine.tensor_index import assemble
from tests.dist.harness import WHOLE, run_ranks
from tests.dist.reshape_workers import STEPS

pytestmark = pytest.mark.dist
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "lr": 0.01},
    "sgd": {"kind": "sgd", "lr": 0.2, "momentum": 0.9},
    "plain": {"kind": "sgd", "lr": 0.2, "momentum": 0.0},
    "muon": {"kind": "muon", "lr": 0.01},
}
FP32, BF16 = "fp32", "bf16"
SEQUENCE = "parallel.sequence=true"
FIRST, SECOND = (4 if WHOLE else 2), 2  # processes, after one

# ZeRO stages of the toy's runs on the first processes, and then on the second
STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "adamw": ((0, 2, 3), (3, 1, 0)),
    "sgd": ((3,), (1,)),
    "plain": ((1,), (0,)),
    "muon": ((2,), (1,)),
}
# What a state travels through without a step
COPIES = [(1, BF16), (3, BF16), (2, BF16), (0, FP32), (3, FP32)]
if WHOLE:
    everything = ((0, 1, 2, 3), (3, 2, 1, 0))
    STAGES = dict.fromkeys(STAGES, everything) | {"muon": ((0, 1, 2), (2, 1, 0))}
    COPIES = [(0, FP32), (1, BF16), (1, FP32), (2, BF16), (3, FP32), (3, BF16), (2, FP32)]


def toy(optimizer: str, stage: int, precision: str = FP32) -> dict[str, Any]:
    return {
        "optim": OPTIMIZERS[optimizer],
        "zero": {"stage": stage},
        "engine": {"precision": precision},
        "batch": {"micro": 1},
    }


def real(stage: int, tp: int = 1, ep: int = 1, cp: int = 1, *more: str) -> list[str]:
    layout = {"tp": tp, "ep": ep, "cp": cp}
    sizes = [f"parallel.{key}={size}" for key, size in layout.items()]
    return [f"zero.stage={stage}", *sizes, *more]


# Layouts of the real model on the first processes, and where each goes on on the second
REAL: list[tuple[list[str], list[str]]] = [
    (real(2, 2, 2, 1, SEQUENCE), real(3, 1, 2)),
    (real(0, 1, 1, 2), real(1, 2, 1)),
]
if WHOLE:
    REAL = [
        (real(2, 2, 4, 1, SEQUENCE), real(3, 1, 2)),
        (real(3, 1, 2, 2), real(1, 2, 2, 1, SEQUENCE)),
        (real(0, 2, 2, 2), real(2, 2, 1)),
        (real(1, 2, 2), real(0, 1, 1, 2)),
        (real(3, 2, 2), real(0)),
        (real(1, 1, 4), real(1, 2, 2)),
        (real(0, 1, 4), real(3, 2, 2)),
        (real(2, 1, 1, 2), real(2, 1, 2)),
    ]


class Route:
    """The legs of all runs, by number of processes; a leg is known by the folder it saves into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.legs: dict[int, list[dict[str, Any]]] = {}

    def leg(self, ranks: int, name: str, source: str | None, until: int, **model: Any) -> None:
        into = str(self.folder / name)
        start = source and str(self.folder / source)
        seed = 0 if source is None else 1
        leg = {"into": into, "from": start, "until": until, "seed": seed, **model}
        self.legs.setdefault(ranks, []).append(leg)

    def travel(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        module = "tests.dist.reshape_workers"
        for ranks in dict.fromkeys((1, FIRST, SECOND)):
            legs = self.legs[ranks]
            found |= run_ranks("legs", ranks, module=module, timeout=60 + 20 * len(legs), legs=legs)
        return found


def plan(folder: Path) -> Route:
    route = Route(folder)
    for optimizer, (first, second) in STAGES.items():
        route.leg(1, f"{optimizer} whole", None, STEPS, toy=toy(optimizer, 0))
        route.leg(1, f"{optimizer} 1", None, 2, toy=toy(optimizer, 0))
        for before, after in zip(first, second, strict=True):
            name = f"{optimizer} first z{before}"
            route.leg(FIRST, name, f"{optimizer} 1", 4, toy=toy(optimizer, before))
            route.leg(SECOND, f"{optimizer} z{after}", name, STEPS, toy=toy(optimizer, after))
    last = "adamw first z2"
    for ranks, (stage, precision) in itertools.product((FIRST, SECOND) if WHOLE else (2,), COPIES):
        name = f"copy {ranks} z{stage} {precision}"
        route.leg(ranks, name, last, 4, toy=toy("adamw", stage, precision))
        last = name
    route.leg(1, "real whole", None, STEPS, real=real(0))
    route.leg(1, "real 1", None, 2, real=real(1))
    for number, (before, after) in enumerate(REAL):
        route.leg(FIRST, f"real first {number}", "real 1", 4, real=before)
        route.leg(SECOND, f"real second {number}", f"real first {number}", STEPS, real=after)
        if number == 0 or WHOLE:
            route.leg(SECOND, f"copied {number}", f"real first {number}", 4, real=after)
    route.leg(FIRST, "counts", None, 1, toy=toy("adamw", 1), counts=True)
    route.leg(FIRST, "counts same", "counts", 1, toy=toy("adamw", 1))
    route.leg(SECOND, "counts other", "counts", 1, toy=toy("adamw", 2))
    route.legs[FIRST].append({"alter": str(folder / "adamw first z3"), "into": str(folder)})
    route.leg(SECOND, "adamw merged", "merged", STEPS, toy=toy("adamw", 2))
    for name in ("weights", "torn"):
        route.leg(SECOND, f"from {name}", name, 4, toy=toy("adamw", 1))
    route.leg(SECOND, "momentum", "plain first z1", 4, toy=toy("sgd", 1))
    return route


@pytest.fixture(scope="module")
def route(tmp_path_factory: pytest.TempPathFactory) -> Route:
    return plan(tmp_path_factory.mktemp("reshape"))


@pytest.fixture(scope="module")
def results(route: Route) -> dict[str, Any]:
    return route.travel()


def whole_tensors(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor of a checkpoint, put together; and the numbers that go with it."""
    index, reader = read_index(checkpoint), TensorReader(checkpoint)
    assert verify(checkpoint) == []
    tensors = {
        f"{name}/{kind}": assemble(name, kind, entry, None, 0, entry.numel, reader.read).view(
            entry.shape
        )
        for name, entry in index.items()
        for kind in entry.kinds
    }
    return tensors, {name: dict(entry.scalars) for name, entry in index.items()}


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "real"])
def test_losses_are_those_of_an_uninterrupted_run(results: dict[str, Any], kind: str) -> None:
    whole = results[f"{kind} whole"]["losses"]
    assert len(whole) == STEPS
    tolerance = 1e-4 if kind == "muon" else 1e-5
    legs = [name for name in results if name.startswith(f"{kind} ")]
    assert len(legs) >= 4
    for name in legs:
        found = results[name]["losses"]
        assert len(found) >= 2
        expected = [whole[step] for step in found]
        assert list(found.values()) == pytest.approx(expected, rel=tolerance), name
        assert results[name]["rounded"], name


def check_same(checkpoint: Path, source: Path) -> None:
    """Bit for bit the same weights, states and buffers, also in the file of whole weights."""
    expected, scalars = whole_tensors(source)
    found, numbers = whole_tensors(checkpoint)
    assert numbers == scalars
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key].float(), tensor.float()), key
    parts = {key.rpartition("/")[0]: tensor for key, tensor in found.items() if "/exp" not in key}
    weights = load_file(checkpoint / WEIGHTS_FILE)
    assert {name for name in weights if not name.endswith(".load")} == parts.keys()
    for name, part in parts.items():
        assert torch.equal(weights[name], part.to(weights[name].dtype)), name


def test_what_is_loaded_and_saved_again_is_the_same(results: dict[str, Any], route: Route) -> None:
    """Over ZeRO stages, from fp32 to bf16 and back, over layouts, on four processes and on two."""
    copies = {name: "adamw first z2" for name in results if name.startswith("copy ")}
    copies |= {
        name: f"real first {name.split()[1]}" for name in results if name.startswith("copied")
    }
    assert len(copies) > len(COPIES)
    for name, source in copies.items():
        assert results[name]["start"] == 4
        assert results[name]["rounded"], name
        check_same(newest(route.folder / name), newest(route.folder / source))


def test_router_counts_keep_their_sum(results: dict[str, Any]) -> None:
    """Each rank's own on the same layout; all on the first rank of another one."""
    counts = [2 * 3 * (rank + 1) for rank in range(FIRST)]
    assert results["counts same"]["counts"] == counts
    assert results["counts other"]["counts"] == [sum(counts), 0]


def test_random_numbers_go_on(results: dict[str, Any]) -> None:
    found = results["counts same"]["random"]
    assert len(set(found)) == 1, "all ranks were seeded alike"
    assert found != results["counts"]["random"]
    assert results["counts other"]["random"] == found[:SECOND]


def test_states_that_were_not_kept_begin_anew(results: dict[str, Any], route: Route) -> None:
    for name, kinds in (("from weights", {"weight", "buffer"}), ("momentum", {"weight", "buffer"})):
        assert results[name]["start"] == 4
        found = {kind for e in read_index(newest(route.folder / name)).values() for kind in e.kinds}
        assert found == kinds


def test_a_part_that_is_missing_ends_all_ranks(results: dict[str, Any]) -> None:
    errors = results["from torn"]["error"]
    assert len(errors) == 2
    for error in errors:
        assert "cannot be loaded: blocks.0.u_MRD [3, 5, 12]: elements: [" in error
        assert ") of 180 is missing" in error

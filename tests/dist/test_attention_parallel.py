"""Attention split over processes computes what one process does: outputs and every gradient."""

import functools
from typing import Any

import pytest

from tests.dist.harness import WHOLE, run_ranks

pytestmark = pytest.mark.dist

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {"tp": 2},
        "tp2 sequence": {"tp": 2, "sequence": True},
        "cp2": {"cp": 2},
    },
    4: {
        "tp4": {"tp": 4},
        "tp4 sequence": {"tp": 4, "sequence": True},
        "cp4": {"cp": 4},
        "tp2 cp2": {"tp": 2, "cp": 2},
        "tp2 cp2 sequence": {"tp": 2, "cp": 2, "sequence": True},
    },
}
PAPER = {
    "decay": "none", "rope": False, "qk_norm": False, "output_norm": False, "output_gate": False,
}  # fmt: skip
ADA: dict[str, dict[str, Any]] = {
    "auto": {"chunk": 3},
    "quadratic": {"form": "quadratic"},
    "chunked": {"form": "chunked"},
    "one chunk": {"form": "chunked", "chunk": 64},
    "recurrent": {"form": "recurrent"},
    "paper": PAPER,
    "ode": {"kernel": "ode", "taps": 3, "ode_hidden": 5},
    "no kernel": {"kernel": "none", "decay": "fixed"},
    "one tap": {"taps": 1},
    "many taps": {"taps": 20, "kernel_activation": "silu"},
    "narrow": {"qk_rank": 4},
    "ranks": {"qk_rank": ((2, 6, 4, 2),)},
    "ranks, second half narrow": {"qk_rank": ((5, 3, 1, 1),), "rope": False, "kernel": "ode"},
}
SOFTMAX: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"rope": False, "qk_norm": False},
    "grouped": {"kv_heads": 2},
}
MLA: dict[str, dict[str, Any]] = {"default": {}, "compressed queries": {"q_rank": 10}}
KINDS = {"ada": ADA, "softmax": SOFTMAX, "mla": MLA}
# Lengths of the documents in two rows of 24 tokens, which are cut at 12, or at 6, 12 and 18.
DOCUMENTS: dict[str, list[list[int]] | None] = {
    "unpacked": None,
    "around borders": [[5, 8, 11], [7, 4, 2, 11]],
    "at borders": [[6, 6, 6, 6], [12, 12]],
    "spanning": [[24], [1, 22, 1]],
    "single tokens": [[1] * 24, [11, 1, 1, 11]],
    "within pieces": [[2, 2, 4, 2, 2, 4, 2, 2, 4], [3, 14, 2, 5]],
}


def cases() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind, settings in KINDS.items():
        for setting, options in settings.items():
            for packing, documents in DOCUMENTS.items():
                case = {"kind": kind, "options": options, "documents": documents}
                found[f"{kind}, {setting}, {packing}"] = case
        base = {"kind": kind, "options": {}, "documents": DOCUMENTS["around borders"]}
        found[f"{kind}, fp32"] = {**base, "dtype": "float32"}
        found[f"{kind}, recomputed"] = {**base, "again": True}
        found[f"{kind}, four tokens"] = {**base, "documents": [[3, 1], [1, 3]], "tokens": 4}
        found[f"{kind}, odd pieces"] = {**base, "documents": None, "tokens": 28}
    return found


def planned(name: str, layout: str) -> bool:
    """All settings where sequences or rows are split, a few elsewhere; all packings of these few
    where rows are."""
    if layout.startswith("tp4") and "grouped" in name:  # there are two key/value heads
        return False
    few = any(word in name for word in ("chunked", "ranks", "default"))
    if name.endswith(tuple(DOCUMENTS)) and not name.endswith("around borders"):
        return few and layout in ("cp2", "cp4", "tp2 cp2 sequence")
    return few or layout not in ("tp2", "tp4", "tp2 cp2")


def plan(ranks: int) -> dict[str, list[str]]:
    return {
        layout: [name for name in cases() if planned(name, layout)] for layout in LAYOUTS[ranks]
    }


@functools.cache
def results(ranks: int) -> Any:
    return run_ranks(
        "attentions",
        ranks,
        module="tests.dist.attention_workers",
        timeout=900,
        layouts=LAYOUTS[ranks],
        cases=cases(),
        plan=plan(ranks),
    )


@pytest.mark.skipif(not WHOLE, reason="takes minutes; `make test-matrix` runs it")
@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int) -> None:
    wrong = []
    for layout, names in plan(ranks).items():
        for name in names:
            found = results(ranks)[f"{layout}: {name}"]
            limit = 1e-5 if name.endswith("fp32") else 1e-10
            for what, value in found.items():
                if not value <= (0.0 if what.startswith(("init", "alike")) else limit):
                    wrong.append(f"{layout}: {name}: {what} is off by {value:.1e}")
    assert not wrong, f"{len(wrong)} differ\n" + "\n".join(wrong[:40])


KERNELS = {
    "documents": {"options": {}, "documents": DOCUMENTS["around borders"]},
    "uneven heads": {"options": {"qk_rank": ((2, 6, 4, 2),), "kernel_activation": "silu"}},
}


def test_kernels_in_layouts_are_the_reference_in_one_process() -> None:
    """Triton's, in its interpreter; with cp behind the states of the pieces before."""
    pytest.importorskip("triton")
    given = {"kind": "ada", "dtype": "float32", "backend": "triton"}
    found = run_ranks(
        "attentions",
        2,
        module="tests.dist.attention_workers",
        timeout=300,
        env={"TRITON_INTERPRET": "1"},
        layouts=LAYOUTS[2],
        cases={name: {**given, **case} for name, case in KERNELS.items()},
        plan={"cp2": list(KERNELS), "tp2 sequence": ["uneven heads"]},
    )
    assert len(found) == 3
    for name, distances in found.items():
        for what, value in distances.items():
            assert value <= (0.0 if what.startswith(("init", "alike")) else 1e-4), (name, what)

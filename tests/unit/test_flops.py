"""Parameters and FLOPs from the configuration, against real modules, a counter, hand sums."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kalmagrove.config import Model, validate
from kalmagrove.config.counts import (
    attention_count,
    ffn_count,
    parameter_count,
    parameter_table,
)
from kalmagrove.nn import build_model
from kalmagrove.parallel import Groups
from kalmagrove.track import flops_per_token

pytestmark = pytest.mark.unit

BASES = (
    "bspline", "chebyshev1", "chebyshev2", "legendre", "hermite", "fourier", "rational", "rbf",
    "piecewise_linear",
)  # fmt: skip
KAN = {"edges": 10, "top_k": 3, "rank": 5}


def tiny(attention: str = "softmax", ffn: str = "dense", **sections: dict[str, Any]) -> Model:
    """A model of one attention and one feed-forward kind; `sections` changes their blocks."""

    def block(name: str, **values: Any) -> dict[str, Any]:
        return {**values, **sections.get(name, {})}

    grove = block("grove", groves=4, top_g=2, edge_manifold=3, kan=KAN)
    return validate(
        Model,
        {
            "name": "tiny", "d_model": 16, "layers": 2, "vocab_size": 32,
            "attention": {
                "pattern": [attention],
                "ada": block("ada", heads=2),
                "softmax": block("softmax", heads=4, kv_heads=2),
                "mla": block("mla", heads=2, kv_rank=6, nope_dim=4, rope_dim=2, v_dim=5),
            },
            "ffn": {
                "pattern": [ffn],
                "dense": {"hidden": 24},
                "moe": block("moe", experts=4, top_k=2, hidden=7, shared_hidden=5),
                "kan": block("kan", **KAN),
                "grove": grove,
            },
            **sections.get("model", {}),
        },
    )  # fmt: skip


MODELS = {
    "ada": tiny("ada"),
    "ada paper": tiny(
        "ada",
        ada={"decay": "none", "output_norm": False, "output_gate": False, "qk_norm": False},
    ),
    "ada ode": tiny("ada", ada={"kernel": "ode", "head_dim": 6, "ode_hidden": 5, "taps": 3}),
    "ada no kernel": tiny("ada", ada={"kernel": "none", "qk_rank": 4, "decay": "fixed"}),
    "ada ranks": tiny("ada", ada={"qk_rank": [[2, 6], [4, 8]]}),
    "softmax": tiny(),
    "softmax plain": tiny(softmax={"qk_norm": False, "head_dim": 6}),
    "mla": tiny("mla"),
    "mla compressed queries": tiny("mla", mla={"q_rank": 7}),
    "moe": tiny(ffn="moe"),
    "moe without shared": tiny(ffn="moe", moe={"shared_hidden": 0}),
    "kan": tiny(ffn="kan"),
    "kan without base": tiny(ffn="kan", kan={"edge": {"base": "none"}}),
    "grove": tiny(ffn="grove"),
    "grove without shared": tiny(ffn="grove", grove={"shared": False}),
    "untied": tiny(model={"tie_embeddings": False}),
    **{
        f"kan {b}": tiny(ffn="kan", kan={"edge": {"basis": b, "degree": 4, "grid": 6}})
        for b in BASES
    },
}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_the_modules(name: str) -> None:
    model = MODELS[name]
    built = build_model(model, Groups.single())
    for layer, block in enumerate(built.blocks):
        assert attention_count(model, layer).total == size(block.attention)
        assert ffn_count(model, layer).total == size(block.ffn)
    assert parameter_count(model).total == size(built)
    table = parameter_table(model)
    assert sum(row.total for row in table) == size(built)
    assert all(0 < row.active <= row.total for row in table)


def test_active_counts_by_hand() -> None:
    D, M, K, R, P = 16, 10, 3, 5, 12  # P: 8 + 3 coefficients and the scale of the base
    one = M * D + M * P + K * 2 * R * D
    assert ffn_count(tiny(ffn="kan"), 0).active == one
    router = 4 * (3 * D + D + 1)
    assert ffn_count(tiny(ffn="grove"), 0).active == router + 3 * one
    assert ffn_count(tiny(ffn="moe"), 0).active == 4 * D + 2 * 3 * D * 7 + 3 * D * 5
    assert ffn_count(tiny(), 0).active == 3 * D * 24


@pytest.mark.parametrize("tied", [True, False])
def test_dense_softmax_flops_are_those_torch_counts(tied: bool) -> None:
    """All products but the attention's: torch counts the whole square of scores, we its half."""
    model = tiny(model={"tie_embeddings": tied})
    built = build_model(model, Groups.single())
    T = 8
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.zeros(1, T, dtype=torch.int64))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op))
    flops = flops_per_token(model, T)
    scores = model.layers * 4 * 16 * (T + 1) / 2
    assert (flops.forward - scores) * T == products
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize(("kind", "projections"), [("ada", 5 * 16 * 16 + 4 * 16), ("mla", None)])
def test_linear_attention_does_not_grow_with_the_row(kind: str, projections: int | None) -> None:
    model = tiny(kind)
    short, long = (flops_per_token(model, t).rows[0].model for t in (64, 4096))
    if projections is None:
        per_token = model.layers * 2 * 2 * (6 + 5)
        assert long - short == per_token * (4096 - 64) / 2
    else:
        state = 4 * 2 * 8 * 8
        assert short == long == model.layers * (2 * projections + state)


def test_kan_flops_count_kept_edges_and_hardware_all() -> None:
    D, M, K, R = 16, 10, 3, 5
    row = flops_per_token(tiny(ffn="kan"), 8).rows[1]
    phi = 3 * 3 * 4 + 2 * 4
    assert row.model == 2 * (M * (2 * D + phi) + K * 4 * R * D)
    assert row.hardware - row.model == 2 * (M - K) * 4 * R * D
    grove = flops_per_token(tiny(ffn="grove"), 8).rows[1]
    assert grove.model == 2 * 2 * 4 * D * 4 + 3 * row.model, "2 chosen and the shared one"


def test_ada_hardware_flops_follow_the_form() -> None:
    def run(form: str, T: int) -> float:
        return flops_per_token(tiny("ada", ada={"form": form, "chunk": 4}), T).rows[0].hardware

    base = run("recurrent", 8)
    assert base == flops_per_token(tiny("ada"), 8).rows[0].model
    assert run("chunked", 100) - base == 2 * 2 * 2 * 4 * (8 + 8)
    assert run("quadratic", 100) - base == 2 * 2 * (2 * 100 * (8 + 8) - 4 * 8 * 8)
    assert run("auto", 8) == run("quadratic", 8)
    assert run("auto", 9) == run("chunked", 9)

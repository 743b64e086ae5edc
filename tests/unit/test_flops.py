"""Parameters and FLOPs from the configuration, against real modules, a counter, hand sums."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kalmagrove.cli.compose import compose_tree, conf_dir
from kalmagrove.config import Model, load, validate
from kalmagrove.config.counts import (
    attention_count,
    ffn_count,
    parameter_count,
    parameter_table,
)
from kalmagrove.nn import build_model
from kalmagrove.nn.model import Transformer
from kalmagrove.parallel import Groups
from kalmagrove.track import dense_twin, flops_per_token, path_of, peak_tflops
from kalmagrove.track.flops import SDPA_BACKWARD, Flops, Path, Row
from kalmagrove.track.summary import Facts

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


UNSEEN = ("edge functions", "ada key kernel")  # no products: torch's counter passes over them
SCORES = ("softmax scores", "mla scores")
NARROW = ["model.d_model=192", "model.ffn.grove.kan.rank=16"]
SMALL = {  # what is too large for a CPU: narrower, with fewer parts
    "kan_1b": NARROW,
    "kan_1b_a135m": ["model.d_model=288", *NARROW[1:]],
    "kan_340b": [*NARROW, "model.ffn.grove.groves=4", "model.attention.softmax.heads=8"],
    "moe_340b": [*NARROW, "model.ffn.moe.experts=16", "model.attention.mla.heads=8"],
    "dense_340b": [*NARROW, "model.ffn.dense.hidden=512"],
}
PRESETS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
CASES = [
    *([f"model={name}", *SMALL.get(name, [])] for name in PRESETS),
    *(["model=kan_135m", f"ffn={kind}", "attention=mla"] for kind in ("dense", "kan", "moe")),
    ["model=kan_nano", "attention=softmax", "model.ffn.kan.routing=straight_through", "ffn=kan"],
    ["model=kan_nano", "attention=ada", "model.attention.ada.qk_rank=16"],
]
T = 48


def counted(model: Transformer, checkpointing: bool = False) -> tuple[float, float]:
    """FLOPs of a token that torch counts, forward and backward. Of SDPA's kernels it sees nothing
    on a CPU: here SDPA is made of products.
    """
    model.activation_checkpointing = checkpointing
    tokens = torch.randint(32, (1, T))
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(tokens, tokens).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return forward.get_total_flops() / T, backward.get_total_flops() / T


def in_sight(flops: Flops) -> tuple[float, float]:
    """What `counted` should find of them. Products make the whole square of scores, of which we
    count the half that is seen, and do not make it again in the backward pass.
    """
    rows = [row for row in flops.rows if row.component not in UNSEEN]
    square = [row.forward * 2 * T / (T + 1) for row in rows if row.component in SCORES]
    plain = [row for row in rows if row.component not in SCORES]
    forward = sum(row.forward for row in plain) + sum(square)
    return forward, sum(row.backward for row in plain) + 2 * sum(square)


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_flops_are_those_that_torch_counts(words: list[str]) -> None:
    """Within 1%, all that it can see, of every preset; few tokens take the masked path."""
    small = ["model.layers=2", "model.vocab_size=64", "model.attention.ada.chunk=16"]
    step = [f"data.seq_len={T}", f"batch.tokens={T}", "batch.micro=1"]
    model = load(compose_tree("train", [*words, *small, *step])).model
    kinds = tuple(dict.fromkeys(model.attention.pattern))  # one layer of each
    attention = model.attention.model_copy(update={"pattern": kinds})
    model = model.model_copy(update={"attention": attention})
    found = counted(build_model(model, Groups.single()).train())
    assert in_sight(flops_per_token(model, T, "reference")) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize(
    ("name", "square"),  # of scores and of what they weigh: 2 T^2 each a head and channel
    [("softmax", 2 * 4 * (4 + 4)), ("softmax plain", 2 * 4 * (6 + 6)),
     ("mla", 2 * 2 * (6 + 5)), ("mla compressed queries", 2 * 2 * (6 + 5))],
)  # fmt: skip
def test_scores_are_those_that_torch_counts(name: str, square: int) -> None:
    """To the last one: nothing else in these models is out of sight."""
    model = MODELS[name]
    flops = flops_per_token(model, T)
    found = counted(build_model(model, Groups.single()))
    rest = [row for row in flops.rows if row.component not in SCORES]
    assert found[0] - sum(row.forward for row in rest) == pytest.approx(model.layers * square * T)
    assert found[1] - sum(row.backward for row in rest) == pytest.approx(
        2 * model.layers * square * T
    )
    assert in_sight(flops) == pytest.approx(found)


def test_a_kernel_of_sdpa_makes_the_scores_again() -> None:
    """As torch reckons its kernels, which run on GPUs alone."""
    shape = (1, 4, T, 8)
    again = sdpa_backward_flop_count(shape, shape, shape, shape)
    assert again == SDPA_BACKWARD * sdpa_flop_count(shape, shape, shape)


def test_a_cpu_runs_only_the_kept_edges() -> None:
    """With many tokens: here they are sorted by edge."""
    model = tiny(ffn="kan", kan={"edges": 16, "top_k": 2})
    tokens = torch.randint(32, (4, 256))
    built = build_model(model, Groups.single())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(tokens)
    products = counter.get_total_flops() / tokens.numel()
    kept = flops_per_token(model, 256, "cpu")
    seen = sum(row.forward for row in kept.rows if row.component not in (*UNSEEN, *SCORES))
    assert seen == pytest.approx(products, rel=0.01)
    assert flops_per_token(model, 256, "reference").rows[2].forward > 2 * kept.rows[2].forward


def test_checkpointing_computes_the_blocks_again() -> None:
    """All but a block's last product, which nothing in the backward pass needs."""
    model = tiny()
    flops = flops_per_token(model, T)
    plain, again = (sum(counted(build_model(model, Groups.single()), on)) for on in (False, True))
    last = model.layers * 2 * 16 * 24
    more = flops.hardware(True) - flops.hardware(False)
    logits = flops.rows[-1].forward
    assert in_sight(flops)[0] - logits - last == pytest.approx(again - plain)
    assert more == sum(row.forward for row in flops.rows[:-1])


def test_paths() -> None:
    assert path_of("auto", gpu=False) == path_of("reference", gpu=False) == "cpu"
    assert path_of("auto", gpu=True) == path_of("triton", gpu=True) == "kernels"
    assert path_of("reference", gpu=True) == "reference"


@pytest.mark.parametrize("name", ["kan", "grove", "moe", "ada", "untied"])
def test_dense_twin_is_as_large(name: str) -> None:
    model = MODELS[name]
    twin = dense_twin(model)
    step = 3 * model.d_model * model.layers  # one more hidden unit
    assert abs(parameter_count(twin).total - parameter_count(model).total) <= step / 2
    assert {row.component for row in flops_per_token(twin, 8).rows} == {
        "attention softmax", "softmax scores", "ffn dense", "logits"
    }  # fmt: skip


def test_dense_softmax_flops_by_hand() -> None:
    flops = flops_per_token(tiny(), 8)
    maps = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    scores = 2 * 4 * 16 * 4.5
    assert flops.forward == 2 * maps + scores + 2 * 16 * 32
    assert flops.backward == 2 * flops.forward
    assert flops.training == 3 * flops.forward
    assert flops.hardware(False) == flops.training + 0.5 * scores, "SDPA makes the scores again"


def part(model: Model, tokens: int, component: str, path: Path = "reference") -> Row:
    rows = flops_per_token(model, tokens, path).rows
    return next(row for row in rows if row.component == component)


def test_linear_attention_does_not_grow_with_the_row() -> None:
    short, long = (flops_per_token(tiny("ada"), t).forward for t in (64, 4096))
    state, maps = 4 * 2 * 8 * 8, 2 * 5 * 16 * 16 + 2 * 4 * 16
    assert short == long == 2 * (maps + state) + 2 * 2 * 3 * 16 * 24 + 2 * 16 * 32
    mla = [part(tiny("mla"), t, "mla scores").model for t in (64, 4096)]
    assert mla[1] - mla[0] == 2 * 2 * 2 * (6 + 5) * (4096 - 64) / 2


def test_kan_flops_count_kept_edges_and_hardware_all() -> None:
    D, M, K, R = 16, 10, 3, 5
    row = part(tiny(ffn="kan"), 8, "ffn kan")
    assert row.model == 2 * (M * 2 * D + K * 4 * R * D)
    assert row.forward - row.model == 2 * (M - K) * 4 * R * D
    assert part(tiny(ffn="kan"), 8, "ffn kan", "kernels").forward == row.model
    functions = part(tiny(ffn="kan"), 8, "edge functions").model
    assert functions == 2 * M * (3 * 3 * 4 + 2 * 4)
    grove = part(tiny(ffn="grove"), 8, "ffn grove")
    assert grove.model == 3 * row.model, "2 chosen and the shared one"
    assert part(tiny(ffn="grove"), 8, "routers").model == 2 * 2 * 4 * D * 4


def test_ada_hardware_flops_follow_the_form() -> None:
    def run(form: str, T: int) -> float:
        return part(tiny("ada", ada={"form": form, "chunk": 4}), T, "ada sums").forward

    base = run("recurrent", 8)
    assert base == part(tiny("ada"), 8, "ada sums").model == 2 * 4 * 2 * 8 * 8
    assert run("quadratic", 100) == 2 * 2 * 2 * 100 * (8 + 8)
    states = 64 * (2 * 24 / 25 + 2 * 25 / 4 + 2)
    assert run("chunked", 100) == pytest.approx(2 * 2 * (2 * 4 * (8 + 8) + states))
    assert run("auto", 8) == run("quadratic", 8)
    assert run("auto", 9) == run("chunked", 9)
    kernels = part(tiny("ada"), 4096, "ada sums", "kernels")
    assert kernels.forward == 2 * 2 * (2 * 64 * (8 + 8) + 4 * 8 * 8)
    assert kernels.backward == 3 * kernels.forward


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.5), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.05),
        ("NVIDIA A10", 125.0), ("NVIDIA A10G", 70.0), ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2), ("Tesla T4", None), ("", None), (None, None),
        ("NVIDIA GH200 480GB", 989.5), ("NVIDIA A100-PCIE-40GB", 312.0), ("NVIDIA L4", 121.0),
        ("NVIDIA H100 80GB PCIE", 756.5), ("NVIDIA A800-SXM4-80GB", 312.0), ("NVIDIA L40", 181.05),
        ("AMD Instinct MI250X", 191.5), ("NVIDIA GeForce RTX 5090", 209.5),
        # Other cards, and parts of one.
        ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA RTX A4000", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("GRID A100-10C", None), ("NVIDIA A40-48Q", None), ("NVIDIA L40S-24C", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None), ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA A1000", None), ("NVIDIA H1000", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str | None, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_utilisation_is_null_without_a_peak() -> None:
    known = Facts("r", 1, 1, 1e9, 2, 2, "gpu", "p", None, torch.device("cpu"), peak_tflops=100.0)
    assert known.utilisation(1e9, 50_000.0) == 0.25
    assert known.utilisation(None, 50_000.0) is None
    unknown = dataclasses.replace(known, peak_tflops=None)
    assert unknown.utilisation(1e9, 50_000.0) is None

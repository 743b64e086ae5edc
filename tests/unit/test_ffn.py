"""Building feed-forwards from the configuration, and counting them without building."""

import logging

import pytest
import torch

from kalmagrove.config import (
    ADA,
    FFN,
    KAN,
    MLA,
    Attention,
    ConfigError,
    Dense,
    Edge,
    Grove,
    Model,
    MoE,
    Softmax,
)
from kalmagrove.config.counts import ffn_count
from kalmagrove.nn import backends
from kalmagrove.nn.ffn import FFNOutput, build_ffn
from kalmagrove.parallel import Groups, Shard, is_expert, module_shards

pytestmark = pytest.mark.unit

KINDS = ("dense", "moe", "kan", "grove")


def model(basis: str = "bspline", base: str = "silu", shared: bool = True) -> Model:
    kan = KAN(edges=12, top_k=3, rank=4, edge=Edge(basis=basis, base=base, degree=3, grid=5))
    return Model(
        name="tiny",
        d_model=16,
        layers=4,
        attention=Attention(
            pattern=("softmax",),
            ada=ADA(heads=2),
            softmax=Softmax(heads=2, kv_heads=1),
            mla=MLA(heads=2, kv_rank=4, nope_dim=4, rope_dim=4, v_dim=4),
        ),
        ffn=FFN(
            pattern=KINDS,
            dense=Dense(hidden=24),
            moe=MoE(experts=6, top_k=2, hidden=8, shared_hidden=5 if shared else 0),
            kan=kan,
            grove=Grove(groves=4, top_g=2, edge_manifold=3, shared=shared, kan=kan),
        ),
    )


@pytest.mark.parametrize("layer", range(4), ids=KINDS)
@pytest.mark.parametrize("basis", ["bspline", "chebyshev1", "rational", "piecewise_linear"])
@pytest.mark.parametrize(("base", "shared"), [("silu", True), ("none", False)])
def test_counts_are_those_of_the_built_module(
    layer: int, basis: str, base: str, shared: bool
) -> None:
    config = model(basis, base, shared)
    built = build_ffn(config, layer, Groups.single())
    total, active = ffn_count(config, layer)
    assert total == sum(p.numel() for p in built.parameters())
    assert active == total if layer == 0 else active < total


def test_active_counts_are_the_parts_one_token_uses() -> None:
    config = model()
    kan = 12 * 16 + 12 * (5 + 3) + 12 + 3 * 2 * 4 * 16
    assert ffn_count(config, 1).active == (2 * 8 + 5) * 3 * 16 + 6 * 16
    assert ffn_count(config, 2).active == kan
    assert ffn_count(config, 3).active == 3 * kan + 4 * (3 * 16 + 16 + 1)


@pytest.mark.parametrize("layer", range(4), ids=KINDS)
def test_every_kind_keeps_the_contract(layer: int) -> None:
    torch.manual_seed(0)
    built = build_ffn(model(), layer, Groups.single())
    built.init_weights(0.02, 0.01)
    for dtype in (torch.float32, torch.bfloat16):
        built = built.to(dtype)
        out = built(torch.randn(2, 5, 16).to(dtype))
        assert isinstance(out, FFNOutput)
        assert out.y_BTD.shape == (2, 5, 16)
        assert out.y_BTD.dtype == dtype
        assert out.y_BTD.isfinite().all()
        assert out.aux_loss.shape == ()
        assert out.aux_loss.dtype == torch.float32
        assert all(not m.requires_grad for m in built.metrics.values())
    for name, p in built.named_parameters():
        spline = "edge." in name
        assert p.kind == ("spline" if spline else "matrix" if p.ndim >= 2 else "bias"), name


def test_same_seed_same_weights() -> None:
    first, second = (build_ffn(model(), 3, Groups.single()) for _ in range(2))
    for module in (first, second):
        torch.manual_seed(3)
        module.init_weights(0.02, 0.01)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer", range(4), ids=KINDS)
@pytest.mark.parametrize("basis", ["bspline", "rational"])
def test_constructors_draw_no_random_numbers(layer: int, basis: str) -> None:
    before = torch.get_rng_state()
    build_ffn(model(basis, base="none"), layer, Groups.single())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layer", range(4), ids=KINDS)
def test_groves_and_experts_are_tagged_on_one_process_too(layer: int) -> None:
    built = build_ffn(model(), layer, Groups.single())
    stacked = {
        "moe": {"gate": 6, "up": 6, "down": 6},
        "grove": dict.fromkeys(("edges", "edge.coef", "edge.scale", "edge.range", "u", "v"), 4),
    }
    expected = stacked.get(KINDS[layer], {})
    assert dict(module_shards(built)) == {
        name: Shard("ep", 0, 0, count, count) for name, count in expected.items()
    }
    assert {n for n, p in built.named_parameters() if is_expert(p)} == set(expected) - {
        "edge.range"
    }


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_asked_for_and_missing_are_refused(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = model().model_copy(update={"backend": backend})
    with pytest.raises(ConfigError, match=rf"model.backend={backend} is not available"):
        build_ffn(config, 2, Groups.single())


def test_auto_takes_the_best_there_is_and_says_why_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kan, cpu, gpu = model().ffn.kan, torch.device("cpu"), torch.device("cuda")
    backends._log_once.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which only those want who ask for triton
    monkeypatch.setattr(backends.jit, "find_nvcc", lambda: "/usr/bin/nvcc")
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        assert backends.resolve_backend("auto", cpu, kan) == "reference"
        assert backends.resolve_backend("auto", cpu, kan) == "reference"
        assert backends.resolve_backend("auto", gpu, kan) == "cuda"
        assert backends.resolve_backend("auto", gpu, model("legendre").ffn.kan) == "triton"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert said[0].startswith("KAN kernels: reference (model.backend=auto; cuda: the device is a")
    assert said[1] == "KAN kernels: cuda (model.backend=auto)"
    assert "basis=legendre (only bspline" in said[2]
    assert backends.resolve_backend("triton", cpu, kan) == "triton"
    with pytest.raises(ConfigError, match=r"model.backend=cuda .*basis=legendre"):
        backends.resolve_backend("cuda", gpu, model("legendre").ffn.kan)


def test_without_nvcc_auto_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(backends.jit, "find_nvcc", missing)
    assert backends.resolve_backend("auto", torch.device("cuda"), model().ffn.kan) == "triton"

"""`kalmagrove inspect`: values, straightness, observed inputs, and the command on both kinds."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from torch import nn

from kalmagrove.cli import main
from kalmagrove.config import ConfigError, DataError
from kalmagrove.config.retrofit import feedforward_of
from kalmagrove.evaluate import subject
from kalmagrove.evaluate.edge_maps import ActivationEdges, choose, edges_of
from kalmagrove.evaluate.edges import (
    POINTS,
    Judged,
    even_points,
    inspect_edges,
    observe,
    quantiles,
    token_rows,
)
from kalmagrove.nn import Transformer, build_model
from kalmagrove.parallel import Groups
from kalmagrove.retrofit import save, swap
from kalmagrove.retrofit.edges import LinearEdges
from kalmagrove.retrofit.feedforward import KANLinear, build_feedforward
from tests.unit.tiny_run import make_run

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
TREE = {"basis": "chebyshev2", "degree": 2, "hidden": 8}
TEXT = "one two one one two three two one " * 8
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="matplotlib is not installed; it is of the extra `bench`",
)


def linear(inputs: int = 5, outputs: int = 4, **keys: Any) -> KANLinear:
    torch.manual_seed(0)
    config = feedforward_of({"layers": "one", "squash": "none", **keys})
    layer = KANLinear(inputs, outputs, config)
    layer.init_weights()
    return layer


def grown(ffn: str = "grove", shared: bool = True) -> Transformer:
    torch.manual_seed(0)
    body = {"edges": 8, "rank": 2, "top_k": 2}
    tree = make_run().model.model_dump(mode="json")
    tree["layers"], tree["ffn"]["pattern"] = 2, [ffn]
    tree["ffn"]["grove"]["shared"] = shared
    for part in (tree["ffn"]["kan"], tree["ffn"]["grove"]["kan"]):
        part.update(body)
    return build_model(make_run(model=tree).model, Groups.single(CPU)).eval()


def retrofitted(tree: dict[str, Any] = TREE) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3}
    config = hf.LlamaConfig(
        **size, num_attention_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2
    )
    model = hf.LlamaForCausalLM(config).eval()

    def build(width: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
        return build_feedforward(feedforward_of(tree), width).to(device=device, dtype=dtype)

    return swap(model, [1, 2], build, {"kind": "kan", "config": tree}).model


def tokenizer() -> Any:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4, "three": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("squash", ["tanh", "affine", "none"])
@pytest.mark.parametrize("form", ["article", "redundancy_free"])
@pytest.mark.parametrize("basis", ["chebyshev2", "bspline", "rational", "fourier"])
@torch.no_grad()
def test_edges_of_a_map_add_up_to_its_output(basis: str, form: str, squash: str) -> None:
    layer = linear(basis=basis, form=form, squash=squash)
    edges = LinearEdges("0.kan", 0, layer)
    x_SI = 0.9 * even_points(edges.span(), 7)
    got_SJ = edges.values(x_SI, slice(None)).sum(-1)
    if layer.bias is not None:
        got_SJ += layer.bias
    torch.testing.assert_close(got_SJ, layer.double()(x_SI), atol=1e-6, rtol=1e-5)
    part = edges.values(x_SI, slice(1, 3))
    assert torch.equal(part, edges.values(x_SI, slice(None))[:, 1:3])


@torch.no_grad()
def test_edges_of_groves_are_those_of_the_module() -> None:
    model = grown()
    maps = edges_of(model)
    assert [edges.name for edges in maps] == [
        f"{block}.{part}" for block in (0, 1) for part in ("grove0", "grove1", "shared")
    ]
    edges = maps[4]
    assert isinstance(edges, ActivationEdges)
    ffn = model.layers[1].ffn
    x_SM = even_points(edges.span(), 9)
    assert x_SM.shape == (9, 8)
    assert torch.equal(edges.values(x_SM, slice(None))[:, 0], ffn.edge(x_SM, 1))
    assert not torch.equal(ffn.edge(x_SM, 0), ffn.edge(x_SM, 1))
    start = edges.initial(x_SM)
    assert start is not None
    ffn.edge.coef.zero_()
    assert torch.equal(edges.values(x_SM, slice(None))[:, 0], start)


@torch.no_grad()
def test_straightness() -> None:
    """Chebyshev polynomials on [-1, 1]: constant, x and 2 x^2 - 1, one an output."""
    layer = linear(3, 3, basis="chebyshev1", degree=2)
    layer.coef.zero_()
    for order in range(3):
        layer.coef[order, order] = 2.0
    edges = LinearEdges("0.kan", 0, layer)
    judged = Judged.of(edges, even_points(edges.span(), POINTS))
    assert judged.r2_JI[0] == pytest.approx(1.0)
    assert judged.r2_JI[1] == pytest.approx(1.0, abs=1e-12)
    assert judged.r2_JI[2] == pytest.approx(0.0, abs=1e-12)
    assert judged.var_JI[0] == pytest.approx(0.0)
    assert judged.most_JI == pytest.approx(2.0)
    assert judged.mean_JI[1] == pytest.approx(1.0, rel=0.02)
    # Inputs that are all near the end see the parabola as a line.
    narrow = Judged.of(edges, quantiles(torch.linspace(0.9, 1, 500)[:, None].expand(-1, 3)))
    assert narrow.r2_JI[2].min() > 0.998
    total = judged.var_JI.sum()
    assert judged.pooled == pytest.approx(judged.var_JI[1].sum() / total)
    layer.coef.zero_()
    (found,) = inspect_edges([edges], count=2)
    assert (found.r2, found.r2_min, found.amplitude_max) == (1.0, 1.0, 0.0)
    assert [(f.output, f.input) for f in found.functions] == [(0, 0), (0, 1)]


@torch.no_grad()
def test_the_largest_are_drawn_first() -> None:
    layer = linear(4, 6)
    layer.coef[:, 2, 3] *= 50
    layer.coef[:, 5, 1] *= 20
    edges = LinearEdges("0.kan", 0, layer)
    (found,) = inspect_edges([edges], count=3)
    assert [(f.output, f.input) for f in found.functions][:2] == [(2, 3), (5, 1)]
    first = found.functions[0]
    x_S1 = torch.tensor(first.x, dtype=torch.float64)[:, None].expand(-1, 4)
    want = edges.values(x_S1, slice(2, 3))[:, 0, 3]
    assert first.y == pytest.approx(want.tolist())
    assert (first.span, first.initial, first.density) == ((-1.0, 1.0), None, None)
    assert (found.edges, found.tokens, found.out_of_range) == (24, 0, None)


def test_random_edges_follow_the_seed() -> None:
    maps = edges_of(retrofitted())

    def drawn(seed: int) -> list[tuple[int, int]]:
        found = inspect_edges(maps, count=4, select="random", seed=seed)
        return [(f.output, f.input) for layer in found for f in layer.functions]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0)[:4] != drawn(0)[8:12], "each layer draws its own"


@torch.no_grad()
def test_observed_inputs_are_those_of_the_forward_pass() -> None:
    model = retrofitted({**TREE, "squash": "affine"})
    maps = edges_of(model)
    tokens_1T = torch.arange(12)[None]
    seen = observe(model, maps, [tokens_1T[:, :8], tokens_1T[:, 8:]], CPU)
    assert {x_NI.shape for x_NI in seen.values()} == {(12, 16), (12, 8)}
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, KANLinear))
    model(tokens_1T[:, :8])
    first = maps[0]
    assert isinstance(first, LinearEdges)
    half = {name: x_NI[:8] for name, x_NI in seen.items()}
    told = inspect_edges(maps, seen=half)[0].out_of_range
    assert told == pytest.approx(float(first.layer.metrics["out_of_range"]))
    (layer, *_) = inspect_edges(maps, seen=seen, count=1)
    assert layer.tokens == 12
    (function,) = layer.functions
    assert function.density is not None
    assert 10 <= sum(function.density.counts) <= 12
    assert len(function.density.bounds) == len(function.density.counts) + 1


@torch.no_grad()
def test_use_counts_the_tokens_that_keep_an_edge() -> None:
    model = grown("kan")
    maps = edges_of(model, [-1])
    assert [edges.name for edges in maps] == ["1.kan"]
    seen = observe(model, maps, token_rows(range(24), 8), CPU)
    share_1M = maps[0].use(seen["1.kan"])
    assert share_1M is not None
    assert share_1M.sum().item() == pytest.approx(2)
    assert model.layers[1].ffn.edge.watch is None
    (found,) = inspect_edges(maps, seen=seen, select="used", count=8)
    by_use = [share_1M[0, f.input].item() for f in found.functions]
    assert by_use == sorted(by_use, reverse=True)
    with pytest.raises(ConfigError, match="select=used needs a text to count on; give text=FILE"):
        inspect_edges(maps, select="used")


@torch.no_grad()
def test_groves_see_their_own_tokens() -> None:
    model = grown(shared=False)
    maps = edges_of(model, [0])
    seen = observe(model, maps, token_rows(range(20), 20), CPU)
    assert sum(len(x_NM) for x_NM in seen.values()) == 20
    none = {"0.grove0": torch.empty(0, 8), "0.grove1": seen["0.grove1"]}
    empty, _ = inspect_edges(maps, seen=none, select="used")
    assert (empty.tokens, empty.out_of_range) == (0, None)


def test_inputs_that_are_not_finite() -> None:
    model = retrofitted()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"the inputs of 1.first are not all finite"):
        observe(model, edges_of(model), [torch.zeros(1, 4, dtype=torch.int64)], CPU)


def test_blocks_are_chosen() -> None:
    maps = edges_of(retrofitted())
    assert [edges.name for edges in maps] == ["1.first", "1.last", "2.first", "2.last"]
    assert [edges.block for edges in choose(maps, 3, [-1, 0])] == [2, 2]
    with pytest.raises(ConfigError, match="layers=3 must be from -3 to 2"):
        choose(maps, 3, [3])
    with pytest.raises(ConfigError, match="layers=0 has no edge functions; blocks 1, 2 have some"):
        choose(maps, 3, [0])
    with pytest.raises(ConfigError, match="has no edge functions; use one with KAN"):
        edges_of(grown("dense"))


def test_quantiles_are_of_equal_probability() -> None:
    x_NI = torch.randperm(1000).double()[:, None]
    assert quantiles(x_NI).mean().item() == pytest.approx(499.5, abs=1)
    assert quantiles(x_NI[:3]).shape == (POINTS, 1)
    assert [t.shape[1] for t in token_rows(range(10), 4)] == [4, 4, 2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_command_on_a_retrofitted_model(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    save(retrofitted(), tmp_path / "run" / "model", tokenizer())
    out = tmp_path / "out"
    words = [f"run={tmp_path / 'run'}", f"out={out}", "edges=2", "figures=false", "device=cpu"]
    assert main(["inspect", *words, f"text={text}", "tokens=40", "layers=[-1]"]) == 0
    held = json.loads((out / "edges.json").read_text())
    assert [layer["name"] for layer in held["layers"]] == ["2.first", "2.last"]
    assert held["layers"][0]["tokens"] == 40
    assert held["layers"][0]["out_of_range"] is None, "tanh has no range"
    assert np.isfinite(held["layers"][1]["functions"][1]["y"]).all()
    assert "2.first" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["edges.json"]


def own(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = subject.Subject(grown(), tokenizer(), "tiny", length=8)
    monkeypatch.setattr(subject, "open_model", lambda *_: opened)


def test_the_command_on_groves(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = ["figures=false", f"text={text}", "select=used", "edges=3"]
    assert main(["inspect", *words]) == 0
    held = json.loads((tmp_path / "edges" / "tiny" / "edges.json").read_text())
    assert len(held["layers"]) == 6
    assert all(0 <= layer["out_of_range"] <= 1 for layer in held["layers"] if layer["tokens"])
    assert held["layers"][0]["functions"][0]["initial"] is not None
    assert "written to edges/tiny" in capsys.readouterr().out


@needs_matplotlib
@pytest.mark.parametrize("words", [[], ["text"]])
def test_figures(
    words: list[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own(monkeypatch)
    words = [f"text={text}" for _ in words]
    assert main(["inspect", f"out={tmp_path / 'out'}", "edges=5", "layers=[0]", *words]) == 0
    names = {f"edges-0.{part}" for part in ("grove0", "grove1", "shared")}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {f"{n}.{e}" for n in names for e in ("png", "svg")} | {"edges.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figures=true"], "figures=true needs matplotlib, which is not installed; pip install"),
        (["figures=false", "text=/nowhere.txt"], "text=/nowhere.txt cannot be read"),
        (["edges=0"], "edges=0 should be"),
        (["select=best"], "select='best' should be"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err

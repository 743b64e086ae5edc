"""ADA's Triton kernels against the reference in fp64: forward, every gradient, awkward shapes.

Runs in Triton's interpreter where there is no GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kalmagrove.config import Model
from kalmagrove.nn.attention import build_attention
from kalmagrove.parallel import Groups
from kalmagrove_kernels import ada
from kalmagrove_kernels.ada import tiles, triton_prepare
from kalmagrove_kernels.ada.pieces import entering_state
from kalmagrove_kernels.ada.tiles import Tile

pytestmark = pytest.mark.unit
TOLERANCE = 3e-6  # relative RMS of fp32 against fp64; the decay's gradient sums what cancels
DECAY_TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short spans and small tiles, and NaN in all memory that is not yet written."""
    monkeypatch.setattr(tiles, "FP32", Tile(16, 16, stages=1))
    monkeypatch.setattr(tiles, "SHORTEST", 32)
    monkeypatch.setattr(tiles, "LONGEST", 32)
    monkeypatch.setattr(tiles, "ANCHOR", 16)
    monkeypatch.setattr(tiles, "FEW", 1000)
    monkeypatch.setattr(triton_prepare, "SPAN", 64)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def relative(found: Tensor, expected: Tensor) -> float:
    """Of numbers around 1; where they are zero, as the decay's gradient of one token, absolute."""
    gap = torch.linalg.vector_norm(found.detach().double() - expected.detach())
    return float(gap / (torch.linalg.vector_norm(expected.detach()) + 1e-2))


def documents(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, 4, (batch, tokens)).sort(1).values


def run(inputs: dict[str, Tensor], backend: str, dtype: torch.dtype, **options: Any) -> Any:
    """Outputs and gradients by name; "end" is the state after the last token."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    named = {"decay": "log_decay_H", "state": "state_BHRV"}
    optional = {named[name]: x for name, x in leaves.items() if name in named}
    q, k, v = (leaves[name] for name in "qkv")
    out, end = ada.attention(q, k, v, scale=0.4, backend=backend, **optional, **options)
    generator = torch.Generator().manual_seed(0)
    loss = (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    if end is not None:
        loss = loss + (end * torch.randn(end.shape, generator=generator).to(end)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    results = {"out": out} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results if end is None else results | {"end": end}


def inputs(
    batch: int, tokens: int, heads: int, rank: int, width: int, decay: bool = True
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, batch, tokens, heads, rank).unbind()
    found = {"q": q, "k": k, "v": torch.randn(batch, tokens, heads, width)}
    rates = torch.tensor([0.5, 0.02, 1e-4, 0.1])[:heads]
    return found | {"decay": -rates} if decay else found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = relative(value, expected[name])
        assert error < (DECAY_TOLERANCE if name == "ddecay" else TOLERANCE), (name, error)


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ((1, 75, 2, 16, 16), True),  # three spans, the last of them short
        ((2, 35, 1, 24, 20), True),  # widths that no block fills
        ((1, 40, 1, 16, 33), False),
        ((2, 1, 2, 16, 16), True),
    ],
)
@pytest.mark.parametrize("state", [False, True])
def test_attention_is_the_reference(shape: tuple[int, ...], decay: bool, state: bool) -> None:
    given = inputs(*shape, decay=decay)
    if state:
        given["state"] = torch.randn(shape[0], *shape[2:])
    options = {"return_state": state}
    found = run(given, "triton", torch.float32, **options)
    assert_same(found, run(given, "reference", torch.float64, **options))
    again = run(given, "triton", torch.float32, **options)
    assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("state", [None, "same document", "another document"])
def test_documents_do_not_see_each_other(state: str | None) -> None:
    given = inputs(2, 75, 2, 16, 16)
    options: dict[str, Any] = {"segments_BT": documents(2, 75), "return_state": True}
    if state is not None:
        given["state"] = torch.randn(2, 2, 16, 16)
        first = options["segments_BT"][:, 0]
        options["state_segment_B"] = first if state == "same document" else first - 1
    found = run(given, "triton", torch.float32, **options)
    assert_same(found, run(given, "reference", torch.float64, **options))


def test_cu_seqlens_are_documents() -> None:
    given = inputs(1, 50, 2, 16, 16)
    found = run(given, "triton", torch.float32, cu_seqlens=torch.tensor([0, 7, 7, 33, 50]))
    parts = []
    for first, last in [(0, 7), (7, 33), (33, 50)]:
        part = {n: x if n == "decay" else x[:, first:last] for n, x in given.items()}
        parts.append(run(part, "reference", torch.float64)["out"])
    assert relative(found["out"], torch.cat(parts, 1)) < TOLERANCE


@pytest.mark.parametrize("log_decay", [-torch.inf, -1e3, -1e-30, 0.0])
def test_extreme_decays(log_decay: float) -> None:
    given = inputs(1, 70, 2, 16, 16) | {"decay": torch.full((2,), log_decay)}
    given["q"] = given["q"] * 1e4
    found = run(given, "triton", torch.float32, return_state=True)
    expected = run(given, "reference", torch.float64, return_state=True)
    for name in ("out", "dq", "dk", "dv", "end"):
        assert relative(found[name], expected[name]) < TOLERANCE, name
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_chunks_are_the_recurrence_and_the_square() -> None:
    given = inputs(1, 75, 2, 16, 16)
    q, k, v = (given[name].transpose(1, 2).double() for name in "qkv")
    out, end = ada.attention(
        *(given[name] for name in "qkv"),
        scale=0.4, log_decay_H=given["decay"], return_state=True, backend="triton",
    )  # fmt: skip
    options: dict[str, Any] = {"scale": 0.4, "log_decay_H": given["decay"].double()}
    expected, state = ada.recurrent(q, k, v, **options)
    assert relative(out.transpose(1, 2), expected) < TOLERANCE
    assert relative(out.transpose(1, 2), ada.quadratic(q, k, v, **options)) < TOLERANCE
    assert end is not None
    assert relative(end, state) < TOLERANCE


def test_a_row_in_pieces_is_the_row() -> None:
    """Each piece from the state that the one before it ended in; and from all pieces' own ends."""
    given = inputs(1, 90, 2, 16, 16)
    options: dict[str, Any] = {"scale": 0.4, "log_decay_H": given["decay"], "backend": "triton"}
    q, k, v = (given[name] for name in "qkv")
    whole, end = ada.attention(q, k, v, return_state=True, **options)
    outs, state = [], None
    for piece in (slice(0, 41), slice(41, 42), slice(42, 90)):
        cut = (x[:, piece] for x in (q, k, v))
        out, state = ada.attention(*cut, state_BHRV=state, return_state=True, **options)
        outs.append(out)
    assert relative(torch.cat(outs, 1), whole.double()) < TOLERANCE
    assert end is not None
    assert state is not None
    assert relative(state, end.double()) < TOLERANCE

    pieces = [[x[:, i : i + 30] for x in (q, k, v)] for i in (0, 30, 60)]
    last = {"log_decay_H": given["decay"], "backend": "triton"}
    ends = torch.stack([ada.final_state(k, v, **last) for _, k, v in pieces], 2)
    outs = []
    for i, piece in enumerate(pieces):
        state = entering_state(ends, i, 30, log_decay_H=given["decay"])
        outs.append(ada.attention(*piece, state_BHRV=state, **options)[0])
    assert relative(torch.cat(outs, 1), whole.double()) < TOLERANCE


@pytest.mark.parametrize("segmented", [False, True])
def test_final_state_and_its_gradients(segmented: bool) -> None:
    given = inputs(2, 75, 1, 24, 16)
    segments = documents(2, 75) if segmented else None
    found = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [given[n].to(dtype).requires_grad_() for n in ("k", "v", "decay")]
        k, v, decay = leaves
        end = ada.final_state(k, v, log_decay_H=decay, segments_BT=segments, backend=backend)
        weight = torch.randn(end.shape, generator=torch.Generator().manual_seed(0)).to(end)
        found[backend] = [end, *torch.autograd.grad((end * weight).sum(), leaves)]
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        assert relative(ours, theirs) < TOLERANCE


PREPARE: dict[str, dict[str, Any]] = {
    "all": {"taps": 4, "silu": True, "norm": True, "rope": True},
    "convolution": {"taps": 4},
    "norm and rope": {"norm": True, "rope": True},
    "documents": {"taps": 4, "norm": True, "segmented": True},
    "behind a tail": {"taps": 3, "rope": True, "tail": True, "segmented": True},
    "uneven heads": {"taps": 3, "norm": True, "rope": True, "ranks": (8, 4, 6)},
    "odd width": {"taps": 4, "silu": True, "norm": True, "width": 7},
    "shorter than the taps": {"taps": 4, "norm": True, "tokens": 2},
}


def prepared(
    backend: str,
    dtype: torch.dtype,
    *,
    taps: int = 0,
    silu: bool = False,
    norm: bool = False,
    rope: bool = False,
    tail: bool = False,
    segmented: bool = False,
    width: int = 8,
    tokens: int = 70,
    ranks: tuple[int, ...] = (),
) -> list[Tensor]:
    """Result and gradients of x, taps and tail."""
    torch.manual_seed(0)
    heads, channels, slot = 3, sum(ranks) or 3 * width, None
    if ranks:
        slot_HR, row = torch.full((heads, width), channels), 0
        for head, rank in enumerate(ranks):
            rows, half = torch.arange(row, row + rank), rank // 2
            slot_HR[head, :half] = rows[:half]
            slot_HR[head, width // 2 : width // 2 + half] = rows[half:]
            row += rank
        slot = slot_HR.flatten()
    drawn = [torch.randn(2, tokens, channels)]
    drawn += [torch.randn(channels, taps)] if taps else []
    drawn += [torch.randn(2, taps - 1, channels)] if tail else []
    leaves = [x.to(dtype).requires_grad_() for x in drawn]
    before = taps - 1 if tail else 0
    y = ada.prepare(
        leaves[0],
        heads=heads,
        width=width,
        taps_CP=leaves[1] if taps else None,
        tail_BPC=leaves[2] if tail else None,
        segments_BT=documents(2, before + tokens) if segmented else None,
        silu=silu,
        norm_eps=1e-5 if norm else None,
        angles_THr=torch.rand(tokens, heads if ranks else 1, width // 2) * 6 if rope else None,
        slot_S=slot,
        rank_H=torch.tensor(ranks) if ranks else None,
        backend=backend,
    )
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves)]


@pytest.mark.parametrize("setting", PREPARE)
def test_prepare_is_its_steps(setting: str) -> None:
    found = prepared("triton", torch.float32, **PREPARE[setting])
    expected = prepared("reference", torch.float64, **PREPARE[setting])
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert relative(ours, theirs) < TOLERANCE, i


def test_what_cannot_run_is_refused() -> None:
    given = inputs(1, 4, 1, 8, 8)
    q, k, v = (given[name] for name in "qkv")
    with pytest.raises(KeyError, match="backend='cuda' must be one of"):
        ada.attention(q, k, v, scale=1.0, backend="cuda")
    with pytest.raises(ValueError, match="at least one token"):
        ada.attention(q[:, :0], k[:, :0], v[:, :0], scale=1.0)
    with pytest.raises(ValueError, match="excludes segments_BT"):
        ada.attention(
            q, k, v, scale=1.0, segments_BT=documents(1, 4), cu_seqlens=torch.tensor([0, 4])
        )
    wide = torch.randn(1, 4, 1, 264)
    with pytest.raises(ValueError, match="heads of width 264"):
        ada.attention(wide, wide, wide, scale=1.0, backend="triton")
    with pytest.raises(ValueError, match="tail_BPC needs taps_CP"):
        ada.prepare(torch.randn(1, 4, 8), heads=1, width=8, tail_BPC=torch.randn(1, 3, 8))


LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"decay": "none", "rope": False, "qk_norm": False, "output_norm": False,
              "output_gate": False},
    "fixed decay, silu": {"decay": "fixed", "kernel_activation": "silu"},
    "ode": {"kernel": "ode", "taps": 3},
    "no kernel": {"kernel": "none", "rope": False, "output_norm": False},
    "ranks": {"qk_rank": ((2, 6, 4),)},
}  # fmt: skip


def layer(backend: str, **switches: Any) -> Any:
    body = {"edges": 8, "rank": 4}
    model = Model.model_validate(
        {
            "name": "test", "d_model": 24, "layers": 1, "backend": backend,
            "attention": {
                "pattern": ("ada",),
                "ada": {"heads": 3, "head_dim": 8, **switches},
                "softmax": {"heads": 3, "kv_heads": 3},
                "mla": {"heads": 2, "kv_rank": 4, "nope_dim": 4, "rope_dim": 2, "v_dim": 4},
            },
            "ffn": {
                "pattern": ("dense",), "dense": {"hidden": 8},
                "moe": {"experts": 2, "top_k": 1, "hidden": 8},
                "kan": body, "grove": {"groves": 2, "top_g": 1, "kan": body},
            },
        }
    )  # fmt: skip
    torch.manual_seed(1)
    attention = build_attention(model, 0, Groups.single())
    attention.init_weights(0.3, 0.3)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith("kernel"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("setting", LAYERS)
def test_the_layer_is_the_same_on_kernels(setting: str, segmented: bool) -> None:
    torch.manual_seed(2)
    x, segments = torch.randn(2, 37, 24), documents(2, 37) if segmented else None
    found = {}
    for backend in ("triton", "reference"):
        module = layer(backend, **LAYERS[setting])
        assert module.backend == backend
        leaf = x.clone().requires_grad_()
        y = module(leaf, segments)
        y.square().sum().backward()
        named = {name: p.grad for name, p in module.named_parameters()}
        found[backend] = {"y": y, "x": leaf.grad, **named}
        assert ("time_constant" in module.metrics) == (module.log_rate_H is not None)
    for name, value in found["triton"].items():
        assert relative(value, found["reference"][name].double()) < 2e-5, name


@pytest.mark.parametrize("setting", LAYERS)
@torch.no_grad()
def test_decoding_continues_what_was_read(setting: str) -> None:
    """Tokens at once, then some, then one by one: what the reference makes of the whole row."""
    torch.manual_seed(2)
    x = torch.randn(2, 21, 24)
    module = layer("triton", **LAYERS[setting])
    cache = module.init_cache(2, 21, "cpu", torch.float32)
    cuts = [(0, 9), (9, 14), *((i, i + 1) for i in range(14, 21))]
    y = torch.cat([module(x[:, first:last], cache=cache) for first, last in cuts], 1)
    assert relative(y, layer("reference", **LAYERS[setting])(x).double()) < 2e-5
    assert cache.tokens == 21

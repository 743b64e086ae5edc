"""One token of ADA decoding in Triton against the reference in fp64 and against the layer.

Runs in Triton's interpreter where there is no GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kalmagrove.config import Model
from kalmagrove.nn.attention.ada import ADA
from kalmagrove.parallel import Groups
from kalmagrove_kernels.ada import triton_decode
from kalmagrove_kernels.ada.decode import decode_step

pytestmark = pytest.mark.unit
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 5e-6  # relative RMS of fp32 against fp64
RANKS = (24, 8, 14)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """NaN in all memory that is not yet written."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 512], ids=["whole heads", "blocks of values"])
def _programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program holds all values of a head, or 16 of them."""
    monkeypatch.setattr(triton_decode, "PROGRAMS", request.param)


def padded(ranks: tuple[int, ...], width: int) -> dict[str, Tensor]:
    """Heads of unequal ranks as the layer lays them out, halves apart."""
    slot_HR, row = torch.full((len(ranks), width), sum(ranks)), 0
    for head, rank in enumerate(ranks):
        places = [*range(rank // 2), *range(width // 2, width // 2 + rank // 2)]
        slot_HR[head, places] = torch.arange(row, row + rank)
        row += rank
    return {
        "slot_S": slot_HR.flatten().to(DEVICE),
        "rank_H": torch.tensor(ranks, device=DEVICE),
    }


def decode(
    shape: tuple[int, int, int, int], backend: str, dtype: torch.dtype, **options: Any
) -> list[Tensor]:
    """The outputs of 3 tokens, then state and tail. v, k and the tail are views with strides."""
    batch, heads, width, values = shape
    torch.manual_seed(sum(shape))
    channels = sum(RANKS) if "slot_S" in options else heads * width
    draw = [
        torch.randn(3, batch, 2 * channels + heads * values),
        torch.randn(batch, heads, width, values),
        torch.randn(batch, 5, channels),
        torch.randn(2 * channels, 4),
        -torch.rand(heads),
    ]
    qkv, state, keys, taps, log_decay = (t.to(DEVICE, dtype) for t in draw)
    if options.pop("taps", 4) == 4:
        options["taps_CP"] = taps[::2]
    if options.pop("decay", True):
        options["log_decay_H"] = log_decay
    position = options.pop("position", torch.tensor([60]))
    tail = keys[:, 1:4] if "taps_CP" in options else keys[:, :0]
    outputs = []
    for step, token in enumerate(qkv):
        q, k, v = token.split([channels, channels, heads * values], dim=1)
        outputs.append(
            decode_step(
                q,
                k,
                v.unflatten(1, (heads, values)),
                state,
                tail,
                heads=heads,
                width=width,
                scale=0.3,
                position=(position + step).to(DEVICE),
                backend=backend,
                **options,
            )
        )
    return [*outputs, state, keys]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.usefixtures("_programs")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 24, 60), {"silu": True, "norm_eps": 1e-5, "rope_theta": 1e4}),
        ((1, 1, 16, 16), {"rope_theta": 500.0, "taps": 0, "decay": False}),
        ((3, 2, 60, 24), {"norm_eps": 1e-5, "silu": True, "taps": 0}),
        ((2, 2, 7, 129), {"norm_eps": 1e-6}),
        ((2, 3, 24, 33), {"norm_eps": 1e-5, "rope_theta": 1e4, **padded(RANKS, 24)}),
    ],
)
def test_it_is_the_reference(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    ours = decode(shape, "triton", torch.float32, **options)
    assert_same(ours, decode(shape, "reference", torch.float64, **options))


def test_every_row_may_have_its_position() -> None:
    shape, options = (3, 2, 16, 16), {"rope_theta": 1e4, "position": torch.tensor([0, 9, 2000])}
    ours = decode(shape, "triton", torch.float32, **options)
    assert_same(ours, decode(shape, "reference", torch.float64, **options), 1e-4)
    again = decode(shape, "triton", torch.float32, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_decays_are_clamped() -> None:
    state = torch.randn(1, 3, 16, 16, device=DEVICE)
    q, k = torch.randn(2, 1, 48, device=DEVICE)
    v = torch.randn(1, 3, 16, device=DEVICE)
    options = {"heads": 3, "width": 16, "scale": 1.0, "position": torch.tensor([0], device=DEVICE)}
    options["log_decay_H"] = torch.tensor([-torch.inf, 0.0, 1.0], device=DEVICE)
    ours, theirs = state.clone(), state.double()
    tail = q.new_empty(1, 0, 48)
    decode_step(q, k, v, ours, tail, backend="triton", **options)
    decode_step(q.double(), k.double(), v.double(), theirs, tail, **options)
    assert_same([ours], [theirs])


def test_no_rows() -> None:
    outputs = decode((0, 2, 16, 24), "triton", torch.float32)
    assert outputs[0].shape == (0, 2, 24)


def some_layer(setting: dict[str, Any]) -> ADA:
    """3 heads of 24 without norm, gate and projection of the output."""
    torch.manual_seed(0)
    ada = {"heads": 3, "output_norm": False, "output_gate": False} | setting
    kan = {"edges": 8, "rank": 4}
    model = Model.model_validate(
        {
            "name": "test", "d_model": 72, "layers": 1, "backend": "reference",
            "attention": {
                "pattern": ("ada",),
                "ada": ada,
                "softmax": {"heads": 3, "kv_heads": 3},
                "mla": {"heads": 2, "kv_rank": 4, "nope_dim": 4, "rope_dim": 2, "v_dim": 4},
            },
            "ffn": {
                "pattern": ("dense",), "dense": {"hidden": 8},
                "moe": {"experts": 2, "top_k": 1, "hidden": 8},
                "kan": kan, "grove": {"groves": 2, "top_g": 1, "kan": kan},
            },
        }
    )  # fmt: skip
    layer = ADA(model, 0, Groups.single())
    layer.init_weights(0.1, 0.1)
    with torch.no_grad():
        for parameter in layer.kernel.parameters() if layer.kernel is not None else ():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.w_o.weight.copy_(torch.eye(72))
    return layer


@pytest.mark.parametrize(
    "setting",
    [
        {"kernel_activation": "silu"},
        {"kernel": "ode", "qk_rank": ((24, 8, 14),)},
        {"kernel": "none", "rope": False, "decay": "none", "qk_norm": False, "qk_rank": 6},
    ],
)
def test_many_steps_are_the_layer(setting: dict[str, Any]) -> None:
    """The layer in fp64 decodes with its cache."""
    layer = some_layer(setting).to(DEVICE).double().requires_grad_(False)
    cache = layer.init_cache(2, 12, DEVICE, torch.float64)
    state, tail = cache.state.float(), cache.tail.float()
    config = layer.config
    options = {
        "heads": layer.heads,
        "width": layer.width,
        "scale": layer.scale,
        "taps_CP": None if layer.kernel is None else layer.kernel().float(),
        "log_decay_H": None if layer.log_rate_H is None else -layer.log_rate_H.exp(),
        "silu": config.kernel_activation == "silu",
        "norm_eps": layer.norm_eps if config.qk_norm else None,
        "rope_theta": config.rope_theta if config.rope else None,
        "slot_S": layer.slot_S,
        "rank_H": layer.rank_H,
    }
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for x_BTD in torch.randn(12, 2, 1, 72, dtype=torch.float64, device=DEVICE):
        expected = layer(x_BTD, cache=cache)[:, 0]
        x_BD = x_BTD[:, 0]
        q, k, v = (linear(x_BD).float() for linear in (layer.w_q, layer.w_k, layer.w_v))
        v = v.unflatten(1, (3, 24))
        o = decode_step(q, k, v, state, tail, position=position, backend="triton", **options)
        assert_same([o.flatten(1)], [expected])
        position += 1
    assert_same([state, tail], [cache.state, cache.tail])


def test_what_cannot_be_is_refused() -> None:
    q = torch.randn(1, 32)
    v, state, tail = torch.randn(1, 2, 16), torch.zeros(1, 2, 16, 16), torch.zeros(1, 0, 32)
    options = {"heads": 2, "width": 16, "scale": 1.0, "position": torch.zeros(1).long()}
    with pytest.raises(KeyError, match="backend='none'"):
        decode_step(q, q, v, state, tail, **options, backend="none")
    with pytest.raises(ValueError, match="contiguous"):
        decode_step(q, q, v, state.mT, tail, **options)
    with pytest.raises(ValueError, match="tail_BPC"):
        decode_step(q, q, v, state, tail, **options, taps_CP=torch.ones(32, 4))
    with pytest.raises(ValueError, match="position"):
        decode_step(q, q, v, state, tail, **options | {"position": torch.zeros(2).long()})
    odd, k = options | {"width": 15, "rope_theta": 1e4}, q[:, :30]
    with pytest.raises(ValueError, match="even"):
        decode_step(k, k, v, state[:, :, :15].contiguous(), tail, **odd)
    with pytest.raises(TypeError, match="q is"):
        decode_step(q.double(), q.double(), v, state, tail, **options, backend="triton")
    with pytest.raises(TypeError, match="the state"):
        decode_step(q, q, v, state.double(), tail, **options, backend="triton")

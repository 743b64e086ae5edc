"""Multi-head latent attention: DeepSeek-V2's equations, latent cache, packed documents."""

import math

import pytest
import torch

from kalmagrove.config import Model
from kalmagrove.nn.attention import build_attention
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit

SETTINGS = {"default": {}, "compressed queries": {"q_rank": 10}}


def some_model(**options) -> Model:
    kan = {"edges": 8, "rank": 4}
    return Model.model_validate(
        {
            "name": "test", "d_model": 24, "layers": 1,
            "attention": {
                "pattern": ("mla",),
                "ada": {"heads": 3},
                "softmax": {"heads": 4, "kv_heads": 4, "head_dim": 6},
                "mla": {"heads": 3, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5}
                | options,
            },
            "ffn": {
                "pattern": ("dense",), "dense": {"hidden": 8},
                "moe": {"experts": 2, "top_k": 1, "hidden": 8},
                "kan": kan, "grove": {"groves": 2, "top_g": 1, "kan": kan},
            },
        }
    )  # fmt: skip


def some_layer(**options):
    torch.manual_seed(1)
    attention = build_attention(some_model(**options), 0, Groups.single())
    attention.init_weights(0.3, 0.3)
    return attention


@pytest.mark.parametrize("setting", SETTINGS)
def test_causal(setting: str) -> None:
    attention, x = some_layer(**SETTINGS[setting]), torch.randn(2, 17, 24)
    changed = x.clone()
    changed[:, 9:] = torch.randn(2, 8, 24)
    before, after = attention(x), attention(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=0)
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_row_equals_separate_rows(setting: str) -> None:
    attention = some_layer(**SETTINGS[setting])
    documents = [torch.randn(1, n, 24) for n in (1, 2, 9, 4)]
    segments = torch.cat([torch.full((1, d.shape[1]), i) for i, d in enumerate(documents)], dim=1)
    packed = attention(torch.cat(documents, dim=1), segments.int())
    separate = torch.cat([attention(d) for d in documents], dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_decoding_equals_the_full_forward(setting: str) -> None:
    attention, x = some_layer(**SETTINGS[setting]), torch.randn(2, 23, 24)
    with torch.no_grad():
        want = attention(x)
        for splits in ([1] * 23, [9, *[1] * 14], [2, 1, 13, 7], [23]):
            cache = attention.init_cache(2, 30, x.device, x.dtype)
            got = torch.cat([attention(part, cache=cache) for part in x.split(splits, 1)], dim=1)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
            assert cache.tokens == 23


def test_full_cache_and_segments_are_refused() -> None:
    attention, x = some_layer(), torch.randn(1, 5, 24)
    cache = attention.init_cache(1, 4, x.device, x.dtype)
    with pytest.raises(ValueError, match="max_tokens=4"):
        attention(x, cache=cache)
    with pytest.raises(ValueError, match="exclude each other"):
        attention(x[:, :2], torch.zeros(1, 2), cache)


@pytest.mark.parametrize("setting", SETTINGS)
def test_bf16_is_close_to_fp32(setting: str) -> None:
    attention, x = some_layer(**SETTINGS[setting]), torch.randn(2, 30, 24).bfloat16()
    want = attention(x.float())
    got = attention.bfloat16()(x)
    assert got.dtype == torch.bfloat16
    error = (got.float() - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < 0.03


@pytest.mark.parametrize("setting", SETTINGS)
def test_formula_head_by_head(setting: str) -> None:
    attention, x = some_layer(**SETTINGS[setting]).double(), torch.randn(1, 7, 24).double()
    angles = rotary_angles(0, 7, 2, attention.config.rope_theta, x.device)

    def normed(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    inner = x if attention.w_dq is None else normed(attention.w_dq(x))
    q = attention.w_q(inner).unflatten(-1, (3, 6))
    latent = normed(attention.w_dkv(x))
    k = attention.w_uk(latent).unflatten(-1, (3, 4))
    v = attention.w_uv(latent).unflatten(-1, (3, 5))
    shared = rotate(attention.w_kr(x)[:, :, None], angles)[0, :, 0]
    heads = []
    for head in range(3):
        turned = rotate(q[:, :, head : head + 1, 4:], angles)[0, :, 0]
        scores = q[0, :, head, :4] @ k[0, :, head].T + turned @ shared.T
        future = torch.ones(7, 7).triu(1).bool()
        weights = (scores / math.sqrt(6)).masked_fill(future, -torch.inf).softmax(-1)
        heads.append(weights @ v[0, :, head])
    torch.testing.assert_close(attention(x)[0], attention.w_o(torch.cat(heads, dim=-1)))


def test_cache_is_the_latent() -> None:
    cache = some_layer().init_cache(2, 9, "cpu", torch.float32)
    assert cache.latents.shape == (2, 9, 6)
    assert cache.keys.shape == (2, 9, 2)

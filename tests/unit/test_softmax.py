"""Softmax attention: grouped queries, rotation, cache, packed documents."""

import math

import pytest
import torch

from kalmagrove.config import Model
from kalmagrove.nn.attention import build_attention
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove.parallel import Groups

pytestmark = pytest.mark.unit

SETTINGS = {
    "default": {},
    "grouped": {"kv_heads": 2},
    "multi-query, plain": {"kv_heads": 1, "rope": False, "qk_norm": False},
}


def some_model(**options) -> Model:
    kan = {"edges": 8, "rank": 4}
    return Model.model_validate(
        {
            "name": "test", "d_model": 24, "layers": 1,
            "attention": {
                "pattern": ("softmax",),
                "ada": {"heads": 3},
                "softmax": {"heads": 4, "kv_heads": 4, "head_dim": 6} | options,
                "mla": {"heads": 3, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5},
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
    config = attention.config
    q, k, v = (w(x).unflatten(-1, (-1, 6)) for w in (attention.w_q, attention.w_k, attention.w_v))
    if config.qk_norm:
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() for y in (q, k))
    if config.rope:
        angles = rotary_angles(0, 7, 6, config.rope_theta, x.device)
        q, k = rotate(q, angles), rotate(k, angles)
    heads = []
    for head in range(4):
        group = head // (4 // config.kv_heads)
        scores = q[0, :, head] @ k[0, :, group].T / math.sqrt(6)
        future = torch.ones(7, 7).triu(1).bool()
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[0, :, group])
    want = attention.w_o(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x)[0], want)

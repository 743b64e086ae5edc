"""Grouped-query softmax attention (arXiv:2305.13245) through torch's scaled_dot_product_attention.

One of the attentions a block can hold; `attend` is shared with the latent attention of `mla`.

Legend: B batch, T tokens, S tokens including the past, D model, H heads, G key/value heads, R head
width. With tensor parallelism H and G are those of a rank, with context parallelism T is its piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmagrove.config import Model
from kalmagrove.nn.norm import RMSNorm
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove.parallel import ContextParallel, Groups, Linear, TensorParallel


@dataclass
class KVCache:
    """Keys and values of the past, in tensors of `max_tokens` slots."""

    keys: Tensor  # [B, G, S, R]
    values: Tensor  # [B, G, S, R]
    tokens: int = 0


class Softmax(nn.Module):
    """softmax(Q K^T / sqrt(R)) V, causal, with the switches of `config.Softmax`.

    qk_norm is an RMSNorm with weights over a head's width, before the rotation (as in Qwen3).
    """

    def __init__(self, model: Model, groups: Groups) -> None:
        super().__init__()
        config = model.attention.softmax
        self.config = config
        self.tp, self.cp = TensorParallel.of(groups), ContextParallel.of(groups)
        self.head_dim = config.head_dim or model.d_model // config.heads
        self.w_q = self._columns(model.d_model, config.heads)
        self.w_k = self._columns(model.d_model, config.kv_heads)
        self.w_v = self._columns(model.d_model, config.kv_heads)
        inner = config.heads * self.head_dim
        self.w_o = Linear(inner, model.d_model, self.tp.piece(inner, dim=1))
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, model.norm_eps, self.tp.shared)
            self.k_norm = RMSNorm(self.head_dim, model.norm_eps, self.tp.shared)
        self.metrics: dict[str, Tensor] = {}

    def _columns(self, inputs: int, heads: int) -> Linear:
        assert heads % self.tp.group.size == 0
        return Linear(inputs, heads * self.head_dim, self.tp.piece(heads * self.head_dim))

    def init_weights(self, std: float, out_std: float) -> None:
        """Normal(0, std) projections, Normal(0, out_std) for the one into the residual stream."""
        for linear in (self.w_q, self.w_k, self.w_v):
            linear.init_weights(std)
        self.w_o.init_weights(out_std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)

    def init_cache(
        self, batch: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> KVCache:
        """An empty past with room for `max_tokens`."""
        assert self.tp.group.size == self.cp.group.size == 1
        shape = (batch, self.config.kv_heads, max_tokens, self.head_dim)
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return KVCache(keys, values)

    def forward(
        self, x_BTD: Tensor, segments_BT: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]. With `cache`, x continues it and it is advanced in place.

        Raises ValueError if both `segments_BT` and `cache` are given, or the cache is full.
        """
        x_BTD = self.tp.enter(x_BTD)
        tokens, past = x_BTD.shape[1], cache.tokens if cache is not None else 0
        q, k, v = (
            w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.w_q, self.w_k, self.w_v)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope:
            start = past + self.cp.start(tokens)
            angles = rotary_angles(
                start, tokens, self.head_dim, self.config.rope_theta, x_BTD.device
            )
            q, k = rotate(q, angles), rotate(k, angles)
        k, v = self.cp.until_here(k), self.cp.until_here(v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            end = advance(past, tokens, cache.keys.shape[2], segments_BT)
            cache.keys[:, :, past:end], cache.values[:, :, past:end] = k, v
            k, v = (
                cache.keys[:, :, :end].to(k.dtype),
                cache.values[:, :, :end].to(v.dtype),
            )
            cache.tokens = end
        segments_BS = None if segments_BT is None else self.cp.until_here(segments_BT)
        out = attend(q, k, v, self.head_dim**-0.5, segments_BS)
        return self.tp.leave(self.w_o(out.transpose(1, 2).flatten(2)))


def attend(
    q_BHTR: Tensor, k_BGSR: Tensor, v_BGSV: Tensor, scale: float, segments_BS: Tensor | None
) -> Tensor:
    """Causal softmax attention of the last T of S tokens over all S, [B, H, T, V].

    H may be a multiple of G. With segments, tokens see only their own segment.
    """
    tokens, total = q_BHTR.shape[2], k_BGSR.shape[2]
    grouped = q_BHTR.shape[1] != k_BGSR.shape[1]
    mask = None
    if segments_BS is not None or 1 < tokens < total:
        index = torch.arange(total, device=q_BHTR.device)
        mask = index[total - tokens :, None] >= index
    if segments_BS is not None and mask is not None:
        own_BT = segments_BS[:, total - tokens :]
        mask = mask & (own_BT[:, None, :, None] == segments_BS[:, None, None, :])
    return F.scaled_dot_product_attention(
        q_BHTR, k_BGSR, v_BGSV,
        attn_mask=mask, is_causal=mask is None and tokens > 1, scale=scale, enable_gqa=grouped,
    )  # fmt: skip


def advance(past: int, tokens: int, room: int, segments_BT: Tensor | None) -> int:
    """The number of cached tokens after `tokens` more; ValueError where that cannot be."""
    if segments_BT is not None:
        raise ValueError("segments and a cache exclude each other")
    if past + tokens > room:
        raise ValueError(
            f"a cache of max_tokens={room} holding {past} has no room for {tokens} more; "
            "give init_cache a larger max_tokens"
        )
    return past + tokens

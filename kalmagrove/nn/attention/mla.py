"""Multi-head latent attention of DeepSeek-V2 (arXiv:2405.04434, section 2.1).

One of the attentions a block can hold, as a baseline: keys and values come from a narrow latent,
and the latent is all that decoding keeps.

Legend: B batch, T tokens, S tokens including the past, D model, H heads, L width of the latent,
N width without position, R rotary width, V value width. With tensor parallelism H is the heads of
a rank, with context parallelism T is its piece.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kalmagrove.config import Model
from kalmagrove.nn.attention.softmax import advance, attend
from kalmagrove.nn.norm import RMSNorm
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove.parallel import ContextParallel, Groups, Linear, TensorParallel


@dataclass
class LatentCache:
    """The normalised latents and rotated shared keys of the past: L + R numbers a token."""

    latents: Tensor  # [B, S, L]
    keys: Tensor  # [B, S, R]
    tokens: int = 0


class MLA(nn.Module):
    """Latent attention with the sizes of `config.MLA`.

    Queries [N | R] per head come from x, or from a normalised latent of q_rank; keys are [N | R]
    with the N part expanded from the key/value latent and the rotary part shared by the heads. The
    scores are scaled by 1/sqrt(N + R).

    Tensor parallelism splits what has heads; the latents are made from the stream with whole
    weights. With context parallelism the ranks exchange latents, not expanded keys and values.
    """

    def __init__(self, model: Model, groups: Groups) -> None:
        super().__init__()
        config = model.attention.mla
        self.config = config
        self.tp, self.cp = TensorParallel.of(groups), ContextParallel.of(groups)
        self.heads = self.tp.piece(config.heads).length
        D, stream = model.d_model, self.tp.stream
        self.w_dq: Linear | None = None
        self.q_norm: RMSNorm | None = None
        if config.q_rank is not None:
            self.w_dq = Linear(D, config.q_rank, through=stream)
            self.q_norm = RMSNorm(config.q_rank, model.norm_eps, stream)
        self.w_q = self._columns(config.q_rank or D, config.nope_dim + config.rope_dim)
        self.w_dkv = Linear(D, config.kv_rank, through=stream)
        self.kv_norm = RMSNorm(config.kv_rank, model.norm_eps, stream)
        self.w_kr = Linear(D, config.rope_dim, through=stream)
        self.w_uk = self._columns(config.kv_rank, config.nope_dim)
        self.w_uv = self._columns(config.kv_rank, config.v_dim)
        inner = config.heads * config.v_dim
        self.w_o = Linear(inner, D, self.tp.piece(inner, dim=1))
        self.metrics: dict[str, Tensor] = {}

    def _columns(self, inputs: int, width: int) -> Linear:
        outputs = self.config.heads * width
        return Linear(inputs, outputs, self.tp.piece(outputs))

    def init_weights(self, std: float, out_std: float) -> None:
        """Normal(0, std) projections, Normal(0, out_std) for the one into the residual stream."""
        for linear in (self.w_dq, self.w_q, self.w_dkv, self.w_kr, self.w_uk, self.w_uv):
            if linear is not None:
                linear.init_weights(std)
        self.w_o.init_weights(out_std)
        for norm in (self.q_norm, self.kv_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)

    def init_cache(
        self, batch: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> LatentCache:
        """An empty past with room for `max_tokens`."""
        assert self.tp.group.size == self.cp.group.size == 1
        latents, keys = (
            torch.zeros(batch, max_tokens, width, device=device, dtype=dtype)
            for width in (self.config.kv_rank, self.config.rope_dim)
        )
        return LatentCache(latents, keys)

    def forward(
        self, x_BTD: Tensor, segments_BT: Tensor | None = None, cache: LatentCache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]. With `cache`, x continues it and it is advanced in place.

        Raises ValueError if both `segments_BT` and `cache` are given, or the cache is full.
        """
        config, past = self.config, cache.tokens if cache is not None else 0
        latent_BTL = self.tp.enter(self.kv_norm(self.w_dkv(x_BTD)))
        tokens = latent_BTL.shape[1]
        start = past + self.cp.start(tokens)
        angles = rotary_angles(start, tokens, config.rope_dim, config.rope_theta, x_BTD.device)
        q_BTHX = self._queries(x_BTD, angles)
        key_BTR = rotate(self.tp.enter(self.w_kr(x_BTD)).unsqueeze(2), angles).squeeze(2)
        latent_BSL, key_BSR = self.cp.until_here(latent_BTL), self.cp.until_here(key_BTR)
        if cache is not None:
            end = advance(past, tokens, cache.latents.shape[1], segments_BT)
            cache.latents[:, past:end], cache.keys[:, past:end] = latent_BSL, key_BSR
            latent_BSL = cache.latents[:, :end].to(x_BTD.dtype)
            key_BSR = cache.keys[:, :end].to(x_BTD.dtype)
            cache.tokens = end
        k_BSHN = self.w_uk(latent_BSL).unflatten(-1, (self.heads, config.nope_dim))
        v_BSHV = self.w_uv(latent_BSL).unflatten(-1, (self.heads, config.v_dim))
        shared_BSHR = key_BSR.unsqueeze(2).expand(-1, -1, self.heads, -1)
        k_BSHX = torch.cat([k_BSHN, shared_BSHR], dim=-1)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHX, k_BSHX, v_BSHV))
        segments_BS = None if segments_BT is None else self.cp.until_here(segments_BT)
        out_BHTV = attend(q, k, v, (config.nope_dim + config.rope_dim) ** -0.5, segments_BS)
        return self.tp.leave(self.w_o(out_BHTV.transpose(1, 2).flatten(2)))

    def _queries(self, x_BTD: Tensor, angles_THr: Tensor) -> Tensor:
        """[B, T, H, N + R], the last R rotated."""
        if self.w_dq is not None and self.q_norm is not None:
            x_BTD = self.q_norm(self.w_dq(x_BTD))
        q = self.w_q(self.tp.enter(x_BTD)).unflatten(-1, (self.heads, -1))
        plain, rotary = q.split([self.config.nope_dim, self.config.rope_dim], dim=-1)
        return torch.cat([plain, rotate(rotary, angles_THr)], dim=-1)

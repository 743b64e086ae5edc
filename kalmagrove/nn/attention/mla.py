"""Multi-head latent attention of DeepSeek-V2 (arXiv:2405.04434, section 2.1).

One of the attentions a block can hold, as a baseline: keys and values come from a narrow latent,
and the latent is all that decoding keeps.

Legend: B batch, T tokens, S tokens including the past, D model, H heads, L width of the latent,
N width without position, R rotary width, V value width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kalmagrove.config import Model
from kalmagrove.nn.attention.softmax import advance, attend
from kalmagrove.nn.norm import RMSNorm
from kalmagrove.nn.rope import rotary_angles, rotate


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
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        config = model.attention.mla
        self.config = config
        queries = config.heads * (config.nope_dim + config.rope_dim)
        self.w_dq: nn.Linear | None = None
        self.q_norm: RMSNorm | None = None
        if config.q_rank is not None:
            self.w_dq = nn.Linear(model.d_model, config.q_rank, bias=False)
            self.q_norm = RMSNorm(config.q_rank, model.norm_eps)
        self.w_q = nn.Linear(config.q_rank or model.d_model, queries, bias=False)
        self.w_dkv = nn.Linear(model.d_model, config.kv_rank, bias=False)
        self.kv_norm = RMSNorm(config.kv_rank, model.norm_eps)
        self.w_kr = nn.Linear(model.d_model, config.rope_dim, bias=False)
        self.w_uk = nn.Linear(config.kv_rank, config.heads * config.nope_dim, bias=False)
        self.w_uv = nn.Linear(config.kv_rank, config.heads * config.v_dim, bias=False)
        self.w_o = nn.Linear(config.heads * config.v_dim, model.d_model, bias=False)
        self.metrics: dict[str, Tensor] = {}

    def init_weights(self, std: float, out_std: float) -> None:
        """Normal(0, std) projections, Normal(0, out_std) for the one into the residual stream."""
        for linear in (self.w_dq, self.w_q, self.w_dkv, self.w_kr, self.w_uk, self.w_uv):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.w_o.weight, std=out_std)
        for norm in (self.q_norm, self.kv_norm):
            if norm is not None:
                nn.init.ones_(norm.weight)

    def init_cache(
        self, batch: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> LatentCache:
        """An empty past with room for `max_tokens`."""
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
        config, tokens = self.config, x_BTD.shape[1]
        start = cache.tokens if cache is not None else 0
        angles = rotary_angles(start, tokens, config.rope_dim, config.rope_theta, x_BTD.device)
        q_BTHX = self._queries(x_BTD, angles)
        latent_BSL = self.kv_norm(self.w_dkv(x_BTD))
        key_BSR = rotate(self.w_kr(x_BTD).unsqueeze(2), angles).squeeze(2)
        if cache is not None:
            end = advance(start, tokens, cache.latents.shape[1], segments_BT)
            cache.latents[:, start:end], cache.keys[:, start:end] = latent_BSL, key_BSR
            latent_BSL = cache.latents[:, :end].to(x_BTD.dtype)
            key_BSR = cache.keys[:, :end].to(x_BTD.dtype)
            cache.tokens = end
        k_BSHN = self.w_uk(latent_BSL).unflatten(-1, (config.heads, config.nope_dim))
        v_BSHV = self.w_uv(latent_BSL).unflatten(-1, (config.heads, config.v_dim))
        shared_BSHR = key_BSR.unsqueeze(2).expand(-1, -1, config.heads, -1)
        k_BSHX = torch.cat([k_BSHN, shared_BSHR], dim=-1)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHX, k_BSHX, v_BSHV))
        out_BHTV = attend(q, k, v, (config.nope_dim + config.rope_dim) ** -0.5, segments_BT)
        return self.w_o(out_BHTV.transpose(1, 2).flatten(2))

    def _queries(self, x_BTD: Tensor, angles_THr: Tensor) -> Tensor:
        """[B, T, H, N + R], the last R rotated."""
        if self.w_dq is not None and self.q_norm is not None:
            x_BTD = self.q_norm(self.w_dq(x_BTD))
        q = self.w_q(x_BTD).unflatten(-1, (self.config.heads, -1))
        plain, rotary = q.split([self.config.nope_dim, self.config.rope_dim], dim=-1)
        return torch.cat([plain, rotate(rotary, angles_THr)], dim=-1)

"""Arnold Diffusion Attention: linear attention over convolved keys (KalmaGrove paper, section 3.2).

One of the attentions a block can hold; the sum over tokens itself is `kalmagrove_kernels.ada`.

Legend: B batch, T tokens, D model, H heads, R width of the widest query/key head, V width of a
value head, C the key channels that exist (the sum of the heads' ranks), P taps.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmagrove.config import ConfigError, Model
from kalmagrove.nn.attention.key_kernel import build_taps, convolve
from kalmagrove.nn.norm import RMSNorm, upcast
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove_kernels.ada import chunked, quadratic, recurrent


@dataclass
class ADACache:
    """All that decoding needs of the past; its size does not depend on the number of tokens."""

    state: Tensor  # [B, H, R, V], fp32
    tail: Tensor  # [B, P - 1, C]: the last P - 1 keys, before the convolution
    tokens: int = 0
    taps: Tensor | None = None  # [C, P], computed once: weights are fixed while decoding


class ADA(nn.Module):
    """ADA(Q, K, V) = Q (K * kappa)^T / sqrt(d) V, causal, with the switches of `config.ADA`.

    The order is: project; convolve the keys with kappa (then SiLU, if asked); RMS-normalise
    queries and keys per head, without weights; rotate; attend with the head's decay; RMSNorm per
    head, with weights; gate with SiLU(W_g x), as RetNet (arXiv:2307.08621) and its successors do;
    project. With kernel=cnn and every other switch off this is the paper's formula. The state and
    all of the attention are fp32.

    A head may have a query/key rank below the others': only its own rows exist in W_q and W_k,
    they are scattered into heads padded with zeros. d is `head_dim` whatever the ranks, as a
    rank-r head stands for a factorised full one.

    Raises ConfigError for a backend other than auto and reference.
    """

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        config = model.attention.ada
        if model.backend not in ("auto", "reference"):
            raise ConfigError(
                "model.backend", model.backend, "does not exist for attention=ada", "use auto"
            )
        self.config = config
        self.heads = config.heads
        self.head_dim = config.head_dim or model.d_model // config.heads
        self.scale = self.head_dim**-0.5
        self.norm_eps = model.norm_eps
        self.ranks = self._head_ranks(model, layer)
        self.width = max(self.ranks)
        channels, values = sum(self.ranks), self.heads * self.head_dim
        self.w_q = nn.Linear(model.d_model, channels, bias=False)
        self.w_k = nn.Linear(model.d_model, channels, bias=False)
        self.w_v = nn.Linear(model.d_model, values, bias=False)
        self.w_g = nn.Linear(model.d_model, values, bias=False) if config.output_gate else None
        self.w_o = nn.Linear(values, model.d_model, bias=False)
        self.kernel = build_taps(config.kernel, channels, config.taps, config.ode_hidden)
        self.output_norm = RMSNorm(self.head_dim, model.norm_eps) if config.output_norm else None
        self.log_rate_H: nn.Parameter | None = None
        if config.decay == "learned":
            self.log_rate_H = nn.Parameter(self._first_log_rates(None))
            self.log_rate_H.kind = "kernel"  # type: ignore[attr-defined]
        self.rank_H: Tensor | None
        self.slot_S: Tensor | None
        uneven = len(set(self.ranks)) > 1
        self.register_buffer("rank_H", torch.tensor(self.ranks) if uneven else None, False)
        self.register_buffer("slot_S", self._slots() if uneven else None, False)
        self.metrics: dict[str, Tensor] = {}

    def init_weights(self, std: float, out_std: float) -> None:
        """Normal(0, std) projections, Normal(0, out_std) for the one into the residual stream.

        Decays start at the time constants of `decay_range`, the key kernel near the identity.
        """
        for linear in (self.w_q, self.w_k, self.w_v, self.w_g):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.w_o.weight, std=out_std)
        if self.kernel is not None:
            self.kernel.init_weights()
        if self.output_norm is not None:
            nn.init.ones_(self.output_norm.weight)
        if self.log_rate_H is not None:
            with torch.no_grad():
                self.log_rate_H.copy_(self._first_log_rates(self.log_rate_H.device))

    def init_cache(
        self, batch: int, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> ADACache:
        """An empty past. `max_tokens` sets no size here: the state is O(1)."""
        state = torch.zeros(batch, self.heads, self.width, self.head_dim, device=device)
        before = self.config.taps - 1 if self.kernel is not None else 0
        tail = torch.zeros(batch, before, sum(self.ranks), device=device, dtype=dtype)
        return ADACache(state.double() if dtype == torch.float64 else state, tail)

    def forward(
        self, x_BTD: Tensor, segments_BT: Tensor | None = None, cache: ADACache | None = None
    ) -> Tensor:
        """[B, T, D] to [B, T, D]. With `cache`, x continues it and it is advanced in place.

        Raises ValueError if both `segments_BT` and `cache` are given.
        """
        if segments_BT is not None and cache is not None:
            raise ValueError("segments and a cache exclude each other")
        start = cache.tokens if cache is not None else 0
        q_BTHR = self._heads(self.w_q(x_BTD))
        k_BTHR = self._heads(self._convolved(self.w_k(x_BTD), segments_BT, cache))
        if self.config.qk_norm:
            q_BTHR, k_BTHR = self._normalise(q_BTHR), self._normalise(k_BTHR)
        if self.config.rope:
            angles = rotary_angles(
                start, x_BTD.shape[1], self.width, self.config.rope_theta, x_BTD.device, self.rank_H
            )
            q_BTHR, k_BTHR = rotate(q_BTHR, angles), rotate(k_BTHR, angles)
        v_BTHV = upcast(self.w_v(x_BTD).unflatten(-1, (self.heads, self.head_dim)))
        out_BTHV = self._attend(q_BTHR, k_BTHR, v_BTHV, segments_BT, cache)
        if self.output_norm is not None:
            out_BTHV = self.output_norm(out_BTHV)
        out_BTV = out_BTHV.flatten(2).to(x_BTD.dtype)
        if self.w_g is not None:
            out_BTV = out_BTV * F.silu(self.w_g(x_BTD))
        return self.w_o(out_BTV)

    def _attend(
        self,
        q_BTHR: Tensor,
        k_BTHR: Tensor,
        v_BTHV: Tensor,
        segments_BT: Tensor | None,
        cache: ADACache | None,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHR, k_BTHR, v_BTHV))
        log_decay = self._log_decay(q.device)
        if cache is not None:
            out, state = self._continue(q, k, v, log_decay, cache.state)
            cache.state, cache.tokens = state, cache.tokens + q.shape[2]
            return out.transpose(1, 2)
        form = self.config.form
        if form == "auto":
            # Measured on a CPU core: up to two chunks, all scores at once are quicker; then chunks
            # are.
            form = "quadratic" if q.shape[2] <= 2 * self.config.chunk else "chunked"
        if form == "quadratic":
            out = quadratic(
                q, k, v, scale=self.scale, log_decay_H=log_decay, segments_BT=segments_BT
            )
        elif form == "chunked":
            out, _ = chunked(
                q, k, v,
                scale=self.scale, log_decay_H=log_decay, segments_BT=segments_BT,
                chunk=self.config.chunk,
            )  # fmt: skip
        else:
            out, _ = recurrent(
                q, k, v, scale=self.scale, log_decay_H=log_decay, segments_BT=segments_BT
            )
        return out.transpose(1, 2)

    def _continue(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From a state: one token by the recurrence, more by chunks, whatever `form` says."""
        if q.shape[2] == 1:
            return recurrent(q, k, v, scale=self.scale, log_decay_H=log_decay, state_BHRV=state)
        out, state_after = chunked(
            q, k, v,
            scale=self.scale, log_decay_H=log_decay, state_BHRV=state,
            chunk=self.config.chunk, return_state=True,
        )  # fmt: skip
        assert state_after is not None
        return out, state_after

    def _convolved(
        self, keys_BTC: Tensor, segments_BT: Tensor | None, cache: ADACache | None
    ) -> Tensor:
        if self.kernel is not None:
            taps = cache.taps if cache is not None else None
            taps = self.kernel() if taps is None else taps
            tail = cache.tail if cache is not None else None
            if cache is not None:
                cache.taps = taps
                past = torch.cat([cache.tail, keys_BTC.to(cache.tail.dtype)], dim=1)
                cache.tail = past[:, past.shape[1] - cache.tail.shape[1] :]
            keys_BTC = convolve(keys_BTC, taps, segments_BT, tail)
        return F.silu(keys_BTC) if self.config.kernel_activation == "silu" else keys_BTC

    def _heads(self, x_BTC: Tensor) -> Tensor:
        """Packed rows to [B, T, H, R] in fp32, zero where a head's rank ends before R."""
        x = upcast(x_BTC)
        if self.slot_S is not None:
            x = F.pad(x, (0, 1)).index_select(
                -1, self.slot_S
            )  # the pad is the zero of missing rows
        return x.unflatten(-1, (self.heads, self.width))

    def _normalise(self, x_BTHR: Tensor) -> Tensor:
        """Root mean square 1 over the entries that exist."""
        if self.rank_H is None:
            return F.rms_norm(x_BTHR, (self.width,), eps=self.norm_eps)
        square = x_BTHR.square().sum(-1, keepdim=True) / self.rank_H[:, None]
        return x_BTHR * (square + self.norm_eps).rsqrt()

    def _log_decay(self, device: torch.device) -> Tensor | None:
        """Logarithm of the decay per token, [H]: minus one over the time constant."""
        if self.config.decay == "none":
            return None
        if self.log_rate_H is None:
            return -self._first_log_rates(device).exp()
        rate_H = upcast(self.log_rate_H).exp()
        self.metrics = {"time_constant": rate_H.detach().reciprocal()}
        return -rate_H

    def _first_log_rates(self, device: torch.device | None) -> Tensor:
        low, high = self.config.decay_range
        return -torch.linspace(math.log(low), math.log(high), self.heads, device=device)

    def _slots(self) -> Tensor:
        """For each of the H * R padded entries the packed row it shows; C for none.

        With RoPE a head's two halves start at 0 and R / 2, so that its rotary pairs stay pairs.
        """
        slots = torch.full((self.heads, self.width), sum(self.ranks))
        row = 0
        for head, rank in enumerate(self.ranks):
            rows = torch.arange(row, row + rank)
            if self.config.rope:
                half, middle = rank // 2, self.width // 2
                slots[head, :half], slots[head, middle : middle + half] = rows[:half], rows[half:]
            else:
                slots[head, :rank] = rows
            row += rank
        return slots.flatten()

    def _head_ranks(self, model: Model, layer: int) -> tuple[int, ...]:
        ranks = self.config.qk_rank
        if isinstance(ranks, tuple):
            return ranks[sum(model.attention_kind(i) == "ada" for i in range(layer))]
        return (ranks or self.head_dim,) * self.heads

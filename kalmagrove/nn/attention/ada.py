"""Arnold Diffusion Attention: linear attention over convolved keys (KalmaGrove paper, section 3.2).

One of the attentions a block can hold; the sum over tokens itself is `kalmagrove_kernels.ada`.

Legend: B batch, T tokens, D model, H heads, R width of the widest query/key head, V width of a
value head, C the key channels that exist (the sum of the heads' ranks), P taps. With tensor
parallelism H and C are those of a rank (R is that of all heads), with context parallelism T is its
piece.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmagrove.config import Model
from kalmagrove.nn.attention import ada_kernels
from kalmagrove.nn.attention.key_kernel import build_taps, convolve
from kalmagrove.nn.backends import resolve_attention
from kalmagrove.nn.norm import RMSNorm, upcast
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove.parallel import (
    ContextParallel,
    Groups,
    Linear,
    Shard,
    TensorParallel,
    all_gather,
    gather,
    parameter,
)
from kalmagrove_kernels.ada import (
    chunked,
    end_state,
    entering_state,
    from_state,
    quadratic,
    recurrent,
)


@dataclass
class ADACache:
    """All that decoding needs of the past; its size does not depend on the number of tokens."""

    state: Tensor  # [B, H, R, V], fp32
    tail: Tensor  # [B, P - 1, C]: the last P - 1 keys, before the convolution
    tokens: int = 0
    taps: Tensor | None = None  # [C, P], computed once: weights are fixed while decoding

    def follow(self, keys_BTC: Tensor) -> Tensor:
        """The tail before these keys; from here on the cache holds the one after them."""
        before = self.tail
        past = torch.cat([before, keys_BTC.to(before.dtype)], dim=1)
        self.tail = past[:, past.shape[1] - before.shape[1] :]
        return before


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

    With context parallelism a rank attends within its piece. From the rank before it gets the keys
    that the convolution reaches, from all ranks the states that their pieces end in.
    """

    def __init__(self, model: Model, layer: int, groups: Groups) -> None:
        super().__init__()
        config = model.attention.ada
        self.config = config
        self.backend = "reference"  # the forms other than auto are the reference's
        if config.form == "auto":
            self.backend = resolve_attention(model.backend, groups.device)
        self.tp, self.cp = TensorParallel.of(groups), ContextParallel.of(groups)
        self.head_dim = config.head_dim or model.d_model // config.heads
        self.scale = self.head_dim**-0.5
        self.norm_eps = model.norm_eps
        self.own_heads = self.tp.piece(config.heads)
        self.heads = self.own_heads.length
        all_ranks = self._head_ranks(model, layer)
        self.width = max(all_ranks)
        first = self.own_heads.start
        self.ranks = all_ranks[first : first + self.heads]
        channels = self._channels(all_ranks)
        inner = config.heads * self.head_dim
        values = self.tp.piece(inner)
        self.w_q = Linear(model.d_model, channels.whole, channels)
        self.w_k = Linear(model.d_model, channels.whole, channels)
        self.w_v = Linear(model.d_model, inner, values)
        self.w_g = Linear(model.d_model, inner, values) if config.output_gate else None
        self.w_o = Linear(inner, model.d_model, self.tp.piece(inner, dim=1))
        self.kernel = build_taps(config.kernel, channels, config.taps, config.ode_hidden, self.tp)
        self.output_norm: RMSNorm | None = None
        if config.output_norm:
            self.output_norm = RMSNorm(self.head_dim, model.norm_eps, self.tp.shared)
        self.log_rate_H: nn.Parameter | None = None
        if config.decay == "learned":
            self.log_rate_H = parameter(config.heads, kind="kernel", shard=self.own_heads)
        self.rank_H: Tensor | None
        self.slot_S: Tensor | None
        padded = min(self.ranks) < self.width
        self.register_buffer("rank_H", torch.tensor(self.ranks) if padded else None, False)
        self.register_buffer("slot_S", self._slots() if padded else None, False)
        self.metrics: dict[str, Tensor] = {}

    def init_weights(self, std: float, out_std: float) -> None:
        """Normal(0, std) projections, Normal(0, out_std) for the one into the residual stream.

        Decays start at the time constants of `decay_range`, the key kernel near the identity.
        """
        for linear in (self.w_q, self.w_k, self.w_v, self.w_g):
            if linear is not None:
                linear.init_weights(std)
        self.w_o.init_weights(out_std)
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
        assert self.tp.group.size == self.cp.group.size == 1
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
        x_BTD = self.tp.enter(x_BTD)
        if self.backend != "reference":
            return self.tp.leave(self.w_o(ada_kernels.forward(self, x_BTD, segments_BT, cache)))
        q_BTHR = self._heads(self.w_q(x_BTD))
        k_BTHR = self._heads(self._convolved(self.w_k(x_BTD), segments_BT, cache))
        if self.config.qk_norm:
            q_BTHR, k_BTHR = self._normalise(q_BTHR), self._normalise(k_BTHR)
        if self.config.rope:
            tokens = x_BTD.shape[1]
            start = cache.tokens if cache is not None else self.cp.start(tokens)
            angles = rotary_angles(
                start, tokens, self.width, self.config.rope_theta, x_BTD.device, self.rank_H
            )
            q_BTHR, k_BTHR = rotate(q_BTHR, angles), rotate(k_BTHR, angles)
        v_BTHV = upcast(self.w_v(x_BTD).unflatten(-1, (self.heads, self.head_dim)))
        out_BTHV = self._attend(q_BTHR, k_BTHR, v_BTHV, segments_BT, cache)
        if self.output_norm is not None:
            out_BTHV = self.output_norm(out_BTHV)
        out_BTV = out_BTHV.flatten(2).to(x_BTD.dtype)
        if self.w_g is not None:
            out_BTV = out_BTV * F.silu(self.w_g(x_BTD))
        return self.tp.leave(self.w_o(out_BTV))

    def _attend(
        self,
        q_BTHR: Tensor,
        k_BTHR: Tensor,
        v_BTHV: Tensor,
        segments_BT: Tensor | None,
        cache: ADACache | None,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHR, k_BTHR, v_BTHV))
        log_decay = self.log_decay(q.device)
        if cache is not None:
            out, state = self._continue(q, k, v, log_decay, cache.state)
            cache.state, cache.tokens = state, cache.tokens + q.shape[2]
            return out.transpose(1, 2)
        out, end = self._within(q, k, v, log_decay, segments_BT)
        if end is not None:
            out = out + self._from_before(q, end, log_decay, segments_BT)
        return out.transpose(1, 2)

    def _within(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, segments_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs of these tokens alone, and if other ranks need it the state after them."""
        form, divided = self.config.form, self.cp.divided
        if form == "auto":
            # Measured on a CPU core: up to two chunks, all scores at once are quicker; then chunks
            # are.
            form = "quadratic" if q.shape[2] <= 2 * self.config.chunk else "chunked"
        if form == "chunked":
            return chunked(
                q, k, v,
                scale=self.scale, log_decay_H=log_decay, segments_BT=segments_BT,
                chunk=self.config.chunk, return_state=divided,
            )  # fmt: skip
        if form == "recurrent":
            out, end = recurrent(
                q, k, v, scale=self.scale, log_decay_H=log_decay, segments_BT=segments_BT
            )
            return out, end if divided else None
        out = quadratic(q, k, v, scale=self.scale, log_decay_H=log_decay, segments_BT=segments_BT)
        if not divided:
            return out, None
        return out, end_state(k, v, log_decay_H=log_decay, segments_BT=segments_BT)

    def _from_before(
        self, q: Tensor, end_BHRV: Tensor, log_decay: Tensor | None, segments_BT: Tensor | None
    ) -> Tensor:
        """What the tokens of the context-parallel ranks before this one add to the outputs.

        Every rank computes it, also the first, for which it is zero: all take part in the backward
        pass of `gather`.
        """
        state, last_B = self.entering(end_BHRV, q.shape[2], log_decay, segments_BT)
        continues_BT = None
        if segments_BT is not None and last_B is not None:
            continues_BT = segments_BT == last_B[:, None]
        return from_state(
            q, state, scale=self.scale, log_decay_H=log_decay, continues_BT=continues_BT
        )

    def entering(
        self,
        end_BHRV: Tensor,
        tokens: int,
        log_decay: Tensor | None,
        segments_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The state that the context-parallel ranks before this one leave, and its segment.

        end_BHRV: what this rank's `tokens` end in by themselves.
        """
        group = self.cp.group
        ends_BHNRV = gather(end_BHRV.unsqueeze(2), group, 2)
        last_BN = None if segments_BT is None else all_gather(segments_BT[:, -1:], group, 1)
        state = entering_state(
            ends_BHNRV, group.rank, tokens, log_decay_H=log_decay, last_segments_BN=last_BN
        )
        return state, None if last_BN is None else last_BN[:, max(group.rank - 1, 0)]

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
        taps = self.taps_of(cache)
        if taps is not None:
            tail: Tensor | None
            if cache is not None:
                tail = cache.follow(keys_BTC)
            else:
                tail, segments_BT = self.halo(keys_BTC, segments_BT)
            keys_BTC = convolve(keys_BTC, taps, segments_BT, tail)
        return F.silu(keys_BTC) if self.config.kernel_activation == "silu" else keys_BTC

    def taps_of(self, cache: ADACache | None) -> Tensor | None:
        """The taps of the key kernel, if there is one; a cache keeps them."""
        if self.kernel is None:
            return None
        if cache is None:
            return self.kernel()
        if cache.taps is None:
            cache.taps = self.kernel()
        return cache.taps

    def halo(
        self, keys_BTC: Tensor, segments_BT: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The keys before these that the convolution reaches, and the segments of all of them.

        With context parallelism they come from the rank before; else there are none.
        """
        if not self.cp.divided:
            return None, segments_BT
        reach = self.config.taps - 1
        tail = self.cp.just_before(keys_BTC, reach)
        if segments_BT is not None:
            segments_BT = torch.cat([self.cp.just_before(segments_BT, reach), segments_BT], dim=1)
        return tail, segments_BT

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

    def log_decay(self, device: torch.device) -> Tensor | None:
        """Logarithm of the decay per token, [H]: minus one over the time constant."""
        if self.config.decay == "none":
            return None
        if self.log_rate_H is None:
            return -self._first_log_rates(device).exp()
        rate_H = upcast(self.log_rate_H).exp()
        self.metrics = {"time_constant": rate_H.detach().reciprocal()}
        return -rate_H

    def _first_log_rates(self, device: torch.device | None) -> Tensor:
        low, high = (math.log(tokens) for tokens in self.config.decay_range)
        return self.own_heads.cut(-torch.linspace(low, high, self.config.heads, device=device))

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

    def _channels(self, all_ranks: tuple[int, ...]) -> Shard:
        """This rank's query/key channels: of its heads, which may have other ranks than others'."""
        first, heads = self.own_heads.start, self.heads
        pieces = [sum(all_ranks[i : i + heads]) for i in range(0, len(all_ranks), heads)]
        start, own = sum(all_ranks[:first]), pieces[first // heads]
        return Shard("tp", 0, start, own, sum(all_ranks), even=len(set(pieces)) == 1)

    def _head_ranks(self, model: Model, layer: int) -> tuple[int, ...]:
        ranks = self.config.qk_rank
        if isinstance(ranks, tuple):
            return ranks[sum(model.attention_kind(i) == "ada" for i in range(layer))]
        return (ranks or self.head_dim,) * self.config.heads

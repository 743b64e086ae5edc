"""The kernel kappa that ADA convolves its keys with (KalmaGrove paper, section 3.2).

`kalmagrove.nn.attention.ada` applies it to the projected keys, before norm and rotation. Both
kinds give [channels, taps] weights of a causal depthwise convolution: `cnn` learns them freely,
`ode` reads them off the trajectory of a neural ODE.

Legend: B batch, T tokens, C channels (all key channels of the heads that a tensor-parallel rank
holds), P taps.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalmagrove.nn.norm import upcast
from kalmagrove.parallel import Shard, TensorParallel, normal_, parameter


class CNNTaps(nn.Module):
    """Free taps. They start as the identity: tap 0 (the token itself) is 1, the others are 0.

    channels: those of this rank among all.
    """

    def __init__(self, channels: Shard, taps: int) -> None:
        super().__init__()
        self.taps_CP = parameter(channels.whole, taps, kind="kernel", shard=channels)

    def init_weights(self) -> None:
        with torch.no_grad():
            self.taps_CP.zero_()[:, 0] = 1.0

    def forward(self) -> Tensor:
        """The taps, [C, P]."""
        return upcast(self.taps_CP)


class ODETaps(nn.Module):
    """Taps h(0), h(1), ..., h(P - 1) of a neural ODE over all channels (torchdiffeq).

        dh/dt = -rate * h + W_out tanh(W_in h + w_time t / P + b),   h(0) = start

    The linear part is a diffusion with a rate per channel, the hidden layer couples the channels.
    It starts with start = 1, rate = 3 and W_out = 0: h(t) = exp(-3 t), near the identity and
    decaying. Rates are kept in (0, 8) by a sigmoid, where Runge-Kutta 4 with 4 steps a token is
    stable; a fixed step needs no step-size search, so the cost is the same at every forward.

    As the channels are coupled, every tensor-parallel rank holds all parameters and solves for all
    channels (C below), whereof it keeps its own.
    """

    RATE_LIMIT, RATE_START, STEP = 8.0, 3.0, 0.25

    def __init__(self, channels: Shard, taps: int, hidden: int, tp: TensorParallel) -> None:
        super().__init__()
        self.channels, self.taps, self.tp = channels, taps, tp
        self.start_C = parameter(channels.whole, kind="kernel")
        self.rate_C = parameter(channels.whole, kind="kernel")
        self.w_in_HC = parameter(hidden, channels.whole, kind="kernel")
        self.w_out_CH = parameter(channels.whole, hidden, kind="kernel")
        self.w_time_H = parameter(hidden, kind="kernel")
        self.bias_H = parameter(hidden, kind="kernel")

    def init_weights(self) -> None:
        fraction = self.RATE_START / self.RATE_LIMIT
        nn.init.ones_(self.start_C)
        nn.init.constant_(self.rate_C, math.log(fraction / (1 - fraction)))
        normal_(self.w_in_HC, self.w_in_HC.shape[1] ** -0.5)
        nn.init.zeros_(self.w_out_CH)
        normal_(self.w_time_H, 1.0)
        nn.init.zeros_(self.bias_H)

    @torch.compiler.disable
    def forward(self) -> Tensor:
        """The taps of this rank's channels."""
        return self.channels.cut(self.tp.shared(self._all_taps()))

    def _all_taps(self) -> Tensor:
        """[C, P]."""
        from torchdiffeq import odeint

        start, w_in, w_out, w_time, bias = (
            upcast(p)
            for p in (self.start_C, self.w_in_HC, self.w_out_CH, self.w_time_H, self.bias_H)
        )
        rate = self.RATE_LIMIT * torch.sigmoid(upcast(self.rate_C))

        def slope(time: Tensor, h_C: Tensor) -> Tensor:
            hidden = torch.tanh(w_in @ h_C + w_time * (time / self.taps) + bias)
            return w_out @ hidden - rate * h_C

        if self.taps == 1:
            return start[:, None]
        times = torch.arange(self.taps, dtype=start.dtype, device=start.device)
        path = odeint(slope, start, times, method="rk4", options={"step_size": self.STEP})
        return path.mT


def build_taps(
    kernel: Literal["cnn", "ode", "none"],
    channels: Shard,
    taps: int,
    ode_hidden: int,
    tp: TensorParallel,
) -> CNNTaps | ODETaps | None:
    """The module that yields the taps of this rank's channels, or None for `none`."""
    if kernel == "cnn":
        return CNNTaps(channels, taps)
    return ODETaps(channels, taps, ode_hidden, tp) if kernel == "ode" else None


def convolve(
    keys_BTC: Tensor,
    taps_CP: Tensor,
    segments_BT: Tensor | None = None,
    tail_BPC: Tensor | None = None,
) -> Tensor:
    """y_t = sum_p taps[:, p] * keys_{t-p}, causal, not across segments; [B, T, C] in and out.

    `tail_BPC` holds the P - 1 keys before the first token (None: zeros). With it, `segments_BT` has
    the segments of these keys before those of the tokens.
    """
    keys, taps = upcast(keys_BTC), taps_CP.unbind(dim=1)
    tokens, before = keys.shape[1], len(taps) - 1
    if tail_BPC is not None:
        padded = torch.cat([tail_BPC.to(keys.dtype), keys], dim=1)
    else:
        padded = F.pad(keys, (0, 0, before, 0))
        if segments_BT is not None:  # of whatever segment the zeros are, they add nothing
            segments_BT = F.pad(segments_BT, (before, 0))
    out = keys * taps[0]
    for lag in range(1, len(taps)):
        reached = slice(before - lag, before - lag + tokens)
        shifted = padded[:, reached]
        if segments_BT is not None:
            same = segments_BT[:, before:] == segments_BT[:, reached]
            shifted = shifted.masked_fill(~same.unsqueeze(-1), 0.0)
        out = out + shifted * taps[lag]
    return out.to(keys_BTC.dtype)

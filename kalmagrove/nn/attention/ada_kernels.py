"""The ADA layer on Triton's kernels: the same function as `ADA.forward`, in a few launches.

`kalmagrove.nn.attention.ada` calls `forward` where `model.backend` chose kernels. Queries and keys
stay in the type of the projections; states are fp32.
Letters as in `ada`.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kalmagrove.nn.rope import rotary_angles
from kalmagrove_kernels.ada import (
    attention,
    decode_step,
    final_state,
    norm_gate,
    prepare,
)

if TYPE_CHECKING:
    from kalmagrove.nn.attention.ada import ADA, ADACache

KERNELS = "triton"  # of all but `prepare`, which has a form in CUDA C++ too


def forward(
    layer: "ADA", x_BTD: Tensor, segments_BT: Tensor | None, cache: "ADACache | None"
) -> Tensor:
    """From the stream that entered to heads side by side, [B, T, H * V], before the projection."""
    q_BTC, k_BTC, v_BTN = layer.w_q(x_BTD), layer.w_k(x_BTD), layer.w_v(x_BTD)
    v_BTHV = v_BTN.unflatten(-1, (layer.heads, layer.head_dim))
    if cache is not None:
        attend = _one_token if x_BTD.shape[1] == 1 and not torch.is_grad_enabled() else _continued
        out_BTHV = attend(layer, q_BTC, k_BTC, v_BTHV, cache)
        cache.tokens += x_BTD.shape[1]
    else:
        out_BTHV = _whole(layer, q_BTC, k_BTC, v_BTHV, segments_BT)
    gate = weight = None
    if layer.w_g is not None:
        gate = layer.w_g(x_BTD).unflatten(-1, (layer.heads, layer.head_dim))
    eps = layer.norm_eps
    if (norm := layer.output_norm) is not None:
        weight = norm.weight if norm.through is None else norm.through(norm.weight)
    return norm_gate(out_BTHV, gate, weight, eps=eps, backend=KERNELS).flatten(2)


def _whole(
    layer: "ADA", q_BTC: Tensor, k_BTC: Tensor, v_BTHV: Tensor, segments_BT: Tensor | None
) -> Tensor:
    """Rows from their start; with context parallelism a piece, behind what comes before it."""
    cp, taps = layer.cp, layer.taps_of(None)
    tail, reaching = None, segments_BT
    if taps is not None:
        tail, reaching = layer.halo(k_BTC, segments_BT)
    q_BTHR, k_BTHR = _ready(layer, q_BTC, k_BTC, taps, tail, reaching, cp.start(q_BTC.shape[1]))
    log_decay = layer.log_decay(q_BTC.device)
    state = last_B = None
    if cp.divided:
        end = final_state(
            k_BTHR, v_BTHV, log_decay_H=log_decay, segments_BT=segments_BT, backend=KERNELS
        )
        state, last_B = layer.entering(end, k_BTHR.shape[1], log_decay, segments_BT)
    out_BTHV, _ = attention(
        q_BTHR, k_BTHR, v_BTHV,
        scale=layer.scale, log_decay_H=log_decay, segments_BT=segments_BT,
        state_BHRV=state, state_segment_B=last_B, backend=KERNELS,
    )  # fmt: skip
    return out_BTHV


def _continued(
    layer: "ADA", q_BTC: Tensor, k_BTC: Tensor, v_BTHV: Tensor, cache: "ADACache"
) -> Tensor:
    """The next tokens of what the cache holds, which is advanced."""
    taps = layer.taps_of(cache)
    tail = None if taps is None else cache.follow(k_BTC)
    q_BTHR, k_BTHR = _ready(layer, q_BTC, k_BTC, taps, tail, None, cache.tokens)
    out_BTHV, state = attention(
        q_BTHR, k_BTHR, v_BTHV,
        scale=layer.scale, log_decay_H=layer.log_decay(q_BTC.device),
        state_BHRV=cache.state, return_state=True, backend=KERNELS,
    )  # fmt: skip
    assert state is not None
    cache.state = state
    return out_BTHV


def _one_token(
    layer: "ADA", q_BTC: Tensor, k_BTC: Tensor, v_BTHV: Tensor, cache: "ADACache"
) -> Tensor:
    """The next token of what the cache holds, which is advanced in place."""
    config = layer.config
    out_BHV = decode_step(
        q_BTC[:, 0], k_BTC[:, 0], v_BTHV[:, 0], cache.state, cache.tail,
        heads=layer.heads, width=layer.width, scale=layer.scale,
        log_decay_H=layer.log_decay(q_BTC.device), taps_CP=layer.taps_of(cache),
        silu=config.kernel_activation == "silu",
        norm_eps=layer.norm_eps if config.qk_norm else None,
        rope_theta=config.rope_theta if config.rope else None,
        position=torch.full((1,), cache.tokens, device=q_BTC.device),
        slot_S=layer.slot_S, rank_H=layer.rank_H, backend=KERNELS,
    )  # fmt: skip
    return out_BHV.unsqueeze(1)


def _ready(
    layer: "ADA",
    q_BTC: Tensor,
    k_BTC: Tensor,
    taps_CP: Tensor | None,
    tail_BPC: Tensor | None,
    segments_BT: Tensor | None,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Queries and keys after the steps of `prepare`; the first token has position `start`."""
    config, angles = layer.config, None
    if config.rope:
        angles = rotary_angles(
            start, q_BTC.shape[1], layer.width, config.rope_theta, q_BTC.device, layer.rank_H
        )
    both = partial(
        prepare,
        heads=layer.heads,
        width=layer.width,
        norm_eps=layer.norm_eps if config.qk_norm else None,
        angles_THr=angles,
        slot_S=layer.slot_S,
        rank_H=layer.rank_H,
        backend=layer.backend,
    )
    k_BTHR = both(
        k_BTC,
        taps_CP=taps_CP,
        tail_BPC=tail_BPC,
        segments_BT=segments_BT if taps_CP is not None else None,
        silu=config.kernel_activation == "silu",
    )
    return both(q_BTC), k_BTHR

"""One token of ADA decoding: from the projected queries, keys and values to the heads' outputs.

For generation with a cache; `decode_step` of the backend "reference" is the specification. All
else of a layer is linear maps and `kalmagrove_kernels.ada.epilogue`.
Letters: B batch, H heads, R width of the widest query/key head, V value width, C key channels that
exist, P taps, S = H * R padded entries, r = R / 2 rotary pairs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kalmagrove_kernels.ada.backends import module_of
from kalmagrove_kernels.ada.prepare import prepare_reference
from kalmagrove_kernels.ada.reference import recurrent, upcast
from kalmagrove_kernels.ada.steps import Steps


def decode_step(
    q_BC: Tensor,
    k_BC: Tensor,
    v_BHV: Tensor,
    state_BHRV: Tensor,
    tail_BPC: Tensor,
    *,
    heads: int,
    width: int,
    scale: float,
    log_decay_H: Tensor | None = None,
    taps_CP: Tensor | None = None,
    silu: bool = False,
    norm_eps: float | None = None,
    rope_theta: float | None = None,
    position: Tensor,
    slot_S: Tensor | None = None,
    rank_H: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """o [B, H, V] in the dtype of v; `state_BHRV` and `tail_BPC` are advanced in place.

    Convolve the key with the taps, SiLU, arrange into heads, RMS-normalise q and k per head,
    rotate, S = exp(log_decay) S + k v^T, o = scale * q S: fp32 throughout. Not differentiable.

    Args:
        q_BC, k_BC: the projections, fp32, bf16 or fp16 (the reference: fp64 too).
        v_BHV: any strides.
        state_BHRV: contiguous fp32 (fp64 with fp64 inputs).
        tail_BPC: the last P - 1 keys before the convolution, oldest first, [B, P - 1, C]. Unused
            without taps.
        heads, width: H and R.
        log_decay_H: logarithm of the decay per token, at most 0; None: no decay.
        taps_CP: tap p weights the key of p tokens ago; None: no convolution.
        silu: whether SiLU follows the convolution.
        norm_eps: None: no normalisation.
        rope_theta: None: no rotation. Pair (i, R/2 + i) turns by position * theta^(-2i / width).
        position: int64, one or [B], on the device: a CUDA graph replays as it advances.
        slot_S: the channel that each padded entry shows, C for none; every channel is shown once.
            None: C = S and the entries are the channels.
        rank_H: entries of each head that exist, int64; None: R.
        backend: one of `backends.BACKENDS`.
    Raises:
        KeyError: there is no such backend.
        RuntimeError: the backend is "triton" and Triton is not installed.
        ValueError: shapes do not fit, or the state is not contiguous.
        TypeError: "triton" takes bf16, fp16 and fp32 alone, and a state in fp32.
    """
    _check(q_BC, k_BC, v_BHV, state_BHRV, tail_BPC, heads, width, taps_CP, slot_S, position)
    if rope_theta is not None and width % 2:
        raise ValueError(f"width={width} must be even to be rotated (rope_theta={rope_theta})")
    function = _decode_step if backend == "reference" else partial(_kernel, backend)
    return function(
        q_BC,
        k_BC,
        v_BHV,
        state_BHRV,
        tail_BPC,
        heads=heads,
        width=width,
        scale=scale,
        log_decay_H=log_decay_H,
        taps_CP=taps_CP,
        silu=silu,
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        position=position,
        slot_S=slot_S,
        rank_H=rank_H,
    )


@torch.no_grad()
def _decode_step(
    q_BC: Tensor,
    k_BC: Tensor,
    v_BHV: Tensor,
    state_BHRV: Tensor,
    tail_BPC: Tensor,
    *,
    heads: int,
    width: int,
    scale: float,
    log_decay_H: Tensor | None,
    taps_CP: Tensor | None,
    silu: bool,
    norm_eps: float | None,
    rope_theta: float | None,
    position: Tensor,
    slot_S: Tensor | None,
    rank_H: Tensor | None,
) -> Tensor:
    key_B1C = upcast(k_BC)[:, None]
    window_BPC = key_B1C
    if taps_CP is not None:
        window_BPC = torch.cat([tail_BPC.to(key_B1C.dtype), key_B1C], dim=1)
        tail_BPC.copy_(window_BPC[:, 1:])
    angles = None if rope_theta is None else _angles(position, rope_theta, width, rank_H)
    steps = Steps(heads, width, silu, norm_eps, angles, None, slot_S, rank_H)
    k = prepare_reference(window_BPC, taps_CP, steps)[:, -1]
    q = prepare_reference(upcast(q_BC)[:, None], None, steps._replace(silu=False))[:, -1]
    o, state = recurrent(
        q.unsqueeze(2),
        k.unsqueeze(2),
        v_BHV.unsqueeze(2),
        scale=scale,
        log_decay_H=log_decay_H,
        state_BHRV=state_BHRV,
    )
    state_BHRV.copy_(state)
    return o.squeeze(2)


def _angles(position: Tensor, theta: float, width: int, rank_H: Tensor | None) -> Tensor:
    """fp32 [1 or B, 1, 1 or H, r]; fp32 also with fp64 inputs, as in training."""
    pairs = torch.arange(width // 2, dtype=torch.float32, device=position.device)
    widths = torch.full_like(position.view(-1)[:1], width) if rank_H is None else rank_H
    frequencies = theta ** (-2.0 * pairs / widths.float()[:, None])
    return position.float().view(-1, 1, 1, 1) * frequencies


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    tail: Tensor,
    heads: int,
    width: int,
    taps: Tensor | None,
    slot: Tensor | None,
    position: Tensor,
) -> None:
    batch, channels = k.shape
    expected = {
        "q_BC": (q, (batch, channels if slot is not None else heads * width)),
        "v_BHV": (v, (batch, heads, v.shape[-1])),
        "state_BHRV": (state, (batch, heads, width, v.shape[-1])),
    }
    if taps is not None:
        expected["taps_CP"] = taps, (channels, taps.shape[1])
        expected["tail_BPC"] = tail, (batch, taps.shape[1] - 1, channels)
    if slot is not None:
        expected["slot_S"] = slot, (heads * width,)
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape} beside k_BC")
    if q.shape != k.shape:
        raise ValueError(f"k_BC {tuple(k.shape)} must be as q_BC {tuple(q.shape)}")
    if position.numel() not in (1, batch):
        raise ValueError(f"position {tuple(position.shape)} must have one element or B={batch}")
    if not state.is_contiguous():
        raise ValueError("state_BHRV must be contiguous: it is advanced in place")


@torch.compiler.disable  # launches that torch.compile cannot trace
def _kernel(backend: str, *tensors: Tensor, **options: Any) -> Tensor:
    o_BHV: Tensor = module_of("decode", backend).decode_step(*tensors, **options)
    return o_BHV

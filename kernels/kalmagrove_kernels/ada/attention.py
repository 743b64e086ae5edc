"""The attention op: causal linear attention with one constant decay per head, of whole rows.

    o_t = scale * (sum_{s <= t} decay^(t - s) [same document] (q_t . k_s) v_s + decay^(t + 1) q_t S)

S is the state before the first token. Called by `kalmagrove.nn.attention.ada`; `reference` has the
specification and its forms, here they are put together as the op's backends compute them.
Letters: B batch, T tokens, H heads, R width of queries and keys, V of values.
"""

import importlib.util

import torch
from torch import Tensor

from kalmagrove_kernels.ada import reference
from kalmagrove_kernels.ada.backends import BACKENDS
from kalmagrove_kernels.ada.pieces import from_state


def attention(
    q_BTHR: Tensor,
    k_BTHR: Tensor,
    v_BTHV: Tensor,
    *,
    scale: float,
    log_decay_H: Tensor | None = None,
    segments_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_BHRV: Tensor | None = None,
    state_segment_B: Tensor | None = None,
    return_state: bool = False,
    backend: str = "reference",
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, T, H, V] in the dtype of v, and the state after the last token if asked for.

    Differentiable in q, k, v, log_decay and the state, also through the state returned.

    Args:
        q_BTHR, k_BTHR, v_BTHV: bf16, fp16 or fp32 (the reference: fp64 too), widths up to 256.
            Triton multiplies bf16 and fp16 as they are and fp32 as TF32, or exactly with
            torch.set_float32_matmul_precision("highest"); states are fp32.
        scale: multiplies the scores, not zero; 1 / sqrt(d) in the paper (KalmaGrove, section 3.2).
        log_decay_H: logarithm of the decay per token, in [-inf, 0]; None: no decay.
        segments_BT: document of every token, non-decreasing along T; None: one document.
        cu_seqlens: the same for B = 1 as flash-attention has it: [documents + 1] token counts, from
            0 up to T.
        state_BHRV: the state before the first token, fp32; None: zero.
        state_segment_B: the document that the state belongs to; None: the first token's.
        return_state: the state after the last token, fp32 [B, H, R, V], holds its document alone.
        backend: one of `BACKENDS`.
    Raises:
        KeyError: there is no such backend.
        RuntimeError: the backend is "triton" and Triton is not installed.
        ValueError: no tokens, a width above 256 with Triton, or documents given in two ways.
    """
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    if q_BTHR.shape[1] == 0:
        raise ValueError("attention needs at least one token")
    if cu_seqlens is not None:
        if segments_BT is not None or q_BTHR.shape[0] != 1:
            raise ValueError("cu_seqlens needs a batch of 1 and excludes segments_BT")
        segments_BT = _segments(cu_seqlens, q_BTHR.shape[1])
    form = _reference if backend == "reference" else _triton
    return form(
        q_BTHR, k_BTHR, v_BTHV, scale, log_decay_H,
        segments_BT, state_BHRV, state_segment_B, return_state,
    )  # fmt: skip


def final_state(
    k_BTHR: Tensor,
    v_BTHV: Tensor,
    *,
    log_decay_H: Tensor | None = None,
    segments_BT: Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """The state after the last token, from zero before the first: fp32 [B, H, R, V].

    What a piece of a row hands on, as in `pieces`; arguments and errors as of `attention`.
    """
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    if backend == "reference":
        return reference.end_state(
            k_BTHR.transpose(1, 2), v_BTHV.transpose(1, 2),
            log_decay_H=log_decay_H, segments_BT=segments_BT,
        )  # fmt: skip
    return _final_state_triton(k_BTHR, v_BTHV, log_decay_H, segments_BT)


def _segments(cu_seqlens: Tensor, tokens: int) -> Tensor:
    position = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(position.dtype), position, right=True)[None]


def _reference(
    q_BTHR: Tensor,
    k_BTHR: Tensor,
    v_BTHV: Tensor,
    scale: float,
    log_decay_H: Tensor | None,
    segments_BT: Tensor | None,
    state_BHRV: Tensor | None,
    state_segment_B: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHR, k_BTHR, v_BTHV))
    out, _ = reference.chunked(
        q, k, v, scale=scale, log_decay_H=log_decay_H, segments_BT=segments_BT
    )
    continues_BT = None
    if segments_BT is not None:
        first_B = segments_BT[:, 0] if state_segment_B is None else state_segment_B
        continues_BT = segments_BT == first_B[:, None]
    if state_BHRV is not None:
        before = from_state(
            q, state_BHRV, scale=scale, log_decay_H=log_decay_H, continues_BT=continues_BT
        )
        out = (out + before).to(v.dtype)
    end = None
    if return_state:
        end = reference.end_state(k, v, log_decay_H=log_decay_H, segments_BT=segments_BT)
        if state_BHRV is not None:
            all_tokens = torch.full((1,), q.shape[2], device=q.device)
            kept = state_BHRV * reference.decay_after(all_tokens, log_decay_H, end)[:, :, None]
            if continues_BT is not None:
                kept = kept.masked_fill(~continues_BT[:, -1, None, None, None], 0.0)
            end = end + kept
    return out.transpose(1, 2), end


@torch.compiler.disable  # launches that torch.compile cannot trace
def _triton(
    q_BTHR: Tensor,
    k_BTHR: Tensor,
    v_BTHV: Tensor,
    scale: float,
    log_decay_H: Tensor | None,
    segments_BT: Tensor | None,
    state_BHRV: Tensor | None,
    state_segment_B: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    _refuse(q_BTHR, v_BTHV)
    from kalmagrove_kernels.ada import triton

    return triton.attention(
        q_BTHR, k_BTHR, v_BTHV,
        scale=scale, log_decay_H=log_decay_H, segments_BT=segments_BT,
        state_BHRV=state_BHRV, state_segment_B=state_segment_B, return_state=return_state,
    )  # fmt: skip


@torch.compiler.disable
def _final_state_triton(
    k_BTHR: Tensor, v_BTHV: Tensor, log_decay_H: Tensor | None, segments_BT: Tensor | None
) -> Tensor:
    _refuse(k_BTHR, v_BTHV)
    from kalmagrove_kernels.ada import triton

    return triton.final_state(k_BTHR, v_BTHV, log_decay_H=log_decay_H, segments_BT=segments_BT)


def _refuse(q_BTHR: Tensor, v_BTHV: Tensor) -> None:
    """What the Triton kernels cannot do."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend='triton' needs the package triton: install kalmagrove[gpu]")
    widest = max(q_BTHR.shape[-1], v_BTHV.shape[-1])
    if widest > 256:
        raise ValueError(f"heads of width {widest}: backend='triton' takes widths up to 256")

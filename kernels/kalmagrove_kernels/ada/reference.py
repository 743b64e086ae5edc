"""The specification of decayed causal linear attention, in three forms that compute one function.

Every faster implementation is tested against these pure functions; the attention layer uses them
where no faster one exists.

    o_t = scale * sum_{s <= t} exp(log_decay_h (t - s)) [segment_s == segment_t] (q_t . k_s) v_s

Legend: B batch, H heads, T tokens, R query/key width, V value width, N chunks, C tokens of a chunk.

Arguments common to all forms:
    q_BHTR, k_BHTR, v_BHTV: any floating type; computed in fp32 (fp64 stays), returned in v's type.
    scale: multiplies the scores; 1/sqrt(d) in the paper (KalmaGrove, section 3.2).
    log_decay_H: logarithm of the decay per token, in [-inf, 0]; None is no decay (0).
    segments_BT: document number of every token, non-decreasing along T; None is one document.

Only exponentials of numbers <= 0 are taken, so nothing overflows at any decay.
"""

import torch
from torch import Tensor

# exp of this is exactly 0 in fp32 and fp64; stands in for log(0), whose product with 0 would be
# NaN.
_LOG_ZERO = -1e4


def quadratic(
    q_BHTR: Tensor,
    k_BHTR: Tensor,
    v_BHTV: Tensor,
    *,
    scale: float,
    log_decay_H: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """The formula as it stands, with the [T, T] matrix of scores. Returns [B, H, T, V]."""
    q, k, v = upcast(q_BHTR) * scale, upcast(k_BHTR), upcast(v_BHTV)
    tokens = q.shape[2]
    scores = q @ k.mT * _decay_mask(log_decay_H, tokens, like=q)
    if segments_BT is not None:
        same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
        scores = scores.masked_fill(~same, 0.0)
    return (scores @ v).to(v_BHTV.dtype)


def recurrent(
    q_BHTR: Tensor,
    k_BHTR: Tensor,
    v_BHTV: Tensor,
    *,
    scale: float,
    log_decay_H: Tensor | None = None,
    segments_BT: Tensor | None = None,
    state_BHRV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token: S_t = exp(log_decay) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

    `state_BHRV` is the state after the tokens before these (None: zero). Returns the outputs
    [B, H, T, V] and the state after the last token (fp32). Raises ValueError for segments with a
    state.
    """
    _refuse_segments_with_state(segments_BT, state_BHRV)
    q, k, v = upcast(q_BHTR) * scale, upcast(k_BHTR), upcast(v_BHTV)
    batch, heads, tokens, width = q.shape
    decay = None if log_decay_H is None else _log_decay(log_decay_H, q).exp()[:, None, None]
    state = state_BHRV
    outputs = []
    for t in range(tokens):
        update = k[:, :, t, :, None] * v[:, :, t, None, :]
        if state is None:
            state = update
        else:
            kept = state if decay is None else state * decay
            if segments_BT is not None:
                border = segments_BT[:, t] != segments_BT[:, t - 1]
                kept = kept.masked_fill(border[:, None, None, None], 0.0)
            state = kept + update
        outputs.append(q[:, :, t, None, :] @ state)
    if state is None or not outputs:
        raise ValueError("recurrent attention needs at least one token")
    assert state.shape == (batch, heads, width, v.shape[-1])
    return torch.cat(outputs, dim=2).to(v_BHTV.dtype), state


def chunked(
    q_BHTR: Tensor,
    k_BHTR: Tensor,
    v_BHTV: Tensor,
    *,
    scale: float,
    log_decay_H: Tensor | None = None,
    segments_BT: Tensor | None = None,
    state_BHRV: Tensor | None = None,
    chunk: int = 64,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Quadratic inside chunks of `chunk` tokens, a state per chunk between them.

    The states of all chunks are combined by one [N, N] decay matrix instead of a loop over chunks:
    O(T) work but for these N^2 R V multiplications, which stay small up to N of a few hundred.
    With segments, the state after a chunk holds only the segment of the chunk's last token: as
    segments do not decrease, no later token can need an earlier one.

    `state_BHRV` is the state before the first token (None: zero). Returns the outputs [B, H, T, V]
    and, if `return_state`, the state after the last token (fp32), else None. Raises ValueError for
    segments with a state.
    """
    _refuse_segments_with_state(segments_BT, state_BHRV)
    tokens = q_BHTR.shape[2]
    size = min(chunk, tokens)
    q, k, v = (_split(upcast(x), size) for x in (q_BHTR, k_BHTR, v_BHTV))
    q = q * scale
    count, last = q.shape[2], tokens - (q.shape[2] - 1) * size  # chunks; tokens of the last one
    segments = None if segments_BT is None else _split_segments(segments_BT, size)

    scores = q @ k.mT * _decay_mask(log_decay_H, size, like=q).unsqueeze(-3)
    if segments is not None:
        same = segments[:, None, :, :, None] == segments[:, None, :, None, :]
        scores = scores.masked_fill(~same, 0.0)
    out = scores @ v

    entering = None
    if count > 1 or state_BHRV is not None:
        entering = _entering_states(k, v, log_decay_H, segments, state_BHRV)
        steps = torch.arange(1, size + 1, device=q.device)
        reaching = q * decay_after(steps, log_decay_H, like=q)[:, None, :, None]
        if segments is not None:
            before = segments[:, :-1, -1:]
            first = torch.zeros_like(segments[:, :1], dtype=torch.bool)
            continues = torch.cat([first, segments[:, 1:] == before], dim=1)
            reaching = reaching.masked_fill(~continues[:, None, :, :, None], 0.0)
        out = out + reaching @ entering
    out = out.flatten(2, 3)[:, :, :tokens].to(v_BHTV.dtype)
    if not return_state:
        return out, None
    return out, _final_state(k, v, log_decay_H, segments_BT, segments, entering, last)


def end_state(
    k_BHTR: Tensor,
    v_BHTV: Tensor,
    *,
    log_decay_H: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """The state after the last token, from zero before the first: [B, H, R, V] in fp32.

    With segments it holds that of the last token only, as later tokens can need no other.
    """
    k, v = upcast(k_BHTR), upcast(v_BHTV)
    remaining = torch.arange(k.shape[2] - 1, -1, -1, device=k.device)
    k = k * decay_after(remaining, log_decay_H, like=k)[:, :, None]
    if segments_BT is not None:
        lasting = segments_BT == segments_BT[:, -1:]
        k = k.masked_fill(~lasting[:, None, :, None], 0.0)
    return k.mT @ v


def _entering_states(
    k_BHNCR: Tensor,
    v_BHNCV: Tensor,
    log_decay_H: Tensor | None,
    segments_BNC: Tensor | None,
    state_BHRV: Tensor | None,
) -> Tensor:
    """The state before every chunk, [B, H, N, R, V]."""
    batch, heads, count, size, width = k_BHNCR.shape
    k, v = k_BHNCR[:, :, :-1], v_BHNCV[:, :, :-1]  # no chunk follows the last one
    remaining = torch.arange(size - 1, -1, -1, device=k.device)
    k = k * decay_after(remaining, log_decay_H, like=k)[:, None, :, None]
    if segments_BNC is not None:
        lasting = segments_BNC[:, :-1] == segments_BNC[:, :-1, -1:]
        k = k.masked_fill(~lasting[:, None, :, :, None], 0.0)
    own = k.mT @ v  # what each chunk adds by its end
    first = own.new_zeros(batch, heads, 1, width, v.shape[-1])
    if state_BHRV is not None:
        first = state_BHRV.to(own.dtype).unsqueeze(2)
    own = torch.cat([first, own], dim=2)
    # Before chunk n: what entered with the sequence (index 0) or was added by chunk m - 1, m <= n.
    passing = _decay_mask(log_decay_H, count, like=k, stride=size)
    if segments_BNC is not None:
        ends = torch.cat([segments_BNC[:, :1, 0], segments_BNC[:, :-1, -1]], dim=1)
        same = ends[:, None, :, None] == ends[:, None, None, :]
        passing = passing.masked_fill(~same, 0.0)
    return (passing @ own.flatten(3)).unflatten(3, (width, v.shape[-1]))


def _final_state(
    k_BHNCR: Tensor,
    v_BHNCV: Tensor,
    log_decay_H: Tensor | None,
    segments_BT: Tensor | None,
    segments_BNC: Tensor | None,
    entering_BHNRV: Tensor | None,
    last: int,
) -> Tensor:
    """The state after the last of the `last` real tokens in the last chunk, [B, H, R, V]."""
    k, v = k_BHNCR[:, :, -1, :last], v_BHNCV[:, :, -1, :last]
    segments = None if segments_BNC is None else segments_BNC[:, -1, :last]
    state = end_state(k, v, log_decay_H=log_decay_H, segments_BT=segments)
    if entering_BHNRV is None:
        return state
    whole = torch.full((1,), last, device=k.device)
    carried = entering_BHNRV[:, :, -1] * decay_after(whole, log_decay_H, like=k)[:, :, None]
    if segments_BT is not None and segments_BNC is not None and segments_BNC.shape[1] > 1:
        stays = segments_BNC[:, -2, -1] == segments_BT[:, -1]
        carried = carried.masked_fill(~stays[:, None, None, None], 0.0)
    return state + carried


def decay_after(steps: Tensor, log_decay_H: Tensor | None, like: Tensor) -> Tensor:
    """exp(log_decay * steps) for steps >= 0: [H, *steps.shape], or [1, *] of ones without decay."""
    if log_decay_H is None:
        return torch.ones_like(steps, dtype=like.dtype).unsqueeze(0)
    rate = _log_decay(log_decay_H, like).view(-1, *[1] * steps.ndim)
    return (rate * steps).exp()


def _decay_mask(log_decay_H: Tensor | None, size: int, like: Tensor, stride: int = 1) -> Tensor:
    """[H or 1, size, size]: exp(log_decay * stride * (row - column)) up to the diagonal, else 0."""
    index = torch.arange(size, device=like.device)
    apart = (index[:, None] - index[None, :]) * stride
    return decay_after(apart.clamp(min=0), log_decay_H, like) * (apart >= 0)


def _log_decay(log_decay_H: Tensor, like: Tensor) -> Tensor:
    return log_decay_H.to(like.dtype).clamp(_LOG_ZERO, 0.0)


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _split(x_BHTX: Tensor, size: int) -> Tensor:
    """[B, H, T, X] -> [B, H, N, size, X], zeros after the end."""
    missing = -x_BHTX.shape[2] % size
    return torch.nn.functional.pad(x_BHTX, (0, 0, 0, missing)).unflatten(2, (-1, size))


def _split_segments(segments_BT: Tensor, size: int) -> Tensor:
    """[B, T] -> [B, N, size]; after the end comes the last segment again."""
    missing = -segments_BT.shape[1] % size
    tail = segments_BT[:, -1:].expand(-1, missing)
    return torch.cat([segments_BT, tail], dim=1).unflatten(1, (-1, size))


def _refuse_segments_with_state(segments: Tensor | None, state: Tensor | None) -> None:
    if segments is not None and state is not None:
        raise ValueError("segments and an initial state exclude each other")

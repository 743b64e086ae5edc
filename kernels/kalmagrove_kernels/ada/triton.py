"""Decayed causal linear attention in Triton, with all gradients.

Forward: what every span of a row adds to the state, a scan over spans, then all spans at once.
Backward: the same kernel three times with the roles changed (`triton_attention`). Kept from forward
to backward: q, k, v, and the state before each span.
Letters: B batch, T tokens, H heads, R width of queries and keys, V of values, N spans, G = B * H.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from kalmagrove_kernels.ada.tiles import Tile, span_of, tile_of
from kalmagrove_kernels.ada.triton_attention import attend_kernel, scan_kernel, span_kernel

SCAN_BLOCK = 256  # small: the scan waits for one load after the other


class Setting(NamedTuple):
    """What the launches of one call have in common. Tensors may be None where they do not apply."""

    tokens: int
    heads: int
    rows: int  # batch * heads
    span: int
    scale: float
    log_decay_H: Tensor | None
    segments_BT: Tensor | None
    entering_B: Tensor | None  # the segment of the state before the row
    precision: str

    @property
    def spans(self) -> int:
        return triton.cdiv(self.tokens, self.span)

    def common(self, tile: Tile, bulk: bool) -> dict[str, Any]:
        return {
            "SPAN": self.span,
            "C": tile.chunk,
            "DECAY": self.log_decay_H is not None,
            "SEGMENTS": self.segments_BT is not None,
            "WHOLE": self.tokens % tile.chunk == 0,
            "BULK": bulk,
            "STAGES": tile.stages,
            "PRECISION": self.precision,
            "num_warps": tile.warps,
        }


def attention(
    q_BTHR: Tensor,
    k_BTHR: Tensor,
    v_BTHV: Tensor,
    *,
    scale: float,
    log_decay_H: Tensor | None,
    segments_BT: Tensor | None,
    state_BHRV: Tensor | None,
    state_segment_B: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `kalmagrove_kernels.ada.attention`."""
    if segments_BT is not None:
        segments_BT = segments_BT.to(torch.int32).contiguous()
        if state_segment_B is None:
            state_segment_B = segments_BT[:, 0]
        state_segment_B = state_segment_B.to(torch.int32).contiguous()
    out, end = _Attention.apply(
        q_BTHR, k_BTHR, v_BTHV, log_decay_H, state_BHRV,
        segments_BT, state_segment_B, scale, return_state,
    )  # fmt: skip
    return out, end if return_state else None


def final_state(
    k_BTHR: Tensor,
    v_BTHV: Tensor,
    *,
    log_decay_H: Tensor | None,
    segments_BT: Tensor | None,
) -> Tensor:
    """See `kalmagrove_kernels.ada.final_state`."""
    if segments_BT is not None:
        segments_BT = segments_BT.to(torch.int32).contiguous()
    state_BHRV: Tensor = _EndState.apply(k_BTHR, v_BTHV, log_decay_H, segments_BT)
    return state_BHRV


def setting_of(
    q_BTHR: Tensor,
    scale: float,
    log_decay_H: Tensor | None,
    segments_BT: Tensor | None,
    entering_B: Tensor | None,
) -> Setting:
    batch, tokens, heads, _ = q_BTHR.shape
    exact = torch.get_float32_matmul_precision() == "highest"
    return Setting(
        tokens=tokens,
        heads=heads,
        rows=batch * heads,
        span=span_of(tokens, batch * heads),
        scale=scale,
        log_decay_H=log_decay_H,
        segments_BT=segments_BT,
        entering_B=entering_B,
        precision="ieee" if exact else "tf32",
    )


def states(
    setting: Setting,
    b_BTHE: Tensor,
    c_BTHF: Tensor,
    start_BHEF: Tensor | None,
    *,
    reverse: bool,
    end: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The state that each span begins with, [G, N, E, F], and if `end` the one after the last.

    A single span without a state before it begins with zero, for which the first result is None.
    """
    if setting.spans == 1 and not end:
        return (None if start_BHEF is None else start_BHEF.flatten(0, 1).unsqueeze(1)), None
    width_e, width_f = b_BTHE.shape[-1], c_BTHF.shape[-1]
    tile = tile_of("span", (width_e, width_f), b_BTHE.dtype)
    block_e = min(128, max(16, triton.next_power_of_2(width_e)))
    sums = b_BTHE.new_empty((setting.rows, setting.spans, width_e, width_f), dtype=torch.float32)
    bulk = copied_in_bulk(b_BTHE, c_BTHF, block_e, tile.columns)
    b, c = (
        operand(x, tile.chunk, block, bulk)
        for x, block in ((b_BTHE, block_e), (c_BTHF, tile.columns))
    )
    blocks = triton.cdiv(width_e, block_e) * triton.cdiv(width_f, tile.columns)
    grid: Any = (blocks, setting.spans, setting.rows)
    span_kernel[grid](
        b, c, setting.log_decay_H, setting.segments_BT, setting.entering_B, sums,
        setting.tokens, setting.heads,
        E=width_e, F=width_f, BE=block_e, BF=tile.columns, REVERSE=reverse,
        **setting.common(tile, bulk),
    )  # fmt: skip
    return scan(setting, sums, start_BHEF, reverse=reverse, end=end)


def scan(
    setting: Setting, sums_GNEF: Tensor, start_BHEF: Tensor | None, *, reverse: bool, end: bool
) -> tuple[Tensor, Tensor | None]:
    """From what every span adds to the states as `states` returns them, in place."""
    size = sums_GNEF[0, 0].numel()
    after = torch.empty_like(sums_GNEF[:, 0]) if end else None
    grid: Any = (triton.cdiv(size, SCAN_BLOCK), setting.rows)
    scan_kernel[grid](
        sums_GNEF, start_BHEF, after,
        setting.log_decay_H, setting.segments_BT, setting.entering_B,
        setting.tokens, setting.heads, setting.spans,
        SIZE=size, SPAN=setting.span, BLOCK=SCAN_BLOCK, REVERSE=reverse,
        DECAY=setting.log_decay_H is not None, SEGMENTS=setting.segments_BT is not None,
        START=start_BHEF is not None, END=end, num_warps=2,
    )  # fmt: skip
    return sums_GNEF, None if after is None else after.unflatten(0, (-1, setting.heads))


def attend(
    setting: Setting,
    a_BTHE: Tensor,
    b_BTHE: Tensor,
    c_BTHF: Tensor,
    state: Tensor | None,
    *,
    reverse: bool = False,
    transposed: bool = False,
    scores: bool = True,
    beside_BTHF: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The kernel's result, and with `beside` its row products with it, [G, T].

    transposed: the states are [F, E], not [E, F]. scores: false for what the states add alone; c
    then only tells the result's shape.
    """
    width_e, width_f = a_BTHE.shape[-1], c_BTHF.shape[-1]
    tile = tile_of("attend", (width_e, width_f), a_BTHE.dtype)
    blocks = triton.cdiv(width_f, tile.columns)
    out = torch.empty_like(c_BTHF)
    dots = None
    if beside_BTHF is not None:
        dots = out.new_empty((blocks, setting.rows, setting.tokens), dtype=torch.float32)
    block_e = max(16, triton.next_power_of_2(width_e))
    bulk = copied_in_bulk(a_BTHE, c_BTHF, block_e, tile.columns)
    a, b = (operand(x, tile.chunk, block_e, bulk) for x in (a_BTHE, b_BTHE))
    c, y, beside = (
        None if x is None else operand(x, tile.chunk, tile.columns, bulk)
        for x in (c_BTHF, out, beside_BTHF)
    )
    grid: Any = (blocks, setting.spans, setting.rows)
    attend_kernel[grid](
        a, b, c, state, setting.log_decay_H, setting.segments_BT, setting.entering_B,
        y, beside, dots, setting.tokens, setting.heads, setting.scale,
        *((1, width_e) if transposed else (width_f, 1)),
        E=width_e, F=width_f, BE=block_e, BF=tile.columns,
        REVERSE=reverse, SCORES=scores, STATE=state is not None, DOTS=dots is not None,
        **setting.common(tile, bulk),
    )  # fmt: skip
    return out, None if dots is None else dots.sum(0) if blocks > 1 else dots[0]


def copied_in_bulk(e: Tensor, f: Tensor, block_e: int, block_f: int) -> bool:
    """Whether the copy engine can move tiles: blocks fill the widths, rows are aligned."""
    return (
        e.shape[-1] % block_e == 0
        and f.shape[-1] % block_f == 0
        and all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in (e, f))
        and (e.device.type != "cuda" or torch.cuda.get_device_capability(e.device)[0] >= 9)
    )


def operand(x_BTHX: Tensor, chunk: int, block: int, bulk: bool) -> Any:
    """A tensor as the kernels take it: a descriptor of [1, chunk, block] tiles, or itself."""
    if not bulk:
        return x_BTHX
    flat = x_BTHX.flatten(2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, chunk, block])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHR: Tensor,
        k_BTHR: Tensor,
        v_BTHV: Tensor,
        log_decay_H: Tensor | None,
        state_BHRV: Tensor | None,
        segments_BT: Tensor | None,
        entering_B: Tensor | None,
        scale: float,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (x.contiguous() for x in (q_BTHR, k_BTHR, v_BTHV))
        setting = setting_of(q, scale, log_decay_H, segments_BT, entering_B)
        start = None if state_BHRV is None else state_BHRV.float().contiguous()
        entering, end = states(setting, k, v, start, reverse=False, end=return_state)
        out, _ = attend(setting, q, k, v, entering)
        ctx.save_for_backward(q, k, v, log_decay_H, entering, segments_BT, entering_B)
        ctx.scale, ctx.started = scale, state_BHRV is not None
        ctx.set_materialize_grads(False)
        return out, end

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, do: Tensor | None, dend_BHRV: Tensor | None) -> tuple[Any, ...]:
        q, k, v, log_decay_H, entering, segments_BT, entering_B = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        setting = setting_of(q, ctx.scale, log_decay_H, segments_BT, entering_B)
        want_decay, want_state = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        after = None if dend_BHRV is None else (dend_BHRV.float() / ctx.scale).contiguous()
        leaving, before = states(
            setting, q, do, after, reverse=True, end=want_state or (want_decay and ctx.started)
        )
        dq, q_dots = attend(
            setting, do, v, k, entering, transposed=True,
            beside_BTHF=q if want_decay else None,
        )  # fmt: skip
        dk, k_dots = attend(
            setting, v, do, q, leaving, transposed=True, reverse=True,
            beside_BTHF=k if want_decay else None,
        )  # fmt: skip
        dv, _ = attend(setting, k, q, do, leaving, reverse=True)
        dlog_decay = None
        if q_dots is not None and k_dots is not None:
            dlog_decay = _decay_gradient(setting, q_dots, k_dots, entering, leaving, before)
            dlog_decay = dlog_decay.to(log_decay_H.dtype)
        dstate = before * ctx.scale if before is not None and want_state else None
        return dq, dk, dv, dlog_decay, dstate, None, None, None, None


class _EndState(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k_BTHR: Tensor,
        v_BTHV: Tensor,
        log_decay_H: Tensor | None,
        segments_BT: Tensor | None,
    ) -> Tensor:
        k, v = k_BTHR.contiguous(), v_BTHV.contiguous()
        entering_B = None if segments_BT is None else segments_BT[:, 0].contiguous()
        setting = setting_of(k, 1.0, log_decay_H, segments_BT, entering_B)
        _, end = states(setting, k, v, None, reverse=False, end=True)
        assert end is not None
        ctx.save_for_backward(k, v, log_decay_H, segments_BT, entering_B)
        return end

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dend_BHRV: Tensor) -> tuple[Tensor | None, ...]:
        k, v, log_decay_H, segments_BT, entering_B = ctx.saved_tensors
        setting = setting_of(k, 1.0, log_decay_H, segments_BT, entering_B)
        none = k.new_zeros((setting.rows, setting.spans, *dend_BHRV.shape[2:]), dtype=torch.float32)
        leaving, _ = scan(setting, none, dend_BHRV.float().contiguous(), reverse=True, end=False)
        want_decay = ctx.needs_input_grad[2]
        dk, k_dots = attend(
            setting, v, v, k, leaving, transposed=True, reverse=True, scores=False,
            beside_BTHF=k if want_decay else None,
        )  # fmt: skip
        dv, _ = attend(setting, k, k, v, leaving, reverse=True, scores=False)
        dlog_decay = None
        if k_dots is not None:
            later_T = torch.arange(setting.tokens - 1, -1, -1, device=k.device)
            dlog_decay = (k_dots * later_T).sum(1).unflatten(0, (-1, setting.heads)).sum(0)
            dlog_decay = dlog_decay.to(log_decay_H.dtype)
        return dk, dv, dlog_decay, None


def _decay_gradient(
    setting: Setting,
    q_dots_GT: Tensor,
    k_dots_GT: Tensor,
    entering_GNRV: Tensor | None,
    leaving_GNRV: Tensor | None,
    before_BHRV: Tensor | None,
) -> Tensor:
    """Of the logarithm, [H].

    A product of decay^(t - s) counts t - s times: once for each token t' in s < t' <= t that it
    passes. What passes t' is what passed the token before, less what that one's query took
    (q . dq), plus what its key put in (k . dk); at the start of a span it is <S, dS>, which keeps
    the rounding of long sums away.
    """
    spans, span = setting.spans, setting.span
    flow_GT = torch.nn.functional.pad(k_dots_GT - q_dots_GT, (0, spans * span - setting.tokens))
    flow_GNL = flow_GT.unflatten(1, (spans, span))
    lengths_N = torch.full((spans,), span, device=flow_GT.device)
    lengths_N[-1] = setting.tokens - (spans - 1) * span
    later_NL = (lengths_N[:, None] - 1 - torch.arange(span, device=flow_GT.device)).clamp(min=0)
    grad_G = (flow_GNL * later_NL).sum((1, 2))
    if entering_GNRV is not None:
        if spans > 1:
            assert leaving_GNRV is not None
            passing_GN = (entering_GNRV[:, 1:] * leaving_GNRV[:, :-1]).sum((2, 3))
            grad_G = grad_G + setting.scale * (passing_GN * lengths_N[1:]).sum(1)
        if before_BHRV is not None:
            first_G = (entering_GNRV[:, 0] * before_BHRV.flatten(0, 1)).sum((1, 2))
            grad_G = grad_G + setting.scale * first_G * lengths_N[0]
    return grad_G.unflatten(0, (-1, setting.heads)).sum(0)

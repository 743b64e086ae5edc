"""Decayed causal linear attention in Triton, with all gradients.

Forward: what every span of a row adds to the state, a scan over spans, then all spans at once.
Backward: the same kernel three times with the roles changed (`triton_attention`). Kept from forward
to backward: q, k, v, and the state before each span.
Letters: B batch, T tokens, H heads, R width of queries and keys, V of values, N spans, G = B * H.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from kalmagrove_kernels.ada import tiles
from kalmagrove_kernels.ada.tiles import Tile, span_of, tile_of
from kalmagrove_kernels.ada.triton_attention import (
    attend_kernel,
    flow_kernel,
    scan_kernel,
    span_kernel,
)
from kalmagrove_kernels.launch import Launcher, cdiv, power_of_2

ATTEND_KERNEL, SPAN_KERNEL, SCAN_KERNEL, FLOW_KERNEL = map(
    Launcher, (attend_kernel, span_kernel, scan_kernel, flow_kernel)
)
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
    descriptors: dict[Any, Any]  # of tiles, made once a call

    @property
    def spans(self) -> int:
        return cdiv(self.tokens, self.span)

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
    batch, tokens, heads, width = q_BTHR.shape
    exact = torch.get_float32_matmul_precision() == "highest"
    return Setting(
        tokens=tokens,
        heads=heads,
        rows=batch * heads,
        span=span_of(tokens, batch * heads * cdiv(width, 64)),
        scale=scale,
        log_decay_H=log_decay_H,
        segments_BT=segments_BT,
        entering_B=entering_B,
        precision="ieee" if exact else "tf32",
        descriptors={},
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
    block_e = min(128, max(16, power_of_2(width_e)))
    sums = b_BTHE.new_empty((setting.rows, setting.spans, width_e, width_f), dtype=torch.float32)
    bulk = copied_in_bulk(b_BTHE, c_BTHF, block_e, tile.columns)
    b, c = (
        operand(setting, x, tile.chunk, block, bulk)
        for x, block in ((b_BTHE, block_e), (c_BTHF, tile.columns))
    )
    blocks = cdiv(width_e, block_e) * cdiv(width_f, tile.columns)
    SPAN_KERNEL(
        (blocks, setting.spans, setting.rows),
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
    SCAN_KERNEL(
        (cdiv(size, SCAN_BLOCK), setting.rows, 1),
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
    flows: "Flows | None" = None,
) -> Tensor:
    """The kernel's result.

    transposed: the states are [F, E], not [E, F]. scores: false for what the states add alone; c
    then only tells the result's shape. flows: filled on the way; `flows.beside` goes with out.
    """
    width_e, width_f = a_BTHE.shape[-1], c_BTHF.shape[-1]
    tile = tile_of("attend", (width_e, width_f), a_BTHE.dtype)
    blocks = cdiv(width_f, tile.columns)
    out = torch.empty_like(c_BTHF)
    block_e = max(16, power_of_2(width_e))
    bulk = copied_in_bulk(a_BTHE, c_BTHF, block_e, tile.columns)
    a, b = (operand(setting, x, tile.chunk, block_e, bulk) for x in (a_BTHE, b_BTHE))
    c, y = (operand(setting, x, tile.chunk, tile.columns, bulk) for x in (c_BTHF, out))
    beside, dots, anchors, flow = None, None, None, None
    if flows is not None:
        beside = operand(setting, flows.beside, tile.chunk, tile.columns, bulk)
        dots, anchors, flow = flows.buffers(setting, blocks, width_e, width_f, reverse)
    ATTEND_KERNEL(
        (blocks, setting.spans, setting.rows),
        a, b, c, state,
        setting.log_decay_H, setting.segments_BT, setting.entering_B,
        y, beside, dots, anchors, flow,
        setting.tokens, setting.heads, setting.scale,
        *((1, width_e) if transposed else (width_f, 1)),
        E=width_e, F=width_f, BE=block_e, BF=tile.columns,
        REVERSE=reverse, SCORES=scores, STATE=state is not None, DOTS=flows is not None,
        ANCHOR=min(tiles.ANCHOR, setting.span), **setting.common(tile, bulk),
    )  # fmt: skip
    return out


class Flows:
    """What the gradient of the decay is made of, gathered while dq and then dk are computed.

    A product of decay^(t - s) counts t - s times: once for each token t' in s < t' <= t that it
    passes. What passes t' is what passed the token before, less what that one's query took
    (q . dq), plus what its key put in (k . dk). Before every ANCHOR-th token it is <S, dS>, which
    both ends of the tokens between them meet: the rounding of long sums stays short.
    """

    def __init__(self, q_BTHR: Tensor, k_BTHR: Tensor) -> None:
        self.q_BTHR, self.k_BTHR = q_BTHR, k_BTHR
        self.beside = q_BTHR
        self.anchors: Tensor | None = None
        self.dots: list[Tensor] = []
        self.flow: Tensor | None = None

    def buffers(
        self, setting: Setting, blocks: int, width_e: int, width_f: int, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Row products, anchors and (in reverse) what passes them, for one launch."""
        count = cdiv(setting.tokens, min(tiles.ANCHOR, setting.span))
        like, wide = self.q_BTHR, torch.float32
        self.dots.append(like.new_empty((blocks, setting.rows, setting.tokens), dtype=wide))
        if self.anchors is None:
            self.anchors = like.new_empty((setting.rows, count, width_e, width_f))
        if reverse:
            self.flow = like.new_empty((blocks, setting.rows, count), dtype=wide)
        self.beside = self.k_BTHR  # after dq comes dk
        return self.dots[-1], self.anchors, self.flow

    def gradient(self, setting: Setting, last_G: Tensor | None) -> Tensor:
        """Of the logarithm of the decay, [H]. last: what passes on behind the last token."""
        assert self.flow is not None
        q_dots, k_dots = self.dots
        size = min(tiles.ANCHOR, setting.span)
        grad_GA = torch.empty_like(self.flow[0])
        FLOW_KERNEL(
            (grad_GA.shape[1], setting.rows, 1),
            q_dots, k_dots, self.flow, last_G, grad_GA, setting.tokens,
            Q_PARTS=len(q_dots), K_PARTS=len(k_dots),
            ANCHOR=size, BLOCK=size, LAST=last_G is not None,
        )  # fmt: skip
        return grad_GA.view(-1, setting.heads, grad_GA.shape[1]).sum((0, 2))


def copied_in_bulk(e: Tensor, f: Tensor, block_e: int, block_f: int) -> bool:
    """Whether the copy engine can move tiles: blocks fill the widths, rows are aligned."""
    return (
        e.shape[-1] % block_e == 0
        and f.shape[-1] % block_f == 0
        and all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in (e, f))
        and (e.device.type != "cuda" or torch.cuda.get_device_capability(e.device)[0] >= 9)
    )


def operand(setting: Setting, x_BTHX: Tensor, chunk: int, block: int, bulk: bool) -> Any:
    """A tensor as the kernels take it: a descriptor of [1, chunk, block] tiles, or itself."""
    if not bulk:
        return x_BTHX
    key = x_BTHX.data_ptr(), chunk, block
    if key not in setting.descriptors:
        flat = x_BTHX.flatten(2)
        tiles_of = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [1, chunk, block])
        setting.descriptors[key] = tiles_of
    return setting.descriptors[key]


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
        out = attend(setting, q, k, v, entering)
        decayed = end if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(q, k, v, log_decay_H, entering, segments_BT, entering_B, decayed)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, end

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, do: Tensor | None, dend_BHRV: Tensor | None) -> tuple[Any, ...]:
        q, k, v, log_decay_H, entering, segments_BT, entering_B, end = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        setting = setting_of(q, ctx.scale, log_decay_H, segments_BT, entering_B)
        want_state = ctx.needs_input_grad[4]
        after = None if dend_BHRV is None else (dend_BHRV.float() / ctx.scale).contiguous()
        leaving, before = states(setting, q, do, after, reverse=True, end=want_state)
        flows = Flows(q, k) if ctx.needs_input_grad[3] else None
        dq = attend(setting, do, v, k, entering, transposed=True, flows=flows)
        dk = attend(setting, v, do, q, leaving, transposed=True, reverse=True, flows=flows)
        dv = attend(setting, k, q, do, leaving, reverse=True)
        dlog_decay = None
        if flows is not None:
            last_G = None
            if dend_BHRV is not None:
                last_G = (end * dend_BHRV).sum((2, 3)).flatten()
            dlog_decay = flows.gradient(setting, last_G).to(log_decay_H.dtype)
        dstate = before * ctx.scale if before is not None else None
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
        dk = attend(setting, v, v, k, leaving, transposed=True, reverse=True, scores=False)
        dv = attend(setting, k, k, v, leaving, reverse=True, scores=False)
        dlog_decay = None
        if ctx.needs_input_grad[2]:
            later_T = torch.arange(setting.tokens - 1, -1, -1, device=k.device)
            dots_BTH = (k.float() * dk.float()).sum(-1)
            dlog_decay = torch.einsum("bth,t->h", dots_BTH, later_T.float()).to(log_decay_H.dtype)
        return dk, dv, dlog_decay, None

"""Triton kernels of decayed causal linear attention. `triton` launches them and has the gradients.

One kernel, `attend_kernel`, makes the output and all three gradients, as each of them is

    out_t = scale * sum_{s <= t, or s >= t} decay^|t - s| (a_t . b_s) c_s

    output (a, b, c) = (q, k, v) over s <= t        dk = (v, do, q) over s >= t
    dq              = (do, v, k) over s <= t        dv = (k, q, do) over s >= t

A row is cut into spans, which run at once, and a span into chunks, which follow one another: within
a chunk the scores are formed, between chunks a state [E, F] in fp32 registers is carried. The
states that spans start from come from `span_kernel` (what each span adds) and `scan_kernel`.

Letters: B batch, T tokens, H heads, E width of a and b, F width of c, C tokens of a chunk, N spans.
Tensors are [B, T, H, width], contiguous; states fp32 [B * H, N, R, V], R and V the widths of q and
v. "Forward" walks from the first token to the last, "reverse" from the last to the first.

The state before the token t0 is that after the token t0 - 1: sum_{s < t0} decay^(t0 - 1 - s) k_s
v_s^T. Token p of a chunk of n tokens therefore reads it with decay^(p + 1) and adds to the next
one with decay^(n - 1 - p); in reverse the two change places.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# exp2 of this times anything from 1 on is 0; stands in for log(0), whose product with 0 is NaN.
LOG_ZERO = tl.constexpr(-1e4)


@triton.jit
def _log2_decay(log_decay_H, head, DECAY: tl.constexpr):
    if DECAY:
        rate = tl.load(log_decay_H + head).to(tl.float32)
        return tl.minimum(tl.maximum(rate, LOG_ZERO), 0.0) * LOG2_E
    return 0.0


@triton.jit
def _weights(p, t0, n, rate, segment_T, entering, DECAY: tl.constexpr, SEGMENTS: tl.constexpr):
    """How tokens p of the chunk at t0 read the state before it and add to the one after it.

    Returns both weights, what is left of the state across the chunk, and the tokens' segments.
    entering: the segment that the state before the row belongs to.
    """
    read = tl.full([p.shape[0]], 1.0, tl.float32)
    add = tl.full([p.shape[0]], 1.0, tl.float32)
    kept = 1.0
    if DECAY:
        read = tl.exp2(rate * (p + 1).to(tl.float32))
        add = tl.exp2(rate * tl.maximum(n - 1 - p, 0).to(tl.float32))
        kept = tl.exp2(rate * n.to(tl.float32))
    segment = p
    if SEGMENTS:
        segment = tl.load(segment_T + t0 + tl.minimum(p, n - 1))
        last = tl.load(segment_T + t0 + n - 1)
        before = tl.load(segment_T + tl.maximum(t0 - 1, 0))
        before = tl.where(t0 > 0, before, entering)
        read = tl.where(segment == before, read, 0.0)
        add = tl.where(segment == last, add, 0.0)
        kept = tl.where(last == before, kept, 0.0)
    return read, add, kept, segment


@triton.jit
def _load(
    x,
    batch,
    head,
    t0,
    col_0,
    T,
    H,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BULK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The rows t0 up to t0 + C of a head, BLOCK columns from col_0; zero past the end.

    BULK: x is a tensor descriptor [B, T, H * WIDTH], read by the copy engine; else a pointer.
    """
    if BULK:
        tile = x.load([batch, t0, head * WIDTH + col_0]).reshape(C, BLOCK)
    else:
        t, col = t0 + tl.arange(0, C), col_0 + tl.arange(0, BLOCK)
        row = (batch.to(tl.int64) * T + t) * H + head
        ptrs = x + row[:, None] * WIDTH + col[None, :]
        if WHOLE and WIDTH % BLOCK == 0:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=(t < T)[:, None] & (col < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def _store(
    x,
    value,
    batch,
    head,
    t0,
    col_0,
    T,
    H,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BULK: tl.constexpr,
):
    if BULK:
        x.store([batch, t0, head * WIDTH + col_0], value.to(x.dtype).reshape(1, C, BLOCK))
    else:
        t, col = t0 + tl.arange(0, C), col_0 + tl.arange(0, BLOCK)
        row = (batch.to(tl.int64) * T + t) * H + head
        ptrs = x + row[:, None] * WIDTH + col[None, :]
        mask = (t < T)[:, None] & (col < WIDTH)[None, :]
        tl.store(ptrs, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def span_kernel(
    b_BTHE,
    c_BTHF,
    log_decay_H,
    segment_BT,
    entering_B,
    sums_GNEF,
    T,
    H,
    E: tl.constexpr,
    F: tl.constexpr,
    SPAN: tl.constexpr,
    C: tl.constexpr,
    BE: tl.constexpr,
    BF: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BULK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each span adds to the state after it (in reverse: before it).

    Grid: E x F blocks, N, B * H.
    """
    blocks_f: tl.constexpr = (F + BF - 1) // BF
    span, group = tl.program_id(1), tl.program_id(2)
    batch, head = group // H, group % H
    e_0, f_0 = (tl.program_id(0) // blocks_f) * BE, (tl.program_id(0) % blocks_f) * BF
    e, f, p = e_0 + tl.arange(0, BE), f_0 + tl.arange(0, BF), tl.arange(0, C)
    rate = _log2_decay(log_decay_H, head, DECAY)
    entering = 0
    if SEGMENTS:
        segment_BT += batch.to(tl.int64) * T
        entering = tl.load(entering_B + batch)
    tokens = tl.minimum(SPAN, T - span * SPAN)
    chunks = (tokens + C - 1) // C
    state = tl.zeros([BE, BF], tl.float32)
    for i in tl.range(0, chunks, num_stages=STAGES):
        first = i * C
        if REVERSE:
            first = (chunks - 1 - i) * C
        n = tl.minimum(C, tokens - first)
        t0 = span * SPAN + first
        b = _load(b_BTHE, batch, head, t0, e_0, T, H, E, C, BE, BULK, WHOLE)
        c = _load(c_BTHF, batch, head, t0, f_0, T, H, F, C, BF, BULK, WHOLE)
        read, add, kept, _ = _weights(p, t0, n, rate, segment_BT, entering, DECAY, SEGMENTS)
        if DECAY or SEGMENTS:
            if REVERSE:
                add = read
            c = (c.to(tl.float32) * add[:, None]).to(c.dtype)
            state *= kept
        state = tl.dot(tl.trans(b), c, state, input_precision=PRECISION)
    out = sums_GNEF + (group.to(tl.int64) * tl.num_programs(1) + span) * (E * F)
    out_ptrs = out + e[:, None] * F + f[None, :]
    tl.store(out_ptrs, state, mask=(e < E)[:, None] & (f < F)[None, :])


@triton.jit
def scan_kernel(
    sums_GNS,
    start_GS,
    end_GS,
    log_decay_H,
    segment_BT,
    entering_B,
    T,
    H,
    spans,
    SIZE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    START: tl.constexpr,
    END: tl.constexpr,
):
    """Turn what spans add into the state that each begins with, in place.

    Grid: SIZE blocks, B * H. START: a state comes before the first span walked (else zero). END:
    store the one after the last.
    """
    group = tl.program_id(1)
    batch, head = group // H, group % H
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < SIZE
    rate = _log2_decay(log_decay_H, head, DECAY)
    state = tl.zeros([BLOCK], tl.float32)
    if START:
        state = tl.load(start_GS + group.to(tl.int64) * SIZE + at, mask=live, other=0.0)
    entering = 0
    if SEGMENTS:
        segment_BT += batch.to(tl.int64) * T
        entering = tl.load(entering_B + batch)
    for i in range(spans):
        span = i
        if REVERSE:
            span = spans - 1 - i
        ptrs = sums_GNS + (group.to(tl.int64) * spans + span) * SIZE + at
        own = tl.load(ptrs, mask=live, other=0.0)
        tl.store(ptrs, state, mask=live)
        first = span * SPAN
        n = tl.minimum(SPAN, T - first)
        if DECAY:
            state *= tl.exp2(rate * n.to(tl.float32))
        if SEGMENTS:
            last = tl.load(segment_BT + first + n - 1)
            before = tl.load(segment_BT + tl.maximum(first - 1, 0))
            before = tl.where(first > 0, before, entering)
            state = tl.where(last == before, state, 0.0)
        state += own
    if END:
        tl.store(end_GS + group.to(tl.int64) * SIZE + at, state, mask=live)


@triton.jit
def _anchor(
    anchor_GAEF, group, t0, T, e, f, E: tl.constexpr, F: tl.constexpr, ANCHOR: tl.constexpr
):
    number = group.to(tl.int64) * ((T + ANCHOR - 1) // ANCHOR) + t0 // ANCHOR
    return anchor_GAEF + number * (E * F) + e[:, None] * F + f[None, :]


@triton.jit
def attend_kernel(
    a_BTHE,
    b_BTHE,
    c_BTHF,
    state_GNEF,
    log_decay_H,
    segment_BT,
    entering_B,
    out_BTHF,
    beside_BTHF,
    dots_IGT,
    anchor_GAEF,
    flow_IGA,
    T,
    H,
    scale,
    stride_e,
    stride_f,
    E: tl.constexpr,
    F: tl.constexpr,
    SPAN: tl.constexpr,
    C: tl.constexpr,
    BE: tl.constexpr,
    BF: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCORES: tl.constexpr,
    STATE: tl.constexpr,
    DOTS: tl.constexpr,
    ANCHOR: tl.constexpr,
    BULK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out, see the module. Grid: F blocks, N spans, B * H.

    state: the state that each span begins with, element (e, f) at e * stride_e + f * stride_f.
    SCORES: false leaves out the sum over the row's own tokens: what comes from the state is left.
    DOTS: also store the products of each row of out with that of `beside`, in a part a F block;
    and forward the state before every ANCHOR-th token, in reverse its product with that state,
    times scale.
    """
    span, group = tl.program_id(1), tl.program_id(2)
    batch, head = group // H, group % H
    f_0 = tl.program_id(0) * BF
    e, f, p = tl.arange(0, BE), f_0 + tl.arange(0, BF), tl.arange(0, C)
    rate = _log2_decay(log_decay_H, head, DECAY)
    entering = 0
    if SEGMENTS:
        segment_BT += batch.to(tl.int64) * T
        entering = tl.load(entering_B + batch)
    tokens = tl.minimum(SPAN, T - span * SPAN)
    chunks = (tokens + C - 1) // C

    state = tl.zeros([BE, BF], tl.float32)
    if STATE:
        state_ptrs = state_GNEF + (group.to(tl.int64) * tl.num_programs(1) + span) * (E * F)
        state_ptrs += e[:, None] * stride_e + f[None, :] * stride_f
        state = tl.load(state_ptrs, mask=(e < E)[:, None] & (f < F)[None, :], other=0.0)

    apart = p[:, None] - p[None, :]
    if REVERSE:
        apart = -apart
    ordered = apart >= 0
    decays = tl.exp2(rate * tl.maximum(apart, 0).to(tl.float32))  # 1 without a decay
    decays = tl.where(ordered, decays, 0.0)

    for i in tl.range(0, chunks, num_stages=STAGES):
        first = i * C
        if REVERSE:
            first = (chunks - 1 - i) * C
        n = tl.minimum(C, tokens - first)
        t0 = span * SPAN + first
        if DOTS and not REVERSE and t0 % ANCHOR == 0:
            ptrs = _anchor(anchor_GAEF, group, t0, T, e, f, E, F, ANCHOR)
            mask = (e < E)[:, None] & (f < F)[None, :]
            tl.store(ptrs, state.to(anchor_GAEF.dtype.element_ty), mask=mask)
        a = _load(a_BTHE, batch, head, t0, 0, T, H, E, C, BE, BULK, WHOLE)
        read, add, kept, segment = _weights(p, t0, n, rate, segment_BT, entering, DECAY, SEGMENTS)
        if REVERSE:
            read, add = add, read
        out = tl.dot(a, state.to(a.dtype), input_precision=PRECISION)
        if DECAY or SEGMENTS:
            out *= read[:, None]
            state *= kept
        if SCORES:
            b = _load(b_BTHE, batch, head, t0, 0, T, H, E, C, BE, BULK, WHOLE)
            c = _load(c_BTHF, batch, head, t0, f_0, T, H, F, C, BF, BULK, WHOLE)
            scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * decays
            if SEGMENTS:
                scores = tl.where(segment[:, None] == segment[None, :], scores, 0.0)
            out = tl.dot(scores.to(c.dtype), c, out, input_precision=PRECISION)
            if DECAY or SEGMENTS:
                c = (c.to(tl.float32) * add[:, None]).to(c.dtype)
            state = tl.dot(tl.trans(b), c, state, input_precision=PRECISION)
        out *= scale

        if DOTS:
            beside = _load(beside_BTHF, batch, head, t0, f_0, T, H, F, C, BF, BULK, WHOLE)
            dots = tl.sum(out * beside.to(tl.float32), 1)
            part = tl.program_id(0) * tl.num_programs(2) + group
            dots_ptrs = dots_IGT + part.to(tl.int64) * T + t0 + p
            tl.store(dots_ptrs, dots, mask=p < n)
            if REVERSE and t0 % ANCHOR == 0:
                ptrs = _anchor(anchor_GAEF, group, t0, T, e, f, E, F, ANCHOR)
                mask = (e < E)[:, None] & (f < F)[None, :]
                before = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
                flow = tl.sum(tl.sum(before * state, 1), 0) * scale
                anchors = (T + ANCHOR - 1) // ANCHOR
                tl.store(flow_IGA + part.to(tl.int64) * anchors + t0 // ANCHOR, flow)
        _store(out_BTHF, out, batch, head, t0, f_0, T, H, F, C, BF, BULK)


@triton.jit
def flow_kernel(
    q_dots_IGT,
    k_dots_JGT,
    flow_JGA,
    last_G,
    grad_GA,
    T,
    Q_PARTS: tl.constexpr,
    K_PARTS: tl.constexpr,
    ANCHOR: tl.constexpr,
    BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):
    """The sum of what passes each of ANCHOR tokens, see `triton.Flows`. Grid: A, G.

    Between two points where that is known it is what passed the first, and what keys put in less
    what queries took since. Products and flows come in parts.
    """
    anchor, group, anchors = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    first = anchor * ANCHOR
    n = tl.minimum(ANCHOR, T - first)
    token = tl.arange(0, BLOCK)
    live = token < n
    put = tl.zeros([BLOCK], tl.float32)
    # Not an argument, which as 1 would be a constant without methods.
    groups = tl.num_programs(1)
    at = group.to(tl.int64) * T + first + token
    for i in tl.static_range(Q_PARTS):
        put -= tl.load(q_dots_IGT + i * groups.to(tl.int64) * T + at, mask=live, other=0.0)
    before = 0.0
    after = 0.0
    if LAST:
        after = tl.load(last_G + group)
    follows = anchor + 1 < anchors
    after = tl.where(follows, 0.0, after)
    for j in tl.static_range(K_PARTS):
        put += tl.load(k_dots_JGT + j * groups.to(tl.int64) * T + at, mask=live, other=0.0)
        flows = flow_JGA + (j * groups + group) * anchors + anchor
        before += tl.load(flows)
        after += tl.load(flows + 1, mask=follows, other=0.0)
    total = tl.sum(put * (n / 2 - 1 - token), 0) + (before + after) / 2 * n
    tl.store(grad_GA + group * anchors + anchor, total)

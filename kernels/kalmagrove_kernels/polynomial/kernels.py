"""The kernels of `triton`: the basis by recurrence, and the three products it is fused into.

Left operands that are computed (the basis) stay in registers; what is loaded is staged through
shared memory by Triton's pipeliner. Every kernel computes tiles of ROWS x COLS, DEPTH of the
contraction at a time; `tiles` chooses. `matrix`: elements of c_q, inputs * outputs. Another
number of tokens compiles nothing again.
Letters: n token, i input, j output, q order of Q.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005 -- Triton's tuples grow by +

import triton
import triton.language as tl

GROUP = tl.constexpr(16)  # rows of tiles that run at about the same time and share what they load


@triton.jit
def _place(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile (row, column) of this program: down a group of GROUP rows, then along it."""
    program = tl.program_id(0)
    tiles = tl.cdiv(rows, ROWS)
    wide = GROUP * tl.cdiv(cols, COLS)
    first = program // wide * GROUP
    high = tl.minimum(tiles - first, GROUP)
    return first + program % wide % high, program % wide // high


@triton.jit
def _squash(x, scale, shift, i, inputs, SQUASH: tl.constexpr, COMPILED: tl.constexpr):
    """s(x) in fp32; i: the input numbers, in a shape that x broadcasts with."""
    s = x.to(tl.float32)
    if SQUASH == "affine":
        s = s * tl.load(scale + i, mask=i < inputs, other=0.0)
        s += tl.load(shift + i, mask=i < inputs, other=0.0)
    elif SQUASH == "tanh":
        if COMPILED and x.dtype == tl.bfloat16:
            # One instruction; its error, 2^-11, is a quarter of a bf16's rounding.
            s = tl.inline_asm_elementwise(
                "tanh.approx.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            s = 1 - 2 / (tl.exp(2 * s) + 1)
    return s


@triton.jit
def _harmonics(s, Q: tl.constexpr):
    """cos(pi s), sin(pi s), cos(2 pi s), ...: Q of them."""
    turn = 0.5 * s
    angle = 6.283185307179586 * (turn - tl.floor(turn + 0.5))
    cos, sin = tl.cos(angle), tl.sin(angle)
    terms = (cos, sin)
    for k in tl.static_range(2, Q, 2):
        terms = terms + (
            terms[k - 2] * cos - terms[k - 1] * sin,
            terms[k - 1] * cos + terms[k - 2] * sin,
        )
    return terms


@triton.jit
def _clamp(s, SQUASH: tl.constexpr):
    if SQUASH != "tanh":
        s = tl.clamp(s, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return s


@triton.jit
def _terms(s, STEPS: tl.constexpr, Q: tl.constexpr, FOURIER: tl.constexpr, SQUASH: tl.constexpr):
    """B_1(s), ..., B_Q(s)."""
    if FOURIER:
        terms = _harmonics(s, Q)
    else:
        terms = ()
        u = _clamp(s, SQUASH)
        older, old = tl.zeros_like(u), tl.full(u.shape, 1.0, tl.float32)
        for p in tl.static_range(Q):
            new = STEPS[p][0] * u * old - STEPS[p][1] * older
            older, old = old, new
            terms = terms + (new,)
    return terms


@triton.jit
def _slopes(s, STEPS: tl.constexpr, Q: tl.constexpr, FOURIER: tl.constexpr, SQUASH: tl.constexpr):
    """B_1'(s), ..., B_Q'(s), inside the clamp."""
    slopes = ()
    if FOURIER:
        terms = _harmonics(s, Q)
        for k in tl.static_range(0, Q, 2):
            rate = 3.141592653589793 * (k // 2 + 1)
            slopes = slopes + (-rate * terms[k + 1], rate * terms[k])
    else:
        u = _clamp(s, SQUASH)
        older, old = tl.zeros_like(u), tl.full(u.shape, 1.0, tl.float32)
        dolder, dold = tl.zeros_like(u), tl.zeros_like(u)
        for p in tl.static_range(Q):
            new = STEPS[p][0] * u * old - STEPS[p][1] * older
            dnew = STEPS[p][0] * (old + u * dold) - STEPS[p][1] * dolder
            older, old, dolder, dold = old, new, dold, dnew
            slopes = slopes + (dnew,)
    return slopes


@triton.jit
def _settled(acc, COMPILED: tl.constexpr):
    """acc, read: the product that made it is waited for before anything after it runs.

    A warpgroup product may read its left operand from registers. If Triton lets it run on into
    the next round of the loop, those registers may be written again too early (ptxas before
    13.3). Reading the sum, with a move that costs nothing, forbids it.
    """
    if COMPILED:
        acc = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


@triton.jit(do_not_specialize=["tokens"])
def forward(
    x_ptr,
    c_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    tokens,
    inputs,
    outputs,
    matrix,
    STEPS: tl.constexpr,
    Q: tl.constexpr,
    FOURIER: tl.constexpr,
    SQUASH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, col = _place(tokens, outputs, ROWS, COLS)
    n, j, i = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS), tl.arange(0, DEPTH)[None, :]
    n_live = n < tokens - row * ROWS
    j_live = j < outputs - col * COLS
    x_ptr += row.to(tl.int64) * ROWS * inputs
    c_ptr += col.to(tl.int64) * COLS * inputs
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for i0 in tl.range(0, inputs, DEPTH):
        i_live = i0 + i < inputs
        x = tl.load(x_ptr + n * inputs + i0 + i, mask=n_live & i_live, other=0.0)
        s = _squash(x, scale_ptr, shift_ptr, i0 + i, inputs, SQUASH, COMPILED)
        terms = _terms(s, STEPS, Q, FOURIER, SQUASH)
        c_q = c_ptr
        for q in tl.static_range(Q):
            c = tl.load(
                c_q + j[:, None] * inputs + i0 + i, mask=j_live[:, None] & i_live, other=0.0
            )
            acc = tl.dot(terms[q].to(x.dtype), tl.trans(c), acc, input_precision=PRECISION)
            c_q += matrix
        acc = _settled(acc, COMPILED)
    j_all = col * COLS + j
    acc += tl.load(offset_ptr + j_all, mask=j_live, other=0.0)[None, :]
    y_ptr += row.to(tl.int64) * ROWS * outputs
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + n * outputs + j_all[None, :], y, mask=n_live & j_live[None, :])


@triton.jit(do_not_specialize=["tokens"])
def inputs(
    x_ptr,
    c_ptr,
    dy_ptr,
    scale_ptr,
    shift_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    tokens,
    inputs,
    outputs,
    matrix,
    STEPS: tl.constexpr,
    Q: tl.constexpr,
    FOURIER: tl.constexpr,
    SQUASH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    ORDERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, col = _place(tokens, inputs, ROWS, COLS)
    n, j = tl.arange(0, ROWS)[:, None], tl.arange(0, DEPTH)
    i = (col * COLS + tl.arange(0, COLS))[None, :]
    n_live = n < tokens - row * ROWS
    first_n = row.to(tl.int64) * ROWS
    dy_ptr += first_n * outputs
    ds = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.static_range(0, Q, ORDERS):
        accs = ()
        for q in tl.static_range(first, first + ORDERS):
            if q < Q:
                accs = accs + (tl.zeros((ROWS, COLS), tl.float32),)
        c_group = c_ptr
        for _ in tl.static_range(first):
            c_group += matrix
        for j0 in tl.range(0, outputs, DEPTH):
            j_live = j < outputs - j0
            dy = tl.load(
                dy_ptr + n * outputs + (j0 + j)[None, :], mask=n_live & j_live[None, :], other=0
            )
            sums = ()
            c_q = c_group
            for q in tl.static_range(first, first + ORDERS):
                if q < Q:
                    c = tl.load(
                        c_q + j[:, None] * inputs + i,
                        mask=j_live[:, None] & (i < inputs),
                        other=0.0,
                    )
                    acc = tl.dot(dy, c, accs[q - first], input_precision=PRECISION)
                    sums = sums + (acc,)
                    c_q += matrix
            accs = sums
            c_group += DEPTH * inputs
        x = tl.load(
            x_ptr + first_n * inputs + n * inputs + i, mask=n_live & (i < inputs), other=0.0
        )
        s = _squash(x, scale_ptr, shift_ptr, i, inputs, SQUASH, COMPILED)
        slopes = _slopes(s, STEPS, Q, FOURIER, SQUASH)
        for q in tl.static_range(first, first + ORDERS):
            if q < Q:
                ds += accs[q - first] * slopes[q]
    if SQUASH == "tanh":
        ds *= 1 - s * s
    elif not FOURIER:
        ds = tl.where(tl.abs(s) <= 1, ds, 0.0)
    if SQUASH == "affine":
        block = row.to(tl.int64) * inputs
        dscale = tl.sum(ds * x.to(tl.float32), 0)[None, :]
        tl.store(dscale_ptr + block + i, dscale, mask=i < inputs)
        tl.store(dshift_ptr + block + i, tl.sum(ds, 0)[None, :], mask=i < inputs)
        ds *= tl.load(scale_ptr + i, mask=i < inputs, other=0.0)
    dx = ds.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + first_n * inputs + n * inputs + i, dx, mask=n_live & (i < inputs))


@triton.jit(do_not_specialize=["tokens", "length"])
def coef(
    x_ptr,
    dy_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    tokens,
    inputs,
    outputs,
    matrix,
    length,
    STEPS: tl.constexpr,
    Q: tl.constexpr,
    FOURIER: tl.constexpr,
    SQUASH: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    FIRST: tl.constexpr,
    ORDERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    row, col = _place(inputs, outputs, ROWS, COLS)
    part = tl.program_id(1).to(tl.int64)
    # The transpose of the result: the basis is the left operand, which may stay in registers.
    i = (row * ROWS + tl.arange(0, ROWS))[:, None]
    j = (col * COLS + tl.arange(0, COLS))[None, :]
    n = tl.arange(0, DEPTH)
    x_ptr += part * length * inputs
    dy_ptr += part * length * outputs
    mine = tl.minimum(tokens - part * length, length).to(tl.int32)
    accs = ()
    for _ in tl.static_range(ORDERS):
        accs = accs + (tl.zeros((ROWS, COLS), tl.float32),)
    for n0 in tl.range(0, mine, DEPTH):
        live = n < mine - n0
        x = tl.load(x_ptr + n[None, :] * inputs + i, mask=live[None, :] & (i < inputs), other=0.0)
        dy = tl.load(
            dy_ptr + n[:, None] * outputs + j, mask=live[:, None] & (j < outputs), other=0.0
        )
        s = _squash(x, scale_ptr, shift_ptr, i, inputs, SQUASH, COMPILED)
        terms = _terms(s, STEPS, Q, FOURIER, SQUASH)
        sums = ()
        for q in tl.static_range(ORDERS):
            acc = tl.dot(terms[FIRST + q].to(x.dtype), dy, accs[q], input_precision=PRECISION)
            sums = sums + (_settled(acc, COMPILED),)
        accs = sums
        x_ptr += DEPTH * inputs
        dy_ptr += DEPTH * outputs
    out_ptr += part * Q * matrix
    for q in tl.static_range(ORDERS):
        acc = accs[q].to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + j.to(tl.int64) * inputs + i, acc, mask=(i < inputs) & (j < outputs))
        out_ptr += matrix

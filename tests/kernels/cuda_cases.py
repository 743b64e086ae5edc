"""What the CUDA kernels are tested on, on the CPU (emulated) and on a GPU alike.

Letters: N tokens, M edges, P basis functions, K kept, G groves, C channels, D width, R rank, S
pairs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels.ada import cuda_convolve
from kalmagrove_kernels.edge import Kept, edge_topk
from kalmagrove_kernels.edge.reference import largest
from kalmagrove_kernels.permute import cuda as permute_cuda
from kalmagrove_kernels.permute import sort_pairs
from kalmagrove_kernels.projection.accumulate import Block, Plan, accumulate, plan


def relative(ours: Tensor, theirs: Tensor) -> float:
    """||a - b|| / ||b||; NaN never passes a comparison with it."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing wrote holds NaN, or a number out of every range."""

    def fill(function: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = function(*args, **kwargs)
            if result.is_floating_point():
                return result.fill_(float("nan"))
            return result.fill_(torch.iinfo(result.dtype).min // 2)

        return filled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", fill(torch.empty))
        patch.setattr(torch, "empty_like", fill(torch.empty_like))
        patch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))
        yield


class EdgeCase(NamedTuple):
    rows: int
    edges: int
    kept: int
    dtype: torch.dtype = torch.float32
    degree: int = 3
    grid: int = 8
    basis: str = "bspline"
    base: str = "silu"
    groves: int = 0  # 0: not stacked
    kind: str = "random"  # or "ties", "near": few distinct E, or last bits apart; "zero"; "nan"

    @property
    def options(self) -> dict[str, Any]:
        return {"basis": self.basis, "degree": self.degree, "grid": self.grid, "base": self.base}


class EdgeInputs(NamedTuple):
    h_NM: Tensor
    coef: Tensor
    scale: Tensor | None
    range_: Tensor
    group_N: Tensor | None


def edge_inputs(case: EdgeCase, device: str) -> EdgeInputs:
    """Fresh inputs; with groves, grove 0 has no row."""
    size = case.grid + (1 if case.basis == "piecewise_linear" else case.degree)
    lead = (case.groves,) if case.groves else ()
    h_NM = torch.randn(case.rows, case.edges, device=device) * 2
    coef = torch.randn(*lead, case.edges, size, device=device) / 2
    scale = 1 + torch.randn(*lead, case.edges, device=device) / 4
    if case.kind == "ties":
        h_NM = h_NM.round()
        coef, scale = coef[..., :1, :].expand_as(coef), scale[..., :1].expand_as(scale)
    if case.kind == "near":
        h_NM, coef = h_NM.sign(), torch.zeros_like(coef)
        scale = 1 + torch.randint_like(scale, 16) * 2.0**-23
    if case.kind == "zero":
        coef, scale = torch.zeros_like(coef), torch.zeros_like(scale)
    if case.kind == "nan":
        h_NM[torch.rand_like(h_NM) < 0.02] = float("nan")
    low = -2 - torch.rand(lead, device=device)
    range_ = torch.stack([low, 2.5 + torch.rand(lead, device=device)], dim=-1)
    group_N = None
    if case.groves:
        group_N = torch.randint(1, max(2, case.groves), (case.rows,), device=device)
        group_N = group_N.sort().values.to(torch.int32)
    return EdgeInputs(
        h_NM.to(case.dtype), coef, None if case.base == "none" else scale, range_, group_N
    )


def run_edge(
    case: EdgeCase, inputs: EdgeInputs, backend: str, index_NK: Tensor | None = None
) -> tuple[Kept, list[Tensor]]:
    """The outputs, and the gradients of h, coef and scale at a fixed dvalue."""
    wide = torch.float64 if backend == "reference" else None
    leaves = [
        None if t is None else t.detach().clone().to(wide or t.dtype).requires_grad_()
        for t in inputs[:3]
    ]
    kept = edge_topk(
        *leaves,
        inputs.range_.to(wide or torch.float32),
        case.kept,
        group_N=inputs.group_N,
        index_NK=index_NK,
        backend=backend,
        **case.options,
    )
    torch.manual_seed(1)
    dvalue_NK = torch.randn(kept.value_NK.shape).to(kept.value_NK)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return kept, list(torch.autograd.grad(kept.value_NK, wanted, dvalue_NK))


def all_edges(case: EdgeCase, inputs: EdgeInputs) -> Tensor:
    """E [N, M] as the CUDA kernel computes it: every edge as a given one, 32 at a time."""
    first_N1 = 0 if inputs.group_N is None else inputs.group_N[:, None].long() * case.edges
    numbers_M = torch.arange(case.edges, device=inputs.h_NM.device)
    parts = []
    for some in numbers_M.split(32):
        given_NK = some.expand(case.rows, -1) + first_N1
        kept = edge_topk(
            *inputs[:4],
            case.kept,
            group_N=inputs.group_N,
            index_NK=given_NK.contiguous(),
            backend="cuda",
            **case.options,
        )
        parts.append(kept.value_NK)
    return torch.cat(parts, dim=1)


def check_edge(case: EdgeCase, device: str) -> None:
    """The k kept are exactly those of `largest` on the kernel's own E; E and every gradient are
    those of the reference in fp64; nothing is left unwritten; a second run gives the same bits."""
    inputs = edge_inputs(case, device)
    with poisoned():
        kept, grads = run_edge(case, inputs, "cuda")
        again, grads_again = run_edge(case, inputs, "cuda")
        e_NM = all_edges(case, inputs)
    for one, two in zip([*kept, *grads], [*again, *grads_again], strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
    first_N1 = 0 if inputs.group_N is None else inputs.group_N[:, None].long() * case.edges
    index_NK = largest(e_NM.abs(), case.kept)
    assert torch.equal(kept.index_NK, index_NK + first_N1)
    assert torch.equal(kept.value_NK.nan_to_num(7), e_NM.gather(1, index_NK).nan_to_num(7))
    want, want_grads = run_edge(case, inputs, "reference", kept.index_NK)
    assert kept.outside == want.outside
    if case.kind == "nan":
        assert torch.equal(kept.value_NK.isnan(), want.value_NK.isnan())
        return
    assert relative(kept.value_NK, want.value_NK) < 3e-6
    assert relative(kept.energy, want.energy) < 1e-5
    half = 4e-3 if case.dtype == torch.bfloat16 else 1e-3
    for ours, theirs in zip(grads, want_grads, strict=True):
        assert ours.isfinite().all()
        assert relative(ours, theirs) < (1e-5 if ours.dtype == torch.float32 else half)


PERMUTE_CASES = [
    # rows, kept, channels, dtype, how the channels are drawn
    (63, 8, 104, torch.int64, "even"),
    (300, 8, 13, torch.int32, "even"),
    (200, 5, 4096, torch.int64, "even"),
    (150, 8, 9000, torch.int32, "few"),
    (1, 1, 1, torch.int64, "even"),
    (0, 8, 104, torch.int64, "even"),
    (333, 4, 40, torch.int64, "one"),
]


def check_permute(
    rows: int, kept: int, channels: int, dtype: torch.dtype, draw: str, device: str
) -> None:
    """The sort is that of the reference, element by element."""
    index_NK = torch.randint(0, channels, (rows, kept), device=device, dtype=dtype)
    if draw == "few":
        index_NK = index_NK % 3 * (channels // 3)
    if draw == "one":
        index_NK = torch.full_like(index_NK, channels - 1)
    with poisoned():
        ours = permute_cuda.sort_pairs(index_NK, channels)
    for mine, theirs in zip(ours, sort_pairs(index_NK, channels), strict=True):
        assert mine.dtype == torch.int32
        assert torch.equal(mine, theirs)


def check_convolution(
    shape: tuple[int, int, int], taps: int, dtype: torch.dtype, segmented: bool, device: str
) -> None:
    """ADA's convolution and its gradients as in fp64; two runs give the same bits."""
    torch.manual_seed(0)
    batch, tokens, channels = shape
    x_BTC, dz_BTC = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    taps_PC = torch.randn(taps, channels, device=device)
    segments_BT = None
    if segmented:
        drawn_BT = torch.randint(0, 9, (batch, tokens), device=device)
        segments_BT = drawn_BT.sort(1).values.to(torch.int32)
    assert cuda_convolve.refusal(x_BTC, taps) is None
    with poisoned():
        ours, again = (
            (
                cuda_convolve.convolve(x_BTC, taps_PC, segments_BT),
                *cuda_convolve.unconvolve(dz_BTC, x_BTC, taps_PC, segments_BT),
            )
            for _ in range(2)
        )
    exact = [t.double().requires_grad_() for t in (x_BTC, taps_PC)]
    y_BTC = torch.zeros(shape, dtype=torch.float64, device=device)
    for p in range(min(taps, tokens)):
        same_BT = torch.ones(batch, tokens - p, dtype=torch.bool, device=device)
        if segments_BT is not None:
            same_BT = segments_BT[:, p:] == segments_BT[:, : tokens - p]
        past_BTC = exact[0][:, : tokens - p] * same_BT[..., None]
        y_BTC = y_BTC + torch.nn.functional.pad(exact[1][p] * past_BTC, (0, 0, p, 0))
    used = y_BTC + 0 * sum(t.sum() for t in exact)  # in the graph also without tokens
    wanted = (y_BTC, *torch.autograd.grad(used, exact, dz_BTC.double()))
    for mine, same, want in zip(ours, again, wanted, strict=True):
        assert torch.equal(mine, same)
        assert mine.isfinite().all()
        assert relative(mine, want) < (4e-3 if mine.dtype == torch.bfloat16 else 3e-6)


class SumsCase(NamedTuple):
    tokens: int
    width: int
    channels: int
    rank: int
    kept: int
    block: Block
    draw: str = "even"  # or "one": all tokens have the same; "few": of every third channel


SUMS_CASES = [
    SumsCase(100, 72, 5, 64, 2, Block(tokens=40)),
    SumsCase(70, 64, 13, 64, 4, Block(3, tokens=70)),
    SumsCase(150, 136, 3, 64, 1, Block(tokens=130), "one"),
    SumsCase(90, 200, 9, 64, 2, Block(5, tokens=30), "few"),
    SumsCase(29, 64, 80, 64, 3, Block(7, tokens=8), "few"),
    SumsCase(100, 8, 5, 64, 2, Block(4, tokens=45), "one"),
    SumsCase(1, 8, 1, 64, 1, Block()),
    SumsCase(0, 64, 5, 64, 2, Block()),
]


def sums_inputs(case: SumsCase, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """index [N, K] without repetition in a row, a [S, R] in sorted order, w [C, R, D]."""
    scores_NC = torch.rand(case.tokens, case.channels, device=device)
    if case.draw == "one":
        scores_NC = torch.arange(case.channels, device=device).expand_as(scores_NC).float()
    if case.draw == "few":
        scores_NC[:, ::3] += 1
    index_NK = scores_NC.topk(case.kept).indices
    a_SR = torch.randn(case.tokens * case.kept, case.rank, device=device)
    w_CRD = torch.randn(case.channels, case.rank, case.width, device=device) / case.rank**0.5
    return index_NK, a_SR.to(dtype), w_CRD.to(dtype)


def run_sums(case: SumsCase, index_NK: Tensor, a_SR: Tensor, w_CRD: Tensor) -> tuple[Plan, Tensor]:
    order_S, _, start_C1 = permute_cuda.sort_pairs(index_NK, case.channels)
    sizes = case.tokens, case.kept, case.width
    lists = plan(order_S, start_C1, *sizes, case.block, a_SR.dtype)
    return lists, accumulate(a_SR, w_CRD, lists)


def check_sums(case: SumsCase, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The sum of a token's pairs as in fp64, rounded once, and the same bits in a second run; the
    lists hold every pair once, channels in order."""
    index_NK, a_SR, w_CRD = sums_inputs(case, device, dtype)
    with poisoned():
        lists, y_ND = run_sums(case, index_NK, a_SR, w_CRD)
        _, again_ND = run_sums(case, index_NK, a_SR, w_CRD)
    assert torch.equal(y_ND, again_ND)
    order_S, _, start_C1 = (t.long() for t in sort_pairs(index_NK, case.channels))
    token_S = order_S // case.kept
    channel_S = torch.arange(case.channels, device=device).repeat_interleave(start_C1.diff())
    want_ND = torch.zeros(case.tokens, case.width, dtype=torch.float64, device=device)
    for c in range(case.channels):
        rows = slice(int(start_C1[c]), int(start_C1[c + 1]))
        want_ND.index_add_(0, token_S[rows], a_SR[rows].double() @ w_CRD[c].double())
    assert y_ND.isfinite().all()
    # Both are rounded, so that what is left is the order of fp32 sums: now and then a last bit.
    assert relative(y_ND, want_ND.to(dtype)) < 4e-4 or not case.tokens
    places = []
    for b, items in enumerate(lists.items_B.tolist()):
        channel_I, first_I, count_I, _ = lists.item_BI4[b, :items].unbind(1)
        assert (channel_I.diff() >= 0).all()
        for i, (channel, first, count) in enumerate(
            zip(channel_I.tolist(), first_I.tolist(), count_I.tolist(), strict=True)
        ):
            place = torch.arange(first, first + count, device=device)
            assert (channel_S[place] == channel).all()
            tokens = lists.token_BIP[b, i].long()
            assert torch.equal(tokens[:count] + b * lists.block_tokens, token_S[place])
            assert (tokens[count:] == -1).all()
            places.append(place)
    if places:
        found = torch.cat(places).sort().values
        assert torch.equal(found, torch.arange(len(order_S), device=device))

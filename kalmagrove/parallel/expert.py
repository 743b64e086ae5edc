"""Tokens to the ranks that hold their parts (groves or experts), and the results back.

Three steps, of which a layer runs its parts between the last two: `preprocess` plans who sends what
and shares the counts; `communicate` sends each token once to each rank that holds any of its parts,
with its gates; `postprocess` weights and sums the parts' outputs there, sends one row a token and
rank back, and sums these. In a group of one nothing is sent and a row is a token.

Letters: N tokens of this rank, K chosen parts a token, D model width, Q rows sent, P rows received,
S pairs (row, part) computed here, X any width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.parallel.differentiable import all_to_all, exchange
from kalmagrove.parallel.groups import Group
from kalmagrove.parallel.traffic import Traffic


def count_parts(index_NK: Tensor, parts: int) -> Tensor:
    """How many rows name each part, int64 [parts]; never waits for the device.

    `torch.bincount` does, for the smallest and the largest number.

    Args:
        index_NK: int64, different in a row but for `parts`, which names none.
    """
    named_NG = index_NK.new_zeros(len(index_NK), parts + 1, dtype=torch.uint8)
    return named_NG.scatter_(1, index_NK, 1)[:, :parts].sum(0)


class Copies(NamedTuple):
    """Copies of rows for the places that they go to, sorted by place and then by row.

    A row has K slots, each of which names a place or none; a copy is made for each that names one.
    """

    place_S: Tensor  # where the copy goes, in the smallest type that holds all places
    slot_S: Tensor  # the copy's slot, row * K + k
    row_S: Tensor  # the row it is a copy of
    by_row_S: Tensor  # the copies in the order of their rows
    start_P: Tensor  # where a row's copies begin in `by_row_S`

    @classmethod
    def to(cls, place_PK: Tensor, places: int, copies: int) -> "Copies":
        """Slots name a place or, with `places`, none; the host knows that `copies` name one.

        A sort takes as long as its keys are wide, so they are as narrow as can be.
        """
        key = torch.uint8 if places < 2**8 else torch.int16 if places < 2**15 else torch.int32
        place_PK = place_PK.to(key)
        place_S, slot_S = (sorted_[:copies] for sorted_ in place_PK.flatten().sort(stable=True))
        rows, slots = place_PK.shape
        copy_S = torch.arange(copies, device=place_PK.device)
        if copies == rows * slots:
            number_S, start_P = slot_S, torch.arange(0, copies, slots, device=place_PK.device)
        else:  # the slots that name a place are numbered in their order
            names_PK = (place_PK < places).long()
            before_PK = (names_PK.flatten().cumsum(0) - names_PK.flatten()).view(rows, slots)
            number_S, start_P = before_PK.flatten()[slot_S], before_PK[:, 0].contiguous()
        by_row_S = torch.empty_like(copy_S).scatter_(0, number_S, copy_S)
        return cls(place_S, slot_S, slot_S // slots, by_row_S, start_P)


def spread(x_PX: Tensor, copies: Copies) -> Tensor:
    """The copies [S, X]."""
    return _Spread.apply(x_PX, copies.row_S, copies.by_row_S, copies.start_P)


def collect(y_SX: Tensor, copies: Copies, weight_S: Tensor | None = None) -> Tensor:
    """Each row's sum over its copies [P, X], weighted, in the dtype of y; zero without copies."""
    return _Collect.apply(y_SX, weight_S, copies.row_S, copies.by_row_S, copies.start_P)


@dataclass(frozen=True)
class Plan:
    """What goes where: made by `preprocess`."""

    group: Group
    traffic: Traffic
    parts: int  # that this rank holds
    part_PK: Tensor  # their numbers on this rank, of the rows to send (in a group of one, receive)
    pairs: int  # of received rows with parts of this rank
    counted: list[int] | None = None  # of each of these parts, if they have been read
    to_ranks: Copies | None = None  # None in a group of one
    send: tuple[int, ...] = ()  # rows for each rank
    receive: tuple[int, ...] = ()

    @torch.compiler.disable  # its result depends on the data
    def read_rows(self) -> list[int]:
        """Pairs of each part of this rank. Waits for the accelerator if `preprocess` did not."""
        if self.counted is not None:
            return self.counted
        return count_parts(self.part_PK, self.parts).tolist()


class Rows(NamedTuple):
    """What `communicate` brought: tokens for the parts of this rank, in pairs with them."""

    x_SD: Tensor  # sorted by part, `pairs.place_S`; `Plan.read_rows` says how many each has
    gate_S: Tensor
    pairs: Copies  # of the received rows


@torch.compiler.disable  # its result depends on the data
@torch.no_grad()
def preprocess(
    index_NK: Tensor, parts: int, group: Group, traffic: Traffic, *, dropless: bool
) -> Plan:
    """Find out which rows go to which rank, and how many come from each.

    Rank r holds the parts [r * parts / R, (r + 1) * parts / R). Reads the counts on the host: one
    synchronisation on an accelerator, after an all-to-all of the counts. In a group of one where
    all choices are made the host knows how many there are, and waits for nothing.

    Args:
        index_NK: numbers of the chosen parts, different in a row; `parts` for a choice that is not
            to be made.
        dropless: there is none of these.
    """
    if group.size == 1 and dropless:
        return Plan(group, traffic, parts, index_NK, index_NK.numel())
    count_G = count_parts(index_NK, parts)
    if group.size == 1:
        counted = count_G.tolist()
        return Plan(group, traffic, parts, index_NK, sum(counted), counted)
    ranks, here = group.size, parts // group.size
    rank_NK = index_NK // here  # `ranks` for a choice that is not to be made
    again_NKK = (rank_NK.unsqueeze(2) == rank_NK.unsqueeze(1)).tril(-1)
    once_NK = rank_NK.masked_fill(again_NKK.any(2), ranks)  # a token goes to a rank once
    send_R = count_parts(once_NK, ranks)
    told = torch.cat([send_R.unsqueeze(1), count_G.view(ranks, here)], 1)
    heard = all_to_all(told, [1] * ranks, [1] * ranks, group, traffic)
    totals = torch.stack([send_R, heard[:, 0]]).flatten()
    numbers = torch.cat([totals, heard[:, 1:].sum(0)]).tolist()
    send, receive, counted = numbers[:ranks], numbers[ranks : 2 * ranks], numbers[2 * ranks :]

    to_ranks = Copies.to(once_NK, ranks, sum(send))
    rank_Q1 = once_NK.flatten()[to_ranks.slot_S].unsqueeze(1)
    index_QK = index_NK[to_ranks.row_S]
    part_QK = (index_QK - here * rank_Q1).masked_fill(index_QK // here != rank_Q1, here)
    way = to_ranks, tuple(send), tuple(receive)
    return Plan(group, traffic, here, part_QK, sum(counted), counted, *way)


def communicate(x_ND: Tensor, gate_NK: Tensor, plan: Plan) -> Rows:
    """Send the tokens and their gates, which gradients come back for, and copy them for the parts.

    Args:
        gate_NK: in a type of its own, which it is sent in.
    """
    x_PD, gate_PK, part_PK = x_ND, gate_NK, plan.part_PK
    if plan.to_ranks is not None:
        way = (plan.send, plan.receive, plan.group, plan.traffic)
        x_PD = exchange(spread(x_ND, plan.to_ranks), *way)
        gate_PK = exchange(spread(gate_NK, plan.to_ranks), *way)
        part_PK = exchange(part_PK.to(torch.int32), *way)
    pairs = Copies.to(part_PK, plan.parts, plan.pairs)
    return Rows(spread(x_PD, pairs), gate_PK.flatten().index_select(0, pairs.slot_S), pairs)


def postprocess(y_SD: Tensor, rows: Rows, plan: Plan) -> Tensor:
    """From the outputs for `rows.x_SD` to each token's gated sum [N, D], in the dtype of y."""
    y_PD = collect(y_SD, rows.pairs, rows.gate_S)
    if plan.to_ranks is None:
        return y_PD
    y_QD = exchange(y_PD, plan.receive, plan.send, plan.group, plan.traffic)
    return collect(y_QD, plan.to_ranks)


def _sum_rows(y_SX: Tensor, by_row_S: Tensor, start_P: Tensor, weight_S: Tensor | None) -> Tensor:
    """Always in the same order, unlike an `index_add` on a GPU, and without [S, X] in between."""
    if not len(by_row_S):
        return y_SX.new_zeros(len(start_P), y_SX.shape[1])
    if weight_S is not None:
        weight_S = weight_S.to(y_SX.dtype)[by_row_S]
    return F.embedding_bag(by_row_S, y_SX, start_P, mode="sum", per_sample_weights=weight_S)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, row_S: Tensor, by_row_S: Tensor, start_P: Tensor) -> Tensor:
        ctx.save_for_backward(by_row_S, start_P)
        return x_PX.index_select(0, row_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        by_row_S, start_P = ctx.saved_tensors
        return _sum_rows(grads[0].contiguous(), by_row_S, start_P, None), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_SX: Tensor,
        weight_S: Tensor | None,
        row_S: Tensor,
        by_row_S: Tensor,
        start_P: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(row_S, *(() if weight_S is None else (y_SX, weight_S)))
        return _sum_rows(y_SX, by_row_S, start_P, weight_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        row_S, *weighted = ctx.saved_tensors
        grad_SX, grad_S = grads[0].index_select(0, row_S), None
        if weighted:
            y_SX, weight_S = weighted
            grad_S = (grad_SX * y_SX).sum(1, dtype=weight_S.dtype)
            grad_SX = grad_SX * weight_S.to(grad_SX.dtype).unsqueeze(1)
        return grad_SX, grad_S, None, None, None

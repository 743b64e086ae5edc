"""The stages of our Triton kernels that have tile candidates, each with what must come out.

`kalmagrove.bench.tune` times the candidates. Letters as in `cases`; S = N * K pairs, sorted by
channel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.bench.ops import EDGE, FUNCTIONS, POLYNOMIAL, channels
from kalmagrove.bench.spec import Case, Inputs, Shape
from kalmagrove_kernels.permute import sort_pairs

Outcome = tuple[Tensor, ...]


class Stage(NamedTuple):
    """One kernel at one shape.

    kind: the entry of the op's table that a winner goes to. current: the tile there now.
    run: the outcome with a tile. exact: the outcome in plain PyTorch, fp32.
    """

    op: str
    name: str
    kind: str
    current: Any
    candidates: list[Any]
    run: Callable[[Any], Outcome]
    exact: Callable[[], Outcome]

    def __str__(self) -> str:
        return f"{self.op} {self.name} {self.kind}"


def stages_of(case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Stage]:
    """The stages of a case's op, on random inputs; none where it has no tiles."""
    makers = {"projection": _projection, "polynomial": _polynomial, "edge_topk": _edge}
    if case.op not in makers or "rows" in case.shape:
        return []
    generator = torch.Generator(device).manual_seed(seed)
    inputs = FUNCTIONS[case.op].inputs(case.shape, generator, dtype)
    return makers[case.op](case.shape, {name: t.detach() for name, t in inputs.items()})


class _Sorted:
    """The plain PyTorch side of the projection's stages: per channel, in fp32."""

    def __init__(self, inputs: Inputs, shape: Shape) -> None:
        self.kept = shape["K"]
        order_S, _, start = sort_pairs(inputs["index_NK"], channels(shape))
        self.order_S = order_S.long()
        self.rows = start.diff().tolist()

    def gathered(self, x_ND: Tensor) -> Tensor:
        return x_ND.float()[self.order_S // self.kept]

    def times(self, x_SA: Tensor, w_CAB: Tensor) -> Tensor:
        parts = zip(x_SA.split(self.rows), w_CAB.float().unbind(), strict=True)
        return torch.cat([x @ w for x, w in parts])

    def products(self, a_SR: Tensor, x_SD: Tensor) -> Tensor:
        parts = zip(a_SR.split(self.rows), x_SD.split(self.rows), strict=True)
        return torch.stack([a.t() @ x for a, x in parts])

    def of_pairs(self, row_SX: Tensor) -> Tensor:
        """From sorted order to that of the pairs."""
        return torch.empty_like(row_SX).index_copy_(0, self.order_S, row_SX)


def _projection(shape: Shape, inputs: Inputs) -> list[Stage]:
    from kalmagrove_kernels.projection import stages, tiles

    x, gate, v, u, dy = (inputs[name].contiguous() for name in ("x", "kept", "v", "u", "dy"))
    kept, rank = shape["K"], shape["R"]
    plain = _Sorted(inputs, shape)
    order_S, _, start_C1 = sort_pairs(inputs["index_NK"], channels(shape))
    gate_S1 = gate.float().flatten()[plain.order_S].unsqueeze(1)
    z_SR = plain.times(plain.gathered(x), v.mT).to(x.dtype)
    z32 = z_SR.float()
    rows_SD = plain.of_pairs(plain.times(gate_S1 * F.silu(z32), u)).to(x.dtype)

    def backward() -> Outcome:
        through_SR = plain.times(plain.gathered(dy), u.mT)
        sigmoid = torch.sigmoid(z32)
        slope = sigmoid * (1 + z32 * (1 - sigmoid))
        dgate_S1 = (through_SR * F.silu(z32)).sum(1, keepdim=True)
        dgate_NK = plain.of_pairs(dgate_S1).view(-1, kept)
        return gate_S1 * F.silu(z32), gate_S1 * through_SR * slope, dgate_NK

    def expanded() -> Tensor:
        return plain.of_pairs(plain.times(gate_S1 * F.silu(z32), u))

    left, right = [z_SR, z_SR], [dy, x]
    where = order_S, start_C1
    run: dict[str, Callable[[Any], Outcome]] = {
        "rank": lambda t: (stages.rank(x, v, *where, kept, tile=t),),
        "rank_backward": lambda t: stages.rank_backward(
            dy, u, z_SR, gate, *where, inner_silu=True, tile=t
        ),
        "expand": lambda t: (stages.expand(z_SR, u, *where, gate, inner_silu=True, tile=t),),
        "fused": lambda t: stages.fused(x, gate, v, u, *where, inner_silu=True, tile=t),
        "weights": lambda t: tuple(stages.weights(left, right, *where, kept, tile=t)),
        "combine": lambda t: (stages.combine(rows_SD, len(x), tile=t),),
    }
    exact: dict[str, Callable[[], Outcome]] = {
        "rank": lambda: (plain.times(plain.gathered(x), v.mT),),
        "rank_backward": backward,
        "expand": lambda: (expanded(),),
        "fused": lambda: (plain.times(plain.gathered(x), v.mT), expanded()),
        "weights": lambda: tuple(plain.products(z32, plain.gathered(t)) for t in right),
        "combine": lambda: (rows_SD.float().view(-1, kept, rows_SD.shape[1]).sum(1),),
    }
    kind = tiles.kind_of(rank, x.dtype)
    return [
        Stage(
            "projection",
            name,
            kind,
            tiles.tile_of(name, rank, x.dtype),
            list(tiles.candidates(name, rank)),
            run[name],
            exact[name],
        )
        for name in tiles.TILES
    ]


def _polynomial(shape: Shape, inputs: Inputs) -> list[Stage]:
    from kalmagrove_kernels.polynomial import materialised, polynomial, tiles

    x, coef, bias, dy = (inputs[name] for name in ("x", "coef", "bias", "dy"))
    precision = "ieee" if x.dtype == torch.float32 else "half"

    def forward() -> Outcome:
        return (polynomial(x, coef, bias, **TRITON_POLYNOMIAL),)

    def exact() -> dict[str, Outcome]:
        x32, coef32 = (t.float().requires_grad_() for t in (x, coef))
        y = materialised(x32, coef32, bias.float(), **POLYNOMIAL)
        dx, dcoef = torch.autograd.grad(y, (x32, coef32), dy.float())
        return {"forward": (y.detach(),), "inputs": (dx,), "coef": (dcoef,)}

    runs = {
        "forward": forward,
        "inputs": _backward(lambda x: polynomial(x, coef, bias, **TRITON_POLYNOMIAL), [x], dy),
        "coef": _backward(lambda c: polynomial(x, c, bias, **TRITON_POLYNOMIAL), [coef], dy),
    }

    def stage(name: str) -> Stage:
        def run(tile: Any) -> Outcome:
            with mock.patch.dict(tiles.TILES, {(name, precision): tile}):
                return runs[name]()

        now, candidates = tiles.TILES[name, precision], list(tiles.CANDIDATES[name])
        kind = f"{precision} J={shape['J']}"
        return Stage("polynomial", name, kind, now, candidates, run, lambda: exact()[name])

    return [stage(name) for name in runs]


def _backward(
    function: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor
) -> Callable[[], Outcome]:
    """The gradients by `leaves` alone, of one graph that stays; it is made when first needed."""
    wanted = [t.clone().requires_grad_() for t in leaves]
    made: list[Tensor] = []

    def gradients() -> Outcome:
        if not made:
            made.append(function(*wanted))
        return torch.autograd.grad(made[0], wanted, dy, retain_graph=True)

    return gradients


TRITON_POLYNOMIAL: dict[str, Any] = POLYNOMIAL | {"backend": "triton"}
TRITON_EDGE: dict[str, Any] = EDGE | {"backend": "triton"}
EDGE_CANDIDATES = {
    "forward": [{"forward_elements": size} for size in (512, 1024, 2048)],
    "backward": [
        {"backward_pairs": pairs, "backward_programs": programs}
        for pairs in (32, 64, 128)
        for programs in (264, 528, 1056)
    ],
}


def _edge(shape: Shape, inputs: Inputs) -> list[Stage]:
    from kalmagrove_kernels.edge import Kept, edge_topk
    from kalmagrove_kernels.edge import triton as op

    weights = [inputs[name] for name in ("h", "coef", "scale")]
    span, k, dy = inputs["range"], shape["K"], inputs["dy"]

    def values(options: dict[str, Any]) -> Callable[..., Kept]:
        return lambda h, coef, scale: edge_topk(h, coef, scale, span, k, **options)

    index_NK = values(EDGE)(*weights).index_NK
    given = {"index_NK": index_NK}

    def gradients(options: dict[str, Any], leaves: list[Tensor]) -> Callable[[], Outcome]:
        return _backward(lambda *w: values(options | given)(*w).value_NK, leaves, dy)

    def magnitudes(options: dict[str, Any]) -> Outcome:
        return (values(options)(*weights).value_NK.abs(),)  # of equal edges, any

    runs = {
        "forward": lambda: magnitudes(TRITON_EDGE),
        "backward": gradients(TRITON_EDGE, weights),
    }
    exact = {
        "forward": lambda: magnitudes(EDGE),
        "backward": gradients(EDGE, [t.float() for t in weights]),
    }

    def stage(name: str) -> Stage:
        candidates = EDGE_CANDIDATES[name]

        def run(tile: dict[str, int]) -> Outcome:
            with mock.patch.dict(op.TILES, tile):
                return runs[name]()

        now = {field: op.TILES[field] for field in candidates[0]}
        return Stage("edge_topk", name, "any", now, candidates, run, exact[name])

    return [stage(name) for name in runs]

"""Feed-forwards on several ranks against the same ones on one, cases as data.

Every rank builds both from one seed. The whole batch goes through the single-process module, a
rank's part of it through the other; outputs, gradients, router state and traffic are compared.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kalmagrove.config import KAN, Edge, Grove, MoE, Parallel
from kalmagrove.nn.baselines import DenseFFN, MoEFFN
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove.parallel import (
    Group,
    Groups,
    all_reduce_max,
    all_reduce_sum,
    is_expert,
    module_shards,
    shard_of,
)
from tests.dist.serving import serve

WIDTH = 6
BATCH, TOKENS = 4, 12


@dataclass(frozen=True)
class Case:
    """One layout of one feed-forward. chosen: parts that a huge bias makes every token choose."""

    kind: str
    tp: int = 1
    cp: int = 1
    ep: int = 1
    sequence: bool = False
    shared: bool = True
    routing: str = "hard"
    basis: str = "bspline"
    base: str = "silu"
    capacity: float | None = None
    top: int = 2
    chosen: tuple[int, ...] = ()
    dtype: str = "float64"


def build(case: Case, groups: Groups) -> Any:
    """The feed-forward, initialised large enough for every gradient to count."""
    torch.manual_seed(5)
    edge = Edge(init_scale=0.5, degree=3, grid=4, basis=case.basis, base=case.base)
    kan = KAN(edges=5, top_k=2, rank=4, routing=case.routing, edge=edge)
    grove = Grove(
        groves=4,
        top_g=case.top,
        edge_manifold=3,
        shared=case.shared,
        z_loss=0.1,
        bias_rate=0.25,
        capacity=case.capacity,
        kan=kan,
    )
    moe = MoE(
        experts=4,
        top_k=case.top,
        hidden=5,
        shared_hidden=6 if case.shared else 0,
        scale=1.5,
        z_loss=0.1,
        bias_rate=0.25,
        capacity=case.capacity,
    )
    ffn = {
        "dense": lambda: DenseFFN(WIDTH, 6, groups),
        "kan": lambda: KANLayer(WIDTH, kan, groups),
        "grove": lambda: GroveLayer(WIDTH, grove, groups),
        "moe": lambda: MoEFFN(WIDTH, moe, groups),
    }[case.kind]()
    ffn.init_weights(0.5, 0.5)
    if case.kind == "grove":
        with torch.no_grad():
            ffn.gate_bias.copy_(torch.linspace(-1, 1, 4))
    for part in case.chosen:
        ffn.bias[part] = 100.0
    return ffn.to(getattr(torch, case.dtype))


@dataclass(frozen=True)
class Place:
    """Which part of the batch [B, T, ...] a rank's stream holds, and which it routes itself."""

    groups: Groups

    def stream(self, whole: Tensor) -> Tensor:
        groups = self.groups
        whole = whole.chunk(groups.dp.size)[groups.dp.rank]
        whole = whole.chunk(groups.cp.size, 1)[groups.cp.rank]
        return self._over_tp(whole) if groups.sequence else whole

    def own(self, whole: Tensor) -> Tensor:
        return self.stream(whole) if self.groups.sequence else self._over_tp(self.stream(whole))

    def _over_tp(self, x: Tensor) -> Tensor:
        return x.chunk(self.groups.tp.size, 1)[self.groups.tp.rank]


@cache
def layout(tp: int, cp: int, ep: int) -> Groups:
    """Groups of each layout once: each new one costs threads and half a second."""
    groups = Groups.init(Parallel(tp=tp, cp=cp, ep=ep), torch.device("cpu"))
    Groups.reset()
    return groups


def compare(case: Case) -> dict[str, Any]:
    """The largest errors over all ranks, and what is tagged as a piece."""
    groups = replace(layout(case.tp, case.cp, case.ep), sequence=case.sequence)
    ffn, single, place = build(case, groups), build(case, Groups.single()), Place(groups)
    errors = Errors()
    pieces = dict(module_shards(ffn))
    for name, tensor in ffn.state_dict().items():
        whole = single.state_dict()[name]
        errors.add("initial", tensor, pieces[name].cut(whole) if name in pieces else whole)

    torch.manual_seed(9)
    dtype = getattr(torch, case.dtype)
    x, weight = torch.randn(2, BATCH, TOKENS, WIDTH, dtype=dtype)
    x.requires_grad_()
    out, aux, dropped, loads = reference(single, x, case, groups)
    ((out * weight).sum() + aux).backward()

    own_x = place.stream(x.detach()).clone().requires_grad_()
    own_out, own_aux = ffn(own_x)
    loss = (own_out * place.stream(weight)).sum() + own_aux / groups.dp_cp.size
    loss.backward()
    errors.add("output", own_out, place.stream(out))
    errors.add("input gradient", own_x.grad, place.stream(x.grad))
    missing = [name for name, p in ffn.named_parameters() if p.grad is None]
    errors.add("aux loss", all_reduce_sum(own_aux.detach(), groups.dp_cp) / groups.dp_cp.size, aux)
    gradients(ffn, single, groups, errors)
    if hasattr(ffn, "balance"):
        metrics = ffn.metrics
        mean = all_reduce_sum(metrics["load"].clone(), groups.world) / groups.world.size
        errors.add("load", mean, loads)
        share = metrics.get("dropped", torch.zeros(()))
        errors.add("dropped", all_reduce_sum(share.clone(), groups.world), dropped)
        traffic(ffn, single, x.detach(), case, place, errors)
        ffn.balance(groups), single.balance(Groups.single())
        errors.add("bias", ffn.bias, single.bias)
        errors.add("counted", ffn.load, torch.zeros(4))
    return {
        "errors": errors.over(groups.world),
        "missing": missing,
        "dropped": float(dropped),
        "tags": sorted(name for name, p in ffn.named_parameters() if shard_of(p) is not None),
        "experts": sorted(name for name, p in ffn.named_parameters() if is_expert(p)),
        "buffers": sorted(name for name in pieces if name not in dict(ffn.named_parameters())),
    }


class Errors:
    """The largest error of each thing compared, relative to its largest entry."""

    def __init__(self) -> None:
        self.here: dict[str, float] = {}

    def add(self, name: str, ours: Tensor, expected: Tensor) -> None:
        ours, expected = ours.detach().double(), expected.detach().double()
        assert ours.shape == expected.shape, (name, ours.shape, expected.shape)
        error = torch.zeros(())
        if ours.numel():
            error = (ours - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        self.here[name] = max(float(error.nan_to_num(nan=1e9)), self.here.get(name, 0.0))

    def over(self, group: Group) -> dict[str, float]:
        """Of all ranks of the group, which have added the same names."""
        worst = all_reduce_max(torch.tensor(list(self.here.values()), dtype=torch.float64), group)
        return dict(zip(self.here, worst.tolist(), strict=True))


def reference(
    single: nn.Module, x: Tensor, case: Case, groups: Groups
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, auxiliary loss, sum over ranks of the dropped shares, and load, on one process.

    A capacity goes by the tokens of one rank: then each rank's go through the module by themselves.
    """
    if case.capacity is None:
        out, aux = single(x)
        load = single.metrics.get("load", torch.zeros(4))
        return out, aux, torch.zeros(()), load
    columns = groups.cp.size * groups.tp.size
    whole, aux, dropped, load = [], torch.zeros(()), torch.zeros(()), torch.zeros(4)
    for rows in x.chunk(groups.dp.size):
        outputs = []
        for piece in rows.chunk(columns, 1):
            out, piece_aux = single(piece)
            outputs.append(out)
            aux = aux + piece_aux / groups.world.size
            dropped = dropped + single.metrics["dropped"]
            load = load + single.metrics["load"] / groups.world.size
        whole.append(torch.cat(outputs, 1))
    return torch.cat(whole), aux, dropped, load


def gradients(ffn: nn.Module, single: nn.Module, groups: Groups, errors: Errors) -> None:
    """Summed over the ranks that hold the same: dense parameters over dp_cp, experts' over theirs.

    Whole parameters of a tp group are compared on each of its ranks, so they are alike there.
    """
    theirs = dict(single.named_parameters())
    for name, p in ffn.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        all_reduce_sum(grad, groups.expert_dp if is_expert(p) else groups.dp_cp)
        shard, expected = shard_of(p), theirs[name].grad
        errors.add(f"gradient of {name}", grad, expected if shard is None else shard.cut(expected))


def traffic(ffn: Any, single: Any, x: Tensor, case: Case, place: Place, errors: Errors) -> None:
    """Bytes of a forward and a backward pass against a count by hand."""
    sent, seconds = ffn.traffic.drain()
    ep = place.groups.ep
    assert (seconds() > 0) == (ep.size > 1)
    again = ffn.traffic.drain()
    assert (again.bytes, again.seconds()) == (0, 0.0)
    single.eval()  # does not count its choices once more
    rank = single.route(place.own(x).flatten(0, 1))[0] // (4 // ep.size)
    rows_to = torch.stack([(rank == r).any(1).sum() for r in range(ep.size)])
    table = [torch.zeros_like(rows_to) for _ in range(ep.size)]
    if ep.size > 1:
        dist.all_gather(table, rows_to, group=ep.handle)
    others = [r for r in range(ep.size) if r != ep.rank]
    out = sum(int(rows_to[r]) for r in others)
    back = sum(int(table[r][ep.rank]) for r in others)
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    hidden, gates, numbers = WIDTH * size, case.top * size, case.top * 4
    counts = len(others) * 8 * (1 + 4 // ep.size)
    forward = out * (hidden + gates + numbers) + back * hidden
    backward = out * hidden + back * (hidden + gates)
    expected = torch.tensor(float(counts + forward + backward))
    errors.add("bytes", torch.tensor(float(sent)), expected)


def compare_all(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: compare(Case(**fields)) for name, fields in cases.items()}


WORKERS = {"compare_all": compare_all}

if __name__ == "__main__":
    serve(WORKERS)

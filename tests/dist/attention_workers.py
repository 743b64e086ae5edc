"""Attentions under tensor, sequence and context parallelism, compared with one process.

Run by `tests.dist.harness` with `module="tests.dist.attention_workers"`.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalmagrove.config import Model, Parallel
from kalmagrove.nn.attention import build_attention
from kalmagrove.parallel import Group, Groups, all_gather, all_reduce_sum, own_piece, shard_of
from tests.dist.serving import serve

D_MODEL = 24


def some_model(kind: str, options: dict[str, Any], backend: str = "reference") -> Model:
    sizes: dict[str, dict[str, Any]] = {
        "ada": {"heads": 4, "head_dim": 6, "chunk": 4},
        "softmax": {"heads": 4, "kv_heads": 4, "head_dim": 6},
        "mla": {"heads": 4, "kv_rank": 6, "nope_dim": 4, "rope_dim": 2, "v_dim": 5},
    }
    sizes[kind] |= options
    kan = {"edges": 8, "rank": 4}
    tree = {
        "name": "test", "d_model": D_MODEL, "layers": 1, "backend": backend,
        "attention": {"pattern": [kind], **sizes},
        "ffn": {
            "pattern": ["dense"], "dense": {"hidden": 8},
            "moe": {"experts": 2, "top_k": 1, "hidden": 8},
            "kan": kan, "grove": {"groves": 2, "top_g": 1, "kan": kan},
        },
    }  # fmt: skip
    return Model.model_validate_json(json.dumps(tree))


def some_layer(model: Model, groups: Groups) -> nn.Module:
    torch.manual_seed(1)
    layer = build_attention(model, 0, groups)
    layer.init_weights(0.3, 0.3)
    return layer


def cut(parameter: Tensor, whole: Tensor) -> Tensor:
    shard = shard_of(parameter)
    return whole if shard is None else shard.cut(whole)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number where that is above 1."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert found.dtype == wanted.dtype
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def unlike(x: Tensor, group: Group) -> float:
    """The largest difference from what the group's first rank holds."""
    every = all_gather(x[None], group, 0)
    return float((every - every[0]).abs().max())


def segments_of(documents: list[list[int]] | None) -> Tensor | None:
    """[B, S] from the lengths of every row's documents."""
    if documents is None:
        return None
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    return torch.stack(rows).int()


def run(
    layer: nn.Module, x: Tensor, segments: Tensor | None, weight: Tensor, again: bool
) -> Tensor:
    y = checkpoint(layer, x, segments, use_reentrant=False) if again else layer(x, segments)
    (y * weight).sum().backward()
    return y.detach()


@dataclass(frozen=True)
class Case:
    """documents: the lengths of the documents in each of two rows. again: recompute in the backward
    pass, as activation checkpointing does. backend: of the ranks' layers, not of the reference."""

    kind: str
    options: dict[str, Any]
    tokens: int = 24
    documents: list[list[int]] | None = None
    dtype: str = "float64"
    again: bool = False
    backend: str = "reference"


class Reference:
    """What one process computes of a case, with parameters away from where they start."""

    def __init__(self, case: Case) -> None:
        dtype = getattr(torch, case.dtype)
        layer = some_layer(some_model(case.kind, case.options), Groups.single())
        self.start = {name: p.detach().clone() for name, p in layer.named_parameters()}
        layer = layer.to(dtype)
        self.parameters = dict(layer.named_parameters())
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        self.x, self.weight = torch.randn(2, 2, case.tokens, D_MODEL, dtype=dtype)
        self.segments = segments_of(case.documents)
        self.x.requires_grad_()
        self.y = run(layer, self.x, self.segments, self.weight, False)


def compare(groups: Groups, case: Case, whole: Reference) -> dict[str, float]:
    """Distances of everything that this rank computes from the reference."""
    layer = some_layer(some_model(case.kind, case.options, case.backend), groups)
    pieces = dict(layer.named_parameters())
    assert pieces.keys() == whole.parameters.keys()
    found = {f"init {n}": distance(p.detach(), cut(p, whole.start[n])) for n, p in pieces.items()}
    layer = layer.to(whole.x.dtype)
    with torch.no_grad():
        for name, p in pieces.items():
            p.copy_(cut(p, whole.parameters[name]))

    def own(x: Tensor) -> Tensor:
        x = own_piece(x, groups.cp, 1)
        return own_piece(x, groups.tp, 1) if groups.sequence else x

    x = own(whole.x.detach()).requires_grad_()
    segments = None if whole.segments is None else own_piece(whole.segments, groups.cp, 1)
    y = run(layer, x, segments, own(whole.weight), case.again)
    assert x.grad is not None
    assert whole.x.grad is not None
    found["output"] = distance(y, own(whole.y))
    found["input"] = distance(x.grad, own(whole.x.grad))
    for name, p in pieces.items():
        whole_grad = whole.parameters[name].grad
        assert p.grad is not None, name
        assert whole_grad is not None, name
        grad = all_reduce_sum(p.grad.clone(), groups.cp)
        found[f"grad {name}"] = distance(grad, cut(p, whole_grad))
        if shard_of(p) is None:
            found[f"alike {name}"] = unlike(p.grad, groups.tp)
    return found


def attentions(
    layouts: dict[str, dict[str, Any]], cases: dict[str, dict[str, Any]], plan: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """The largest distances on any rank, of the cases planned for each layout."""
    results: dict[str, dict[str, float]] = {}
    wholes: dict[str, Reference] = {}
    for layout, planned in plan.items():
        groups = Groups.init(Parallel(**layouts[layout]), torch.device("cpu"))
        for name in planned:
            case = Case(**cases[name])
            if name not in wholes:
                wholes[name] = Reference(case)
            found = compare(groups, case, wholes[name])
            ranks: list[Any] = [None] * groups.world.size
            dist.all_gather_object(ranks, found)
            results[f"{layout}: {name}"] = {key: max(r[key] for r in ranks) for key in found}
        Groups.reset()
    return results


WORKERS: dict[str, Any] = {"attentions": attentions}

if __name__ == "__main__":
    serve(WORKERS)

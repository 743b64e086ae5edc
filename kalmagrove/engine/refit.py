"""Spline grids that follow their data: one that too much of it lies outside of is refitted.

`fit` calls `refit_grids` every `engine.refit_every` steps, after the update.
Letters: N tokens, M edges.
"""

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from kalmagrove.engine.compat import master_weight, set_weight
from kalmagrove.engine.engine import Batch, Engine
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.parallel import all_gather_object, broadcast_object, is_expert, shard_of
from kalmagrove.track.records import GridRefit

log = logging.getLogger(__name__)

Seen = dict[int | None, Tensor]  # pre-activations [N, M] by grove; None: the one layer


@torch.no_grad()
def refit_grids(engine: Engine, batch: Batch) -> dict[str, GridRefit]:
    """Refit every grid of whose pre-activations more than `edge.refit_above` is out of range.

    The first of the ranks that hold a grid fits it to what it sees; the others take over its
    result, bit for bit. All data-parallel ranks look at the first one's `batch`: with the first
    micro-batch of a step their number plays no part. (Of a row split over tensor- or
    context-parallel ranks that rank may see a piece only.) Optimizer moments stay. A refit that
    fails leaves its grid as it was, with a warning. Collective.

    Args:
        batch: this rank's; a forward pass in evaluation mode is made over the first rank's.
    Returns:
        What was done, by layer ("3"), grove ("3.0") and shared grove ("3.shared"); the same on all
        ranks.
    """
    edges = {
        path: module
        for path, module in engine.module.named_modules()
        if isinstance(module, EdgeActivation) and module.config.refit_above is not None
    }
    if not edges:
        return {}
    groups = engine.groups
    holders = {
        path: groups.expert_dp if is_expert(edge.coef) else groups.world
        for path, edge in edges.items()
    }
    own = {path: edge for path, edge in edges.items() if holders[path].rank == 0}
    seen = _look(engine, broadcast_object(batch, groups.dp), own)
    found_here: dict[str, GridRefit] = {}
    anywhere = {path for paths in all_gather_object(list(seen), groups.world) for path in paths}
    for path in sorted(anywhere):
        edge, holder = edges[path], holders[path]
        coef = master_weight(edge.coef)
        found = _refit(path, edge, coef, seen[path]) if path in seen else {}
        coef, span, found = broadcast_object((coef.cpu(), edge.range.cpu(), found), holder)
        if found:
            set_weight(edge.coef, coef.to(groups.device), groups)
            edge.range.copy_(span)
        found_here |= found
    done: dict[str, GridRefit] = {}
    for found in all_gather_object(found_here, groups.world):
        done |= found
    return done


def _look(engine: Engine, batch: Batch, edges: Mapping[str, EdgeActivation]) -> dict[str, Seen]:
    """The pre-activations of the grids to refit. All ranks make the forward pass, for ZeRO 3."""
    seen: dict[str, Seen] = {}

    def keep(path: str, h_NM: Tensor, grove: int | None) -> None:
        edge, h_NM = edges[path], h_NM.detach()
        allowed = edge.config.refit_above
        if allowed is not None and float(edge.outside(h_NM, grove)) > allowed * h_NM.numel():
            seen.setdefault(path, {})[grove] = h_NM

    for path, edge in edges.items():
        edge.watch = partial(keep, path)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code has been made unwatched
            engine.eval_loss(batch)
    finally:
        for edge in edges.values():
            edge.watch = None
    return seen


def _refit(path: str, edge: EdgeActivation, coef: Tensor, seen: Seen) -> dict[str, GridRefit]:
    """Refit `coef` and the ranges in place; what fails is left out."""
    found = {}
    layer = path.removeprefix("blocks.").removesuffix(".edge").replace(".ffn", "")
    shard = shard_of(edge.coef)
    first = shard.start if shard is not None else 0
    for grove, h_NM in seen.items():
        name = layer if grove is None else f"{layer}.{first + grove}"
        before = edge.outside(h_NM, grove)
        try:
            error = edge.refit(h_NM, grove, coef=coef)
        except (ValueError, RuntimeError) as problem:  # also no solution, and no memory
            log.warning("the grid of layer %s stays as it was: %s", name, problem)
            continue
        after = edge.outside(h_NM, grove)
        found[name] = GridRefit(
            float(before) / h_NM.numel(), float(after) / h_NM.numel(), float(error)
        )
    return found

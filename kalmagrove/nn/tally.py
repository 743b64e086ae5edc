"""Metrics of many layers at once.

A layer that counts has a `tally` of its last forward pass, and `shares` that makes metrics of it,
or of the tallies of several layers in a leading dimension: a dozen small kernels for all of them
instead of a dozen for each, which would take longer than what they measure.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Tally = dict[str, Tensor]


def metrics_of(modules: Iterable[Any]) -> list[dict[str, Tensor]]:
    """The `metrics` of each module; those with a `tally` of the same shapes share the work."""
    found: list[dict[str, Tensor]] = []
    alike: dict[Any, list[tuple[dict[str, Tensor], Tally]]] = {}
    for module in modules:
        tally: Tally | None = getattr(module, "tally", None)
        found.append(dict(module.metrics) if tally is None else {})
        if tally:
            kind = type(module), *((name, value.shape) for name, value in tally.items())
            alike.setdefault(kind, []).append((found[-1], tally))
    for (layer, *_), members in alike.items():
        _, first = members[0]
        stacked = {name: torch.stack([tally[name] for _, tally in members]) for name in first}
        for name, values in layer.shares(stacked).items():
            for (own, _), value in zip(members, values.unbind(), strict=True):
                own[name] = value
    return found

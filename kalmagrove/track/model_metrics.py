"""Metrics of model parts (router loads, out-of-range rates) as one tensor, then as scalars.

`Meters` packs them with the loss into a single reduction and transfer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one flat tensor."""

    sizes: tuple[tuple[str, int], ...]

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        parts = packed.split([size for _, size in self.sizes])
        return {name: part for (name, _), part in zip(self.sizes, parts, strict=True)}


def pack_metrics(metrics: Mapping[str, Tensor], device: torch.device) -> tuple[Layout, Tensor]:
    """All values end to end, fp64 on `device`, without waiting for it: a copy a kind of tensor."""
    kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, value in metrics.items():
        kind = value.device, value.dtype
        kinds.setdefault(kind, {})[name] = value.detach().flatten()
    layout = Layout(tuple((name, v.numel()) for kind in kinds.values() for name, v in kind.items()))
    flat = [torch.cat(list(own.values())).to(device, torch.float64) for own in kinds.values()]
    return layout, torch.cat(flat)


def split_metrics(metrics: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ranks take the mean of, and what they take the maximum of.

    A vector called `load` (tokens that groves received) is the same groves on every rank: its mean
    is taken. Other vectors may be of each rank's own heads: they become NAME_mean and NAME_max.
    """
    means: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for name, value in metrics.items():
        if value.ndim == 0 or name.rpartition(".")[2] == "load":
            means[name] = value
        else:
            means[f"{name}_mean"], largest[f"{name}_max"] = value.mean(), value.amax()
    return means, largest


def to_scalars(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Plain numbers of metrics that are reduced over ranks and on the host.

    A `load` becomes load_cv (standard deviation over mean: 0 is even) and load_max (largest over
    mean) of all ranks' tokens; figures of these names, of one rank's tokens, give way to them. A
    dotted prefix (`3.load`: layer 3) is kept, and the mean over all prefixes is added under the
    bare name.
    """
    found = {name: value.item() for name, value in metrics.items() if value.numel() == 1}
    for name, value in metrics.items():
        if value.numel() > 1 and value.any():  # zeros: nothing was routed
            mean = value.mean().item()
            found[f"{name}_cv"] = value.std(correction=0).item() / mean
            found[f"{name}_max"] = value.max().item() / mean
    over_prefixes: dict[str, list[float]] = {}
    for name, number in found.items():
        prefix, _, last = name.rpartition(".")
        if prefix:
            over_prefixes.setdefault(last, []).append(number)
    means = {name: sum(values) / len(values) for name, values in over_prefixes.items()}
    return {**found, **means}


def grove_shares(metrics: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Each grove's or expert's part of its layer's tokens, by layer; {}: nothing was routed."""
    loads = {
        layer: value
        for name, value in metrics.items()
        for layer, _, last in [name.rpartition(".")]
        if last == "load" and value.any()
    }
    return {
        layer: [round(share, 4) for share in (load / load.sum()).tolist()]
        for layer, load in loads.items()
    }

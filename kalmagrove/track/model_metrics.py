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
    """All values end to end, fp64 on `device`, without waiting for it."""
    flat = {
        name: value.detach().to(device, torch.float64).flatten() for name, value in metrics.items()
    }
    layout = Layout(tuple((name, value.numel()) for name, value in flat.items()))
    return layout, torch.cat(list(flat.values()))


def to_scalars(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Plain numbers of metrics already on the host.

    A vector called `load` (tokens a grove received) becomes load_cv (standard deviation over mean:
    0 is even) and load_max (largest over mean); other vectors become NAME_mean and NAME_max. A
    dotted prefix (`3.load`: layer 3) is kept, and the mean over all prefixes is added under the
    bare name.
    """
    found: dict[str, float] = {}
    over_prefixes: dict[str, list[float]] = {}
    for name, value in metrics.items():
        prefix, dot, last = name.rpartition(".")
        for scalar, number in _reduce(last, value).items():
            if f"{prefix}{dot}{scalar}" in metrics and value.numel() > 1:
                continue  # the model gives the figure itself
            found[f"{prefix}{dot}{scalar}"] = number
            if prefix:
                over_prefixes.setdefault(scalar, []).append(number)
    means = {name: sum(values) / len(values) for name, values in over_prefixes.items()}
    return {**found, **means}


def _reduce(name: str, value: Tensor) -> dict[str, float]:
    if value.numel() == 1:
        return {name: value.item()}
    mean = value.mean().item()
    if name == "load":
        if mean == 0:
            return {}
        spread = value.std(correction=0).item()
        return {"load_cv": spread / mean, "load_max": value.max().item() / mean}
    return {f"{name}_mean": mean, f"{name}_max": value.max().item()}

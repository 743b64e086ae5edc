"""Which parameters are decayed, and which optimizer moves them.

Read by `build_engine`. A module tags its parameters with `p.kind`; see `parameter_kind`.
"""

from typing import Any

from torch import nn

from kalmagrove.config import ConfigError, Optim
from kalmagrove.parallel import shard_of

ALIGNMENT = 8  # elements: 16 bytes in bf16, what Triton kernels assume of a pointer
KINDS = ("matrix", "embedding", "spline", "norm", "bias", "decay", "kernel")


def parameter_kind(parameter: nn.Parameter) -> str:
    """The parameter's tag, or "matrix" for two and more dimensions, "bias" for fewer."""
    return getattr(parameter, "kind", None) or ("matrix" if parameter.ndim >= 2 else "bias")


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Optimizer groups, in a fixed order, without empty ones.

    Weight decay acts on matrices and embeddings, and on spline coefficients with
    `optim.decay_splines`. With Muon the matrices form a group of their own (`muon=True`) with
    `optim.muon_lr`. Groves and experts that DeepSpeed must reduce over ranks of their own
    (`compat.tag_parallel`) form groups of their own too.

    Each group has: label (unique), params, lr, base_lr (what the schedule multiplies),
    weight_decay, muon; those of groves also moe=True and name, for DeepSpeed.
    """
    decayed = {"matrix", "embedding"} | ({"spline"} if optim.decay_splines else set())
    groups: dict[tuple[str, str | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = parameter_kind(parameter)
        assert kind in KINDS, f"{name} is tagged with the unknown kind {kind!r}"
        if not parameter.requires_grad:
            continue
        label = "decay" if kind in decayed else "no_decay"
        if optim.kind == "muon" and kind == "matrix" and parameter.ndim >= 2:
            label = "muon"
        experts = getattr(parameter, "group_name", None)
        groups.setdefault((label, experts), []).append(parameter)
    if not groups:
        raise ConfigError("model", type(model).__name__, "has no trainable parameter")
    order = sorted(
        groups, key=lambda key: (key[1] or "", ("muon", "decay", "no_decay").index(key[0]))
    )
    return [
        {
            "label": label + ("" if experts is None else ".experts") + suffix,
            "params": params,
            "lr": optim.muon_lr if label == "muon" else optim.lr,
            "base_lr": optim.muon_lr if label == "muon" else optim.lr,
            "weight_decay": 0.0 if label == "no_decay" else optim.weight_decay,
            "muon": label == "muon",
            **({} if experts is None else {"moe": True, "name": experts}),
        }
        for label, experts in order
        for suffix, params in _aligned(groups[label, experts])
    ]


def _aligned(members: list[nn.Parameter]) -> list[tuple[str, list[nn.Parameter]]]:
    """Split a group so that ZeRO, which lays a group's parameters end to end, aligns each of them.

    A parameter whose size is no multiple of `ALIGNMENT` stands alone. Otherwise those behind it lie
    askew, and a block compiled for one layer's fails on another's ("misaligned address"). So does a
    piece that has another size on other ranks, as all ranks must form the same groups.
    """
    odd = [p for p in members if _stands_alone(p)]
    even = [p for p in members if not _stands_alone(p)]
    split = [(f".{i}", [p]) for i, p in enumerate(odd)]
    return [("", even), *split] if even else split


def _stands_alone(parameter: nn.Parameter) -> bool:
    shard = shard_of(parameter)
    return bool(parameter.numel() % ALIGNMENT) or (shard is not None and not shard.even)

"""Puts other feed-forwards into the blocks of a pretrained model, and takes them out again.

A swapped model's config says under `kalmagrove` what was swapped, so that `files` can rebuild it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from kalmagrove.config.errors import CheckpointError, ConfigError
from kalmagrove.retrofit.structure import RECORD, Structure, find

VERSION = 1
MODEL_TYPE = "kalmagrove_retrofit"
ARCHITECTURE = "RetrofitForCausalLM"
Description = dict[str, Any]
Rebuild = Callable[[Description, int], nn.Module]


def rebuild_kan(description: Description, width: int) -> nn.Module:
    """{"kind": "kan", "config": a tree of `kalmagrove.config.retrofit`}."""
    from kalmagrove.config.retrofit import feedforward_of
    from kalmagrove.retrofit.feedforward import build_feedforward

    if set(description) != {"kind", "config"}:
        raise ConfigError("description", description, "must have the keys kind and config alone")
    return build_feedforward(feedforward_of(description["config"], "description.config"), width)


def rebuild_swiglu(description: Description, width: int) -> nn.Module:
    """{"kind": "swiglu", "hidden": its inner width}."""
    from kalmagrove.retrofit.mlp import SwiGLU

    hidden = description.get("hidden")
    if set(description) != {"kind", "hidden"} or not isinstance(hidden, int) or hidden < 1:
        rule = "must have the keys kind and hidden alone, hidden a positive integer"
        raise ConfigError("description", description, rule)
    return SwiGLU(width, hidden)


# `kind` of a description -> what makes an untrained module D -> D of it.
REBUILDERS: dict[str, Rebuild] = {"kan": rebuild_kan, "swiglu": rebuild_swiglu}


class Build(Protocol):
    def __call__(self, width: int, dtype: torch.dtype, device: torch.device) -> nn.Module: ...


class Retrofitted:
    """Mixed into a model class: swaps when built from a swapped config, and saves as such."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, getattr(config, RECORD))  # type: ignore[arg-type]

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        model: Any = super()
        if kwargs.get("push_to_hub"):
            rule = "is not offered for a retrofitted model"
            raise ConfigError("push_to_hub", True, rule, "save it, then upload the folder")
        model.save_pretrained(save_directory, is_main_process, **kwargs)
        if model.should_save_on_this_rank(is_main_process):
            wrap_config(Path(save_directory) / "config.json")

    def __reduce__(self) -> tuple[Any, ...]:
        return empty, (type(self).__mro__[2],), vars(self)  # the class itself has no module


def empty(base: Any) -> Any:
    """A model without attributes, for copies and pickles to fill."""
    kind = retrofit_class(base)
    return kind.__new__(kind)


@cache
def retrofit_class(base: Any) -> Any:
    """`base` with `Retrofitted` mixed in; its models are still instances of `base`."""
    return type(f"Retrofit{base.__name__}", (Retrofitted, base), {"__module__": __name__})


def wrap_config(path: Path) -> None:
    """Moves the base model's config into `base`, so that none mistakes the folder for its type."""
    base = json.loads(path.read_text())
    record = base.pop(RECORD)
    base["architectures"] = [name.removeprefix("Retrofit") for name in base["architectures"]]
    whole = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "base": base}
    for key in ("dtype", "transformers_version"):
        if key in base:
            whole[key] = base[key]
    path.write_text(json.dumps(whole | {RECORD: record}, indent=2) + "\n")


@dataclass
class Swapped:
    """A model with other feed-forwards, and the ones it had."""

    model: nn.Module
    structure: Structure
    blocks: tuple[int, ...]
    base: type[nn.Module]  # the model's class before
    originals: dict[int, nn.Module] = field(repr=False)

    def restore(self) -> nn.Module:
        """The model as it was: the same modules, class and config."""
        if not self.originals:
            raise ConfigError("model", self.base.__name__, "is already restored")
        for number, original in self.originals.items():
            block = self.structure.blocks[number]
            _, device = placement(getattr(block, self.structure.feed_forward))
            if device != placement(original)[1]:
                original.to(device)
            setattr(block, self.structure.feed_forward, original)
        delattr(self.model.config, RECORD)
        self.model.__class__ = self.base
        self.originals = {}
        return self.model


def swap(
    model: nn.Module, blocks: Sequence[int], build: Build, description: Description
) -> Swapped:
    """Replaces the feed-forwards of `blocks` by `build(width, dtype, device)`.

    `description` must rebuild the same module by `rebuild`. `find(model).select(last=5)` gives
    the last five blocks. `model` is changed in place; from then on its `save_pretrained` writes
    what `files.load` and AutoModelForCausalLM read.
    """
    if getattr(model.config, RECORD, None) is not None:
        raise ConfigError("model", type(model).__name__, "is swapped already", "restore it first")
    structure = find(model)
    chosen = structure.select(blocks)
    described(description)
    made: dict[int, nn.Module] = {}
    originals: dict[int, nn.Module] = {}
    for number in chosen:
        originals[number] = getattr(structure.blocks[number], structure.feed_forward)
        dtype, device = placement(originals[number])
        made[number] = build(structure.width, dtype, device)
    same_shapes(made[chosen[0]], description, structure.width)
    record = {
        "version": VERSION,
        "blocks": list(chosen),
        "description": json.loads(json.dumps(description)),
        "path": structure.path,
        "feed_forward": structure.feed_forward,
        "inner": structure.inner,
    }
    base: Any = type(model)
    model.__class__ = retrofit_class(base)
    setattr(model.config, RECORD, record)
    for number, module in made.items():
        module.train(originals[number].training)
        setattr(structure.blocks[number], structure.feed_forward, module)
    return Swapped(model, structure, chosen, base, originals)


def install(model: nn.Module, record: dict[str, Any]) -> None:
    """Puts untrained modules where `record` says; weights come afterwards."""
    structure = find(model)
    for number in structure.select(record["blocks"]):
        block = structure.blocks[number]
        old = getattr(block, structure.feed_forward)
        dtype, device = placement(old)
        module = rebuild(record["description"], structure.width).to(device=device, dtype=dtype)
        setattr(block, structure.feed_forward, module.train(old.training))


def check_record(record: Any) -> None:
    """CheckpointError unless `record` is one this version can rebuild."""
    if not isinstance(record, dict) or "version" not in record:
        raise CheckpointError(f"config.json has no {RECORD}.version: not a retrofitted model")
    if record["version"] != VERSION:
        raise CheckpointError(
            f"{RECORD}.version={record['version']} must be {VERSION}; "
            "load it with the release that wrote it"
        )
    wanted = {"blocks", "description", "path", "feed_forward", "inner"}
    if missing := sorted(wanted - set(record)):
        raise CheckpointError(f"{RECORD} of config.json lacks {', '.join(missing)}")
    kind = record["description"].get("kind")
    if kind not in REBUILDERS:
        raise CheckpointError(
            f"{RECORD}.description.kind={kind} must be one of {sorted(REBUILDERS)}; "
            "add it to kalmagrove.retrofit.REBUILDERS before loading"
        )


def rebuild(description: Description, width: int) -> nn.Module:
    """An untrained module D -> D on the CPU, even where another default device is set."""
    with torch.device("cpu"):
        return REBUILDERS[description["kind"]](description, width)


def described(description: Description) -> None:
    """ConfigError unless `description` survives JSON and has a rebuilder."""
    try:
        same = json.loads(json.dumps(description)) == description
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError("description", description, "must be made of JSON values")
    kind = description.get("kind")
    if kind not in REBUILDERS:
        rule = f"must be one of {sorted(REBUILDERS)}"
        raise ConfigError(
            "description.kind", kind, rule, "add it to kalmagrove.retrofit.REBUILDERS"
        )


def same_shapes(module: nn.Module, description: Description, width: int) -> None:
    """ConfigError unless `description` gives the tensors of `module`: found now, not at a load."""
    with torch.random.fork_rng(devices=[]):
        other = rebuild(description, width)
    shapes, wanted = (
        {name: tuple(tensor.shape) for name, tensor in part.state_dict().items()}
        for part in (other, module)
    )
    differ = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))
    if differ:
        rule = f"must rebuild the module that was built; these tensors differ: {', '.join(differ)}"
        raise ConfigError("description", description, rule)


def placement(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """(dtype, device) of the first floating-point parameter."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return torch.get_default_dtype(), torch.device("cpu")

"""Which parameters of a retrofitted model train, and where its backward pass stops.

Runs after `swap` and before the optimizer is made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from kalmagrove.config.errors import ConfigError
from kalmagrove.retrofit.structure import Structure, is_norm

Embeddings = Literal["frozen", "tied", "head_only"]
Norms = Literal["blocks", "all", "frozen"]


@dataclass(frozen=True)
class Trainable:
    """What trains, in parameters; a shared one counts once."""

    trainable: int
    total: int
    blocks: tuple[int, ...]
    parts: dict[str, int]  # trainable: attention, feed_forward, norms, embeddings, head
    cut: bool  # whether the backward pass stops below the first of `blocks`
    notes: tuple[str, ...] = ()


class Cut:
    """A forward pre-hook that passes tensors on without their graph."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        return tuple(map(detach, args)), {key: detach(value) for key, value in kwargs.items()}


def freeze(
    model: nn.Module,
    structure: Structure,
    blocks: Sequence[int],
    embeddings: Embeddings = "tied",
    norms: Norms = "blocks",
) -> Trainable:
    """Sets `requires_grad` of every parameter of `model`; a later call replaces an earlier one.

    The blocks named train wholly. `embeddings`: "frozen"; "tied", the weight that embeddings and
    head share, trained through both, so the backward pass crosses the frozen blocks; "head_only",
    the head alone, made a copy of its own if it is tied. `norms`: "blocks", those of `blocks` and
    the ones after the last block; "all"; "frozen", only those inside new feed-forwards train.
    Unless embeddings or lower norms train, no gradient passes below the first of `blocks`; then
    gradient checkpointing must have use_reentrant=False, or that block gets no gradient.
    """
    chosen = structure.select(blocks)
    check("embeddings", embeddings, get_args(Embeddings))
    check("norms", norms, get_args(Norms))
    head, table = structure.head, structure.embeddings
    tied = head.weight is table.weight  # it may have been untied since `find`
    if embeddings == "tied" and not tied:
        rule = "must be frozen or head_only: this model's head is not tied"
        raise ConfigError("embeddings", embeddings, rule)
    notes = []
    if embeddings == "head_only" and tied:
        untie(model, head)
        notes.append("the output head was tied to the embeddings and is now a copy of its own")

    for block in structure.blocks:
        remove_cuts(block)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    feed_forwards = structure.feed_forwards()
    for number in chosen:
        train(structure.blocks[number])
    set_norms(model, structure, chosen, norms)
    if norms == "frozen":  # a new feed-forward has no pretrained norm to keep
        for number in chosen:
            train(feed_forwards[number])
    if embeddings == "tied":
        train(table)
    if embeddings != "frozen":
        train(head)

    below = {id(parameter) for parameter in later(structure, chosen[0])} | {
        id(parameter)
        for _, norm in norms_after(model, structure)
        for parameter in norm.parameters()
    }
    if embeddings != "tied":
        below |= {id(parameter) for parameter in head.parameters()}
    cut = not any(p.requires_grad and id(p) not in below for p in model.parameters())
    if cut:
        structure.blocks[chosen[0]].register_forward_pre_hook(Cut(), with_kwargs=True)
    parameters = list(model.parameters())
    return Trainable(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        blocks=chosen,
        parts=count_parts(model, structure),
        cut=cut,
        notes=tuple(notes),
    )


def set_norms(
    model: nn.Module, structure: Structure, chosen: tuple[int, ...], norms: Norms
) -> None:
    if norms == "blocks":  # those of `chosen` train already
        for _, norm in norms_after(model, structure):
            train(norm)
        return
    for module in model.modules():
        if is_norm(module):
            for parameter in module.parameters():
                parameter.requires_grad_(norms == "all")


def norms_after(model: nn.Module, structure: Structure) -> Iterator[tuple[str, nn.Module]]:
    """Norms registered after the blocks: those between the last block and the head."""
    passed = False
    for name, module in model.named_modules():
        passed |= module is structure.blocks
        if passed and not name.startswith(structure.path + ".") and is_norm(module):
            yield name, module


def later(structure: Structure, first: int) -> Iterator[nn.Parameter]:
    for block in structure.blocks[first:]:
        yield from block.parameters()


def count_parts(model: nn.Module, structure: Structure) -> dict[str, int]:
    """Trainable parameters by part of the model; a tied head counts as embeddings."""
    parts = dict.fromkeys(("attention", "feed_forward", "norms", "embeddings", "head", "other"), 0)
    owner: dict[int, str] = {}

    def own(module: nn.Module, part: str) -> None:
        for parameter in module.parameters():
            owner.setdefault(id(parameter), part)

    for module in structure.feed_forwards():
        own(module, "feed_forward")
    for module in model.modules():
        if is_norm(module):
            own(module, "norms")
    own(structure.blocks, "attention")
    own(structure.embeddings, "embeddings")
    own(structure.head, "head")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parts[owner.get(id(parameter), "other")] += parameter.numel()
    return {part: count for part, count in parts.items() if count}


def untie(model: Any, head: nn.Module) -> None:
    head.weight = nn.Parameter(head.weight.detach().clone())  # type: ignore[operator]
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def remove_cuts(block: nn.Module) -> None:
    for key, hook in list(block._forward_pre_hooks.items()):
        if isinstance(hook, Cut):
            del block._forward_pre_hooks[key]
            block._forward_pre_hooks_with_kwargs.pop(key, None)


def train(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)


def detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def check(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"must be one of {', '.join(allowed)}")

"""Where a causal language model of transformers keeps its blocks and their feed-forwards.

Found by shape and behaviour, never by name; `swap` and `freeze` work on what is found here.
Shapes: D model width, I inner width.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kalmagrove.config.errors import CheckpointError, ConfigError

RECORD = "kalmagrove"  # the key of a model's config that says what was swapped
REMEDY = "use a dense decoder such as Llama, Qwen, GPT-2, GPT-NeoX, Gemma, Mistral or Phi"


@dataclass(frozen=True, eq=False)
class Structure:
    """What `find` found. `inner` is I of the feed-forwards the model came with."""

    path: str  # of the list of blocks
    blocks: nn.ModuleList
    feed_forward: str  # its name in every block
    width: int
    inner: int
    embeddings: nn.Module
    head: nn.Module
    tied: bool

    def feed_forwards(self) -> list[nn.Module]:
        return [getattr(block, self.feed_forward) for block in self.blocks]

    def select(
        self, blocks: Sequence[int] | None = None, last: int | None = None
    ) -> tuple[int, ...]:
        """Block numbers in order: those listed (negative ones count from the end) or the last."""
        count = len(self.blocks)
        if (blocks is None) == (last is None):
            raise ConfigError("blocks", blocks, "or last must be given, and only one of them")
        if last is not None:
            if not 1 <= last <= count:
                raise ConfigError("last", last, f"must be from 1 to the {count} blocks there are")
            return tuple(range(count - last, count))
        chosen = list(blocks or ())
        if not chosen:
            raise ConfigError("blocks", chosen, "must name at least one block")
        outside = [block for block in chosen if not -count <= block < count]
        if outside:
            raise ConfigError("blocks", outside, f"must be from {-count} to {count - 1}")
        chosen = [block % count for block in chosen]
        twice = sorted({block for block in chosen if chosen.count(block) > 1})
        if twice:
            raise ConfigError("blocks", chosen, f"must not repeat {twice}")
        return tuple(sorted(chosen))


def find(model: nn.Module) -> Structure:
    """The decoder of `model`; ConfigError lists what was looked at and why it was rejected."""
    embeddings, head = ends(model)
    width = int(embeddings.weight.shape[1])  # type: ignore[index]
    record = getattr(model.config, RECORD, None)
    if record is not None:
        return recorded(model, record, embeddings, head, width)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and len({type(block) for block in module}) == 1
    ]
    rejected = []
    for path, blocks in sorted(lists, key=lambda item: -len(item[1])):
        name, inner, reasons = look(blocks, width)
        if name is not None:
            tied = head.weight is embeddings.weight
            return Structure(path, blocks, name, width, inner, embeddings, head, tied)
        rejected.append(f"{path} ({len(blocks)} {type(blocks[0]).__name__}): {', '.join(reasons)}")
    raise ConfigError(
        "model",
        type(model).__name__,
        "has no list of blocks that each hold attention and one replaceable feed-forward: "
        + ("; ".join(rejected) or "it holds no list of like modules"),
        REMEDY,
    )


def ends(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """(embeddings, output head)."""
    found: list[nn.Module] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if module is None or not isinstance(getattr(module, "weight", None), Tensor):
            rule = f"must be a causal language model: {getter}() gives no module with a weight"
            raise ConfigError("model", type(model).__name__, rule, REMEDY)
        found.append(module)
    return found[0], found[1]


def recorded(
    model: nn.Module, record: dict[str, Any], embeddings: nn.Module, head: nn.Module, width: int
) -> Structure:
    """The structure of a model whose feed-forwards are swapped, from its config."""
    try:
        blocks = model.get_submodule(record["path"])
        present = all(hasattr(block, record["feed_forward"]) for block in blocks)  # type: ignore[attr-defined]
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{RECORD}.path={record['path']} is not in the model") from error
    if not present or not isinstance(blocks, nn.ModuleList):
        raise CheckpointError(f"{RECORD}.path={record['path']} is not a list of its blocks")
    tied = head.weight is embeddings.weight
    name, inner = record["feed_forward"], record["inner"]
    return Structure(record["path"], blocks, name, width, inner, embeddings, head, tied)


def look(blocks: nn.ModuleList, width: int) -> tuple[str | None, int, list[str]]:
    """(name of the feed-forward, I, reasons for the other children's rejection)."""
    fits: dict[str, int] = {}
    reasons: list[str] = []
    attention = False
    for name, child in blocks[0].named_children():
        widths = list(linear_widths(child))
        if not widths:
            if any(True for _ in child.parameters()) and not is_norm(child):
                reasons.append(f"{name} has no linear weights")
            continue
        reason, inner = judge(child, widths, width)
        if reason is None:
            fits[name] = inner
            continue
        reasons.append(f"{name} {reason}")
        attention |= len(widths) >= 2 and any(width in pair for pair in widths)
    if not attention:
        return None, 0, [*reasons, "no child looks like attention"]
    if len(fits) != 1:
        held = ", ".join(fits) or "none"
        return None, 0, [*reasons, f"exactly one child must be a feed-forward, not {held}"]
    [(name, inner)] = fits.items()
    for number, block in enumerate(blocks):
        part = getattr(block, name, None)
        reason = "is missing"
        if part is not None:
            reason = reject(part, list(linear_widths(part)), width)[0]
        if reason:
            return None, 0, [*reasons, f"{number}.{name} {reason}"]
    return name, inner, reasons


def judge(child: nn.Module, widths: list[tuple[int, int]], width: int) -> tuple[str | None, int]:
    """(why `child` is no feed-forward or None, I): by its weights, then by running it."""
    reason, inner = reject(child, widths, width)
    return reason or probe(child, width), inner


def reject(child: nn.Module, widths: list[tuple[int, int]], width: int) -> tuple[str | None, int]:
    """(why the weights or the signature of `child` are no feed-forward's or None, I)."""
    inputs = [
        parameter.name
        for parameter in inspect.signature(child.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(inputs) != 1:
        return f"takes {len(inputs)} inputs, not 1", 0
    listed = any(isinstance(module, nn.ModuleList) for module in child.modules())
    if listed or any(parameter.ndim > 2 for parameter in child.parameters()):
        return "holds several experts", 0
    if len(widths) < 2:
        return f"has {len(widths)} linear weights, fewer than 2", 0
    up = {out for into, out in widths if into == width}
    down = {into for into, out in widths if out == width}
    strange = [pair for pair in widths if width not in pair]
    if strange or len(up) != 1 or len(down) != 1:
        return f"has linear weights {sorted(set(widths))}, not {width} -> inner -> {width}", 0
    inner = down.pop()
    if up.pop() not in (inner, 2 * inner):  # gate and value may be one weight
        return f"has linear weights {sorted(set(widths))} whose inner widths differ", 0
    return None, inner


@torch.no_grad()
def probe(child: nn.Module, width: int) -> str | None:
    """Why `child`, run on two positions, is no map D -> D of each position alone; or None."""
    weight = next(parameter for parameter in child.parameters() if parameter.is_floating_point())
    x_1TD = torch.arange(2 * width, device=weight.device).mul(0.7).sin().view(1, 2, width)
    x_1TD = x_1TD.to(weight.dtype)
    modes = [(module, module.training) for module in child.modules()]
    child.eval()
    try:
        y_1TD = child(x_1TD)
        alone = child(x_1TD[:, :1])
    except Exception as error:  # anything a module of unknown code may raise is a rejection
        return f"cannot run on [1, 2, {width}] ({type(error).__name__})"
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(y_1TD, Tensor) or y_1TD.shape != x_1TD.shape:
        return f"does not give one tensor [1, 2, {width}]"
    if y_1TD.is_meta:
        return None
    apart = (y_1TD[:, :1] - alone).abs().max()
    return None if apart <= 0.05 * y_1TD.abs().max() else "mixes positions"


def linear_widths(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(in, out) of each linear weight in `module`."""
    for part in module.modules():
        if isinstance(part, Conv1D):
            yield int(part.weight.shape[0]), int(part.weight.shape[1])
        elif hasattr(part, "in_features") and hasattr(part, "out_features"):
            yield int(part.in_features), int(part.out_features)  # type: ignore[arg-type]


def is_norm(module: nn.Module) -> bool:
    own = list(module.parameters())
    named = "norm" in type(module).__name__.lower()
    return named and bool(own) and all(parameter.ndim == 1 for parameter in own)

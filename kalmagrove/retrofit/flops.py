"""Model FLOPs of a training step a token, counted from the modules of a retrofitted model.

A multiply-add is 2 FLOPs. Norms, activations, evaluation of bases and softmax are left out, as is
the custom. The head is counted at every position, though only those with a target are computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from kalmagrove.retrofit.feedforward import KANLinear
from kalmagrove.retrofit.structure import Structure


class Pass(NamedTuple):
    """FLOPs of a token. repeated: of the forward pass, what activation checkpointing computes again
    (the blocks that a gradient passes).
    """

    forward: float
    backward: float
    repeated: float

    @property
    def training(self) -> float:
        return self.forward + self.backward

    def hardware(self, checkpointing: bool) -> float:
        """What a training step computes."""
        return self.training + (self.repeated if checkpointing else 0.0)


def flops_per_token(inner: Any, structure: Structure, seq_len: int) -> Pass:
    """Of `inner` in rows of `seq_len`, with the parameters frozen that are to be.

    The backward pass of a map is one product for its input, where a gradient passes below, and one
    for its weight, where that trains.
    """
    config = inner.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or structure.width // heads)
    attention = 4.0 * width * (seq_len + 1) / 2
    lowest = lowest_block(structure)
    forward = backward = repeated = 0.0
    for number, block in enumerate(structure.blocks):
        found = list(maps(block))
        block_forward = sum(own.flops for own in found) + attention
        forward += block_forward
        if lowest is not None and number >= lowest:
            weights = sum(own.flops for own in found if own.trains)
            repeated += block_forward
            backward += sum(own.input_flops for own in found) + weights + 2 * attention
    head: Any = structure.head.weight
    logits = 2.0 * head.numel()
    passes = logits if lowest is not None or head.requires_grad else 0.0
    backward += passes + logits * bool(head.requires_grad)
    return Pass(forward + logits, backward, repeated)


def lowest_block(structure: Structure) -> int | None:
    """The first block that a gradient passes through; None: no block."""
    if structure.embeddings.weight.requires_grad:
        return 0
    trains = (
        number
        for number, block in enumerate(structure.blocks)
        if any(p.requires_grad for p in block.parameters())
    )
    return next(trains, None)


class Map(NamedTuple):
    """A linear map of a token's values. input_flops: of the gradient of its input."""

    flops: float
    input_flops: float
    trains: bool


def maps(module: nn.Module) -> Iterator[Map]:
    """All of them. Of a KAN's functions the constant one has no gradient for its input."""
    for part in module.modules():
        if isinstance(part, KANLinear):
            flops, terms = 2.0 * part.coef.numel(), part.config.terms
            constant = part.fused and not part.config.dropped
            yield Map(flops, flops * (terms - constant) / terms, part.coef.requires_grad)
        elif isinstance(part, Conv1D) or hasattr(part, "in_features"):
            weight: Any = part.weight
            yield Map(2.0 * weight.numel(), 2.0 * weight.numel(), weight.requires_grad)

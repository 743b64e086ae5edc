"""A causal language model of transformers as this project's engine trains it.

Made by `build`. Shapes: B rows, T tokens, V vocabulary, D model width, N positions with a target.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.nn.model import ModelOutput
from kalmagrove.parallel import Groups
from kalmagrove.retrofit.structure import Structure

IGNORED = -100


class LanguageModel(nn.Module):
    """`inner`, with the loss of the positions that have a target; logits of no others are made."""

    def __init__(self, inner: nn.Module, structure: Structure) -> None:
        super().__init__()
        self.inner = inner
        self._structure = [structure]  # in a list: its modules are registered once, in `inner`
        self._wanted: tuple[Tensor, ...] | None = None
        self._checkpointing = False
        structure.head.register_forward_pre_hook(self._choose)
        for module in (structure.embeddings, structure.head):
            module.weight.kind = "embedding"  # type: ignore[union-attr]  # for the optimizer

    @property
    def blocks(self) -> nn.ModuleList:
        return self._structure[0].blocks

    @property
    def activation_checkpointing(self) -> bool:
        return self._checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        inner = cast(Any, self.inner)
        # transformers 5.23 has another name for it, and warns of this one
        verb = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
        if wanted:
            getattr(inner, f"{verb}_checkpointing_enable")({"use_reentrant": False})
            inner.disable_input_require_grads()  # enabled too: frozen blocks would have a graph
        elif self._checkpointing:
            getattr(inner, f"{verb}_checkpointing_disable")()
        self._checkpointing = wanted

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Tensor | None = None,
        normalizer: float | None = None,
    ) -> ModelOutput:
        """Cross-entropy of the next tokens.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T], -100 where there is no loss.
            segments: int32 [B, T], the document's number within its row; positions count from each
                document's begin, by which transformers keeps attention inside.
            normalizer: the summed cross-entropy is divided by it; default: the number of targets.
        """
        wanted = (targets != IGNORED).nonzero(as_tuple=True)  # waits for the device, once
        more = {} if segments is None else {"position_ids": positions(segments)}
        self._wanted = wanted
        try:
            logits_1NV = self.inner(tokens, use_cache=False, **more).logits
        finally:
            self._wanted = None
        targets_N = targets[wanted]
        total = F.cross_entropy(logits_1NV[0].float(), targets_N, reduction="sum")
        loss = total / (max(1, targets_N.numel()) if normalizer is None else normalizer)
        return ModelOutput(loss, None, loss.detach())

    def _choose(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before the head: the hidden values of the wanted positions, as one row [1, N, D]."""
        if self._wanted is None:
            return None
        return (args[0][self._wanted].unsqueeze(0), *args[1:])

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the last forward pass, detached, as `BLOCK.NAME`."""
        name = self._structure[0].feed_forward
        return {
            f"{number}.{metric}": value
            for number, block in enumerate(self.blocks)
            for metric, value in getattr(getattr(block, name), "metrics", {}).items()
        }

    def traffic(self) -> None:
        """Nothing is exchanged inside the model."""

    def balance(self, groups: Groups) -> None:
        """Nothing is routed."""


def positions(segments: Tensor) -> Tensor:
    """[B, T]: each token's place in its document."""
    place_BT = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    return place_BT - torch.where(begins, place_BT, 0).cummax(1).values

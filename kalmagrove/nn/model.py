"""The language model: embedding, blocks, norm, head, loss. Reads as single-device code.

Built by `build_model`, wrapped by `kalmagrove.engine`, decoded by `kalmagrove.evaluate`.
Letters: B batch, T tokens, D model width, V vocabulary.
"""

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalmagrove.config import Model
from kalmagrove.nn.block import Block
from kalmagrove.nn.norm import RMSNorm
from kalmagrove.parallel import Groups


class ModelOutput(NamedTuple):
    """What a forward pass gives.

    loss: scalar to back-propagate, cross-entropy plus (in training) auxiliary and z-losses; None
    without targets.
    logits: [B, T, V], only without targets.
    nll: scalar, detached: the cross-entropy alone, normalised like `loss`; None without targets.
    """

    loss: Tensor | None
    logits: Tensor | None
    nll: Tensor | None


class Transformer(nn.Module):
    """A decoder of KalmaGrove blocks; the kinds of its layers follow the configured patterns."""

    def __init__(self, model: Model, groups: Groups) -> None:
        super().__init__()
        assert model.vocab_size is not None, "the tokenizer decides the vocabulary before the build"
        self.config = model
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(Block(model, i, groups) for i in range(model.layers))
        self.norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.head = (
            None if model.tie_embeddings else nn.Linear(model.d_model, model.vocab_size, bias=False)
        )
        for table in (self.embedding.weight, *([self.head.weight] if self.head else [])):
            table.kind = "embedding"  # type: ignore[attr-defined]
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal(0, std); projections into the residual stream shrink with depth (GPT-2)."""
        init = self.config.init
        out_std = init.std / math.sqrt(2 * self.config.layers) if init.depth_scaled else init.std
        nn.init.normal_(self.embedding.weight, std=init.std)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=init.std)
        for block in self.layers:
            block.init_weights(init.std, out_std)

    @property
    def layers(self) -> list[Block]:
        """The blocks, under their own type."""
        return cast("list[Block]", list(self.blocks))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        segments: Tensor | None = None,
        normalizer: float | None = None,
        cache: list[Any] | None = None,
    ) -> ModelOutput:
        """Predict the next tokens.

        Args:
            tokens: int64 [B, T].
            targets: int64 [B, T], -100 where there is no loss. Without them logits are returned.
            segments: int32 [B, T], the document's number within its row; attention stays inside.
            normalizer: the summed cross-entropy is divided by it; default: the number of targets.
            cache: from `init_cache`; `tokens` are then the next ones and the cache advances.
        """
        x_BTD = self.embedding(tokens)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x_BTD.device)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[i]
            if self.activation_checkpointing and self.training:
                x_BTD, aux = checkpoint(block, x_BTD, segments, use_reentrant=False)
            else:
                x_BTD, aux = block(x_BTD, segments, layer_cache)
            aux_loss = aux_loss + aux
        x_BTD = self.norm(x_BTD)
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits_BTV = F.linear(x_BTD, weight)
        if targets is None:
            return ModelOutput(None, logits_BTV, None)
        loss, nll = self._loss(logits_BTV, targets, normalizer)
        if self.training:
            loss = loss + aux_loss
        return ModelOutput(loss, None, nll)

    def _loss(
        self, logits_BTV: Tensor, targets: Tensor, normalizer: float | None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy with the logits' z-loss, and (detached) without."""
        logits_NV, targets_N = logits_BTV.float().flatten(0, 1), targets.flatten()
        total = F.cross_entropy(logits_NV, targets_N, ignore_index=-100, reduction="sum")
        nll = total.detach()
        if self.config.logit_z_loss and self.training:
            z_N = torch.logsumexp(logits_NV, dim=-1).square() * (targets_N != -100)
            total = total + self.config.logit_z_loss * z_N.sum()
        count: Tensor | float = (
            (targets_N != -100).sum().clamp(min=1) if normalizer is None else normalizer
        )
        return total / count, nll / count

    def init_cache(self, batch: int, max_tokens: int) -> list[Any]:
        """Empty decoding state for `batch` sequences of at most `max_tokens` tokens."""
        weight = self.embedding.weight
        return [
            block.attention.init_cache(batch, max_tokens, weight.device, weight.dtype)
            for block in self.layers
        ]

    def balance(self, groups: Groups) -> None:
        """Move every router's selection bias by the load counted since the last call."""
        for block in self.layers:
            if hasattr(block.ffn, "balance"):
                block.ffn.balance(groups)

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the last forward pass, detached, as `LAYER.NAME`: scalars, and loads [G]."""
        return {
            f"{i}.{name}": value
            for i, block in enumerate(self.layers)
            for module in (block.attention, block.ffn)
            for name, value in module.metrics.items()
        }


def build_model(model: Model, groups: Groups) -> Transformer:
    """The model on the CPU in fp32, from torch's global seed: the same on every rank."""
    return Transformer(model, groups)

"""The language model: embedding, blocks, norm, head, loss. Reads as single-device code.

Built by `build_model`, wrapped by `kalmagrove.engine`, decoded by `kalmagrove.evaluate`. With
context parallelism a rank takes its piece of the rows, with tensor parallelism of the weights.
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
from kalmagrove.nn.tally import metrics_of
from kalmagrove.parallel import (
    Exchanged,
    Groups,
    Linear,
    TensorParallel,
    VocabEmbedding,
    all_gather,
    all_reduce_sum,
    cross_entropy,
    normal_,
    own_piece,
)


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
        self.groups = groups
        self.tp = TensorParallel.of(groups)
        self.activation_checkpointing = False
        self.embedding = VocabEmbedding(model.vocab_size, model.d_model, self.tp)
        self.blocks = nn.ModuleList(Block(model, i, groups) for i in range(model.layers))
        self.norm = RMSNorm(model.d_model, eps=model.norm_eps, through=self.tp.stream)
        self.head: Linear | None = None
        if not model.tie_embeddings:
            shard = self.tp.piece(model.vocab_size) if groups.tp.size > 1 else None
            self.head = Linear(model.d_model, model.vocab_size, shard)
            self.head.weight.kind = "embedding"  # type: ignore[attr-defined]
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal(0, std); projections into the residual stream shrink with depth (GPT-2)."""
        init = self.config.init
        out_std = init.std / math.sqrt(2 * self.config.layers) if init.depth_scaled else init.std
        normal_(self.embedding.weight, init.std)
        if self.head is not None:
            self.head.init_weights(init.std)
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
            tokens: int64 [B, T], whole rows also with context parallelism.
            targets: int64 [B, T], -100 where there is no loss. Without them logits are returned.
            segments: int32 [B, T], the document's number within its row; attention stays inside.
            normalizer: the summed cross-entropy is divided by it; default: the number of targets.
            cache: from `init_cache`; `tokens` are then the next ones and the cache advances.

        With context parallelism the loss is of this rank's piece of the rows, times the number of
        pieces: the mean over ranks is the loss of the rows.
        """
        cp = self.groups.cp
        tokens = own_piece(tokens, cp, 1)
        targets, segments = (x if x is None else own_piece(x, cp, 1) for x in (targets, segments))
        x_BTD = self.embedding(tokens)
        aux_loss = torch.zeros((), dtype=torch.float32, device=x_BTD.device)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[i]
            if self.activation_checkpointing and self.training:
                x_BTD, aux = checkpoint(block, x_BTD, segments, use_reentrant=False)
            else:
                x_BTD, aux = block(x_BTD, segments, layer_cache)
            aux_loss = aux_loss + aux
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits_BTV = F.linear(self.tp.enter(self.norm(x_BTD)), weight)
        if targets is None:
            whole = all_gather(all_gather(logits_BTV, self.groups.tp, 2), cp, 1)
            return ModelOutput(None, whole, None)
        loss, nll = self._loss(logits_BTV, targets, normalizer)
        if self.training:
            loss = loss + aux_loss
        return ModelOutput(loss, None, nll)

    def _loss(
        self, logits_BTV: Tensor, targets: Tensor, normalizer: float | None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy with the logits' z-loss, and (detached) without."""
        cp = self.groups.cp
        total, log_z_N = cross_entropy(logits_BTV.float().flatten(0, 1), targets.flatten(), self.tp)
        nll = total.detach()
        if self.config.logit_z_loss and self.training:
            total = total + self.config.logit_z_loss * log_z_N.square().sum()
        count: Tensor | float = (
            all_reduce_sum((targets != -100).sum(), cp).clamp(min=1)
            if normalizer is None
            else normalizer
        )
        return cp.size * total / count, cp.size * nll / count

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
        attention, ffn = zip(*((block.attention, block.ffn) for block in self.layers), strict=True)
        return {
            f"{i}.{name}": value
            for i, found in enumerate(zip(metrics_of(attention), metrics_of(ffn), strict=True))
            for own in found
            for name, value in own.items()
        }

    def traffic(self) -> Exchanged | None:
        """What all layers' all-to-alls cost since the last call; None if there never are any."""
        counts = [
            block.ffn.traffic.drain() for block in self.layers if hasattr(block.ffn, "traffic")
        ]
        return Exchanged.sum(counts) if self.groups.ep.size > 1 and counts else None


def build_model(model: Model, groups: Groups) -> Transformer:
    """The model on the CPU in fp32, from torch's global seed: the same on every rank."""
    return Transformer(model, groups)

"""One layer of the model: attention, then a feed-forward, each behind a norm."""

from typing import Any

from torch import Tensor, nn

from kalmagrove.config import Model
from kalmagrove.nn.attention import build_attention
from kalmagrove.nn.ffn import build_ffn
from kalmagrove.nn.norm import RMSNorm
from kalmagrove.parallel import Groups, TensorParallel


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x))."""

    attention: Any  # what `build_attention` and `build_ffn` promise is not an nn.Module's type
    ffn: Any

    def __init__(self, model: Model, layer: int, groups: Groups) -> None:
        super().__init__()
        stream = TensorParallel.of(groups).stream
        self.attention_norm = RMSNorm(model.d_model, eps=model.norm_eps, through=stream)
        self.attention = build_attention(model, layer, groups)
        self.ffn_norm = RMSNorm(model.d_model, eps=model.norm_eps, through=stream)
        self.ffn = build_ffn(model, layer, groups)

    def init_weights(self, std: float, out_std: float) -> None:
        self.attention.init_weights(std, out_std)
        self.ffn.init_weights(std, out_std)

    def forward(
        self, x_BTD: Tensor, segments_BT: Tensor | None = None, cache: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The new residual stream [B, T, D] and the feed-forward's auxiliary loss (scalar)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), segments_BT, cache)
        y_BTD, aux_loss = self.ffn(self.ffn_norm(x_BTD))
        return x_BTD + y_BTD, aux_loss

"""A SwiGLU feed-forward as a baseline: any inner width, so that its parameters match another's."""

import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.config.errors import ConfigError

INIT_STD = 0.02  # of weights, as pretrained models begin with; for all but those that say otherwise


class SwiGLU(nn.Module):
    """y = down(silu(gate x) * up x), [..., D] -> [..., D], without biases (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def init_weights(self, std: float = INIT_STD) -> None:
        for part in (self.gate, self.up, self.down):
            if not part.weight.is_meta:  # then a checkpoint is about to be read
                nn.init.normal_(part.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def matching_hidden(width: int, parameters: int) -> int:
    """The inner width of the SwiGLU with exactly so many parameters.

    Raises:
        ConfigError: there is none.
    """
    hidden, rest = divmod(parameters, 3 * width)
    if rest or not hidden:
        raise ConfigError(
            "hidden",
            "match",
            f"cannot be met: {parameters} parameters of the KAN feed-forward are no multiple of "
            f"3 x {width}",
            f"use hidden={max(1, hidden)} ({3 * width * max(1, hidden)} parameters), or an ffn "
            "whose parameters are a multiple",
        )
    return hidden

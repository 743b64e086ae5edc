"""The edge functions of retrofitted models, in the form that `kalmagrove.evaluate.edge_maps` has.

Letters: N tokens, I inputs, J outputs, P coefficients of one edge, S points.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kalmagrove.retrofit.feedforward import SIGMAS, KANLinear
from kalmagrove.retrofit.structure import RECORD, find


@dataclass(frozen=True)
class LinearEdges:
    """The edges of one `KANLinear`: each output has a function of each input.

    With squash=tanh, which knows no range, the range is three units around 0. What functions were
    at the start is not known.
    """

    name: str
    block: int
    layer: KANLinear

    @property
    def outputs(self) -> int:
        return self.layer.outputs

    @property
    def bounded(self) -> bool:
        return self.layer.config.squash != "tanh"

    def span(self) -> Tensor:
        span_2 = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        span_I2 = span_2.expand(self.layer.inputs, 2)
        if not self.bounded:
            return SIGMAS * span_I2
        if self.layer.scale is None or self.layer.shift is None:
            return span_I2
        scale_I1, shift_I1 = (
            t.detach().double().cpu()[:, None] for t in (self.layer.scale, self.layer.shift)
        )
        ends_I2 = (span_I2 - shift_I1) / scale_I1.where(scale_I1 != 0, 1e-12)
        return ends_I2.sort(dim=1).values

    @torch.no_grad()
    def values(self, x_SI: Tensor, rows: slice) -> Tensor:
        coef_PJI = self.layer.coef[:, rows].double()
        terms_SPI = self.layer.expand(x_SI.to(coef_PJI.device))
        return torch.einsum("spi,pji->sji", terms_SPI, coef_PJI).cpu()

    def initial(self, x_SI: Tensor) -> Tensor | None:
        return None

    def use(self, x_NI: Tensor) -> Tensor | None:
        return None

    def collect(self, sink: Callable[[Tensor], None]) -> Callable[[], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sink(inputs[0])

        return self.layer.register_forward_pre_hook(hook).remove


def linear_edges(model: Any) -> tuple[list[LinearEdges], int]:
    """Of all swapped feed-forwards of a retrofitted model, in order (none of another model), and
    the number of its blocks.
    """
    structure = find(model)
    record = getattr(model.config, RECORD, None) or {"blocks": ()}
    maps = [
        LinearEdges(f"{block}.{name or 'kan'}", block, part)
        for block in record["blocks"]
        for name, part in structure.feed_forwards()[block].named_modules()
        if isinstance(part, KANLinear)
    ]
    return maps, len(structure.blocks)

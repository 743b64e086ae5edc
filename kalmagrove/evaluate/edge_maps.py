"""Where the edge functions of a model are: KAN layers and groves, or retrofitted feed-forwards.

`edges_of` gives them in the one form that `edges` judges.
Letters: N tokens, I inputs, J functions of one input, S points, M edges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kalmagrove.config import ConfigError
from kalmagrove.nn import Transformer
from kalmagrove.nn.edge import EdgeActivation
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove_kernels.edge import BASES as BASE_FUNCTIONS


class EdgeMap(Protocol):
    """J functions of each of I inputs."""

    @property
    def name(self) -> str:
        """Block, then the part of its feed-forward: `3.kan`, `28.first`."""

    @property
    def block(self) -> int: ...

    @property
    def outputs(self) -> int:
        """J."""

    @property
    def bounded(self) -> bool:
        """Whether inputs can lie outside the range."""

    def span(self) -> Tensor:
        """The range the basis is made for, of each input: fp64 [I, 2] on the CPU."""

    def values(self, x_SI: Tensor, rows: slice) -> Tensor:
        """The functions `rows` of every input at fp64 x: fp64 [S, j, I] on the CPU."""

    def initial(self, x_SI: Tensor) -> Tensor | None:
        """What every function of an input was before training [S, I]; None: not known."""

    def use(self, x_NI: Tensor) -> Tensor | None:
        """The share of tokens that use each edge [J, I]; None: all of them do."""

    def collect(self, sink: Callable[[Tensor], None]) -> Callable[[], None]:
        """Give the inputs [..., I] of every later forward pass to `sink`, until called off."""


def edges_of(model: nn.Module, layers: Sequence[int] | None = None) -> list[EdgeMap]:
    """Of a `Transformer` or of a retrofitted model; `layers` are numbers of blocks.

    Raises:
        ConfigError: it has no edge functions, or none in these blocks.
    """
    if isinstance(model, Transformer):
        maps: list[EdgeMap] = list(_layer_edges(model))
        blocks = len(model.layers)
    else:
        from kalmagrove.retrofit.edges import linear_edges

        found, blocks = linear_edges(model)
        maps = list(found)
    if not maps:
        rule = "has no edge functions"
        raise ConfigError("run", "this model", rule, "use one with KAN feed-forwards")
    return choose(maps, blocks, layers)


def choose(maps: Sequence[EdgeMap], blocks: int, layers: Sequence[int] | None) -> list[EdgeMap]:
    """The maps of the blocks `layers`, of all if None; negative numbers count from the end.

    Raises:
        ConfigError: a block is not there, or none of these blocks has edge functions.
    """
    if layers is None:
        return list(maps)
    if wrong := [number for number in layers if not -blocks <= number < blocks]:
        raise ConfigError("layers", wrong[0], f"must be from {-blocks} to {blocks - 1}")
    wanted = {number % blocks for number in layers}
    found = [edges for edges in maps if edges.block in wanted]
    if not found:
        have = ", ".join(map(str, dict.fromkeys(edges.block for edges in maps)))
        rule = "has no edge functions"
        raise ConfigError("layers", ", ".join(map(str, layers)), rule, f"blocks {have} have some")
    return found


@dataclass(frozen=True)
class ActivationEdges:
    """The edges of a KAN layer, or of one grove: each has an input of its own (J = 1)."""

    name: str
    block: int
    edge: EdgeActivation
    top_k: int
    grove: int | None = None
    outputs: int = 1
    bounded: bool = True

    def span(self) -> Tensor:
        edges = self.edge.coef.shape[-2]
        return self.edge.span(self.grove).double().cpu().expand(edges, 2)

    def values(self, x_SI: Tensor, rows: slice) -> Tensor:
        return self._phi(x_SI).cpu()[:, None][:, rows]

    def initial(self, x_SI: Tensor) -> Tensor | None:
        """The base function, without the small random part that was added."""
        base = self.edge.config.base
        return BASE_FUNCTIONS["silu" if base == "none" else base](x_SI)

    def use(self, x_NI: Tensor) -> Tensor | None:
        kept_NK = self._phi(x_NI).abs().topk(self.top_k, dim=1).indices
        count_I = kept_NK.flatten().cpu().bincount(minlength=x_NI.shape[1])
        return count_I.double()[None] / len(x_NI)

    @torch.no_grad()
    def _phi(self, x_NI: Tensor) -> Tensor:
        return self.edge(x_NI.to(self.edge.coef.device), self.grove)

    def collect(self, sink: Callable[[Tensor], None]) -> Callable[[], None]:
        before = self.edge.watch

        def watch(h_NM: Tensor, grove: int | None) -> None:
            if before is not None:
                before(h_NM, grove)
            if grove == self.grove:
                sink(h_NM)

        self.edge.watch = watch

        def stop() -> None:
            self.edge.watch = before

        return stop


def _layer_edges(model: Transformer) -> list[ActivationEdges]:
    """Of all KAN layers and groves, in order."""
    found = []
    for block, layer in enumerate(model.layers):
        ffn = layer.ffn
        if isinstance(ffn, KANLayer):
            found.append(ActivationEdges(f"{block}.kan", block, ffn.edge, ffn.config.top_k))
        elif isinstance(ffn, GroveLayer):
            body = ActivationEdges(f"{block}.", block, ffn.edge, ffn.config.kan.top_k)
            found += [
                replace(body, name=f"{block}.grove{grove}", grove=grove)
                for grove in range(len(ffn.edge.coef))
            ]
            if ffn.shared is not None:
                found.append(replace(body, name=f"{block}.shared", edge=ffn.shared.edge))
    return found

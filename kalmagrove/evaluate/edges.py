"""The learned edge functions of a model: what they look like, and how far from straight lines.

`inspect_edges` works on the maps of edges that `edge_maps` finds in a model; `figures` draws the
result.
Letters: N tokens, I inputs, J functions of one input, S points.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kalmagrove.config import ConfigError, DataError
from kalmagrove.evaluate.edge_maps import EdgeMap

Select = Literal["norm", "used", "random"]

POINTS = 129  # at which functions are judged
CURVE = 201  # at which they are written down
ROWS = 64  # functions of each input evaluated at once
BINS = 40  # of a density
TAILS = 0.001  # share of the observed inputs left out of a curve at either end


@dataclass(frozen=True)
class Density:
    """A histogram of one observed input: counts between neighbouring bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """One edge. r2 is of the best straight line, over the observed inputs or else the range."""

    input: int
    output: int | None  # None: the input has no other function
    r2: float
    amplitude: float  # the largest |f| at the points it was judged at
    span: tuple[float, float]
    x: tuple[float, ...]
    y: tuple[float, ...]
    initial: tuple[float, ...] | None
    density: Density | None


@dataclass(frozen=True)
class EdgeLayer:
    """All edges of a map in numbers, and some of them drawn.

    r2 pools the edges by their variances; a function that does not vary counts as straight. The
    amplitude of an edge is its mean |f|.
    """

    name: str
    block: int
    edges: int
    r2: float
    r2_mean: float
    r2_min: float
    amplitude_mean: float
    amplitude_max: float  # the largest |f| of all
    tokens: int  # observed; 0: the range was taken instead
    out_of_range: float | None  # share of the inputs; None: not observed, or nothing is
    functions: tuple[Function, ...]


def inspect_edges(
    maps: Sequence[EdgeMap],
    *,
    seen: dict[str, Tensor] | None = None,
    count: int = 16,
    select: Select = "norm",
    seed: int = 0,
) -> list[EdgeLayer]:
    """Judge all edges of `maps` and write down `count` of each.

    Args:
        seen: inputs by the name of the map, from `observe`. Then edges are judged at quantiles of
            their own inputs, else at even points over the range.
        select: norm, those that vary most; used, those that most tokens use (with `seen`; where all
            are used, those that vary most); random, drawn from `seed` and the map's name.

    Raises:
        ConfigError: select=used without `seen`.
    """
    if select == "used" and seen is None:
        rule, remedy = "needs a text to count on", "give text=FILE, or use select=norm"
        raise ConfigError("select", select, rule, remedy)
    return [_layer(edges, (seen or {}).get(edges.name), count, select, seed) for edges in maps]


def _layer(edges: EdgeMap, x_NI: Tensor | None, count: int, select: Select, seed: int) -> EdgeLayer:
    if x_NI is not None and not len(x_NI):
        x_NI = None  # a grove that no token of the text reached
    span_I2 = edges.span()
    judged = Judged.of(edges, even_points(span_I2, POINTS) if x_NI is None else quantiles(x_NI))
    score_JI = judged.var_JI
    if select == "used" and x_NI is not None and (use_JI := edges.use(x_NI)) is not None:
        score_JI = use_JI.numpy()
    if select == "random":
        score_JI = np.random.default_rng([seed, zlib.crc32(edges.name.encode())]).random(
            judged.var_JI.shape
        )
    best = np.argsort(-score_JI.ravel(), kind="stable")[:count]
    chosen = [divmod(int(place), len(span_I2)) for place in best]
    out = None
    if x_NI is not None and edges.bounded:
        low_I, high_I = span_I2.t()
        out = float(((x_NI < low_I) | (x_NI > high_I)).double().mean())
    return EdgeLayer(
        name=edges.name,
        block=edges.block,
        edges=judged.var_JI.size,
        r2=judged.pooled,
        r2_mean=float(judged.r2_JI.mean()),
        r2_min=float(judged.r2_JI.min()),
        amplitude_mean=float(judged.mean_JI.mean()),
        amplitude_max=float(judged.most_JI.max()),
        tokens=0 if x_NI is None else len(x_NI),
        out_of_range=out,
        functions=tuple(curves(edges, chosen, judged, span_I2, x_NI)),
    )


@dataclass(frozen=True)
class Judged:
    """Of every edge [J, I]: variance, R^2 of its line, mean and largest |f|, over some points."""

    var_JI: np.ndarray
    r2_JI: np.ndarray
    mean_JI: np.ndarray
    most_JI: np.ndarray

    @classmethod
    def of(cls, edges: EdgeMap, x_SI: Tensor) -> "Judged":
        apart_SI = x_SI - x_SI.mean(0)
        spread_I = apart_SI.square().mean(0)
        parts = []
        for start in range(0, edges.outputs, ROWS):
            f_SJI = edges.values(x_SI, slice(start, start + ROWS))
            off_SJI = f_SJI - f_SJI.mean(0)
            var_JI = off_SJI.square().mean(0)
            both_JI = (off_SJI * apart_SI[:, None]).mean(0)
            size_SJI = f_SJI.abs()
            most_JI = size_SJI.amax(0)
            # Roundings of a constant are no variance.
            flat_JI = (var_JI <= 1e-24 * most_JI.square()) | (spread_I == 0)
            var_JI = var_JI.where(~flat_JI, 0)
            r2_JI = both_JI.square() / (var_JI * spread_I)
            r2_JI = r2_JI.where(~flat_JI, 1).clamp(max=1)
            parts.append((var_JI, r2_JI, size_SJI.mean(0), most_JI))
        return cls(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))

    @property
    def pooled(self) -> float:
        """Of all edges' variance, the part that lines have."""
        total = self.var_JI.sum()
        return float((self.r2_JI * self.var_JI).sum() / total) if total else 1.0


def curves(
    edges: EdgeMap,
    chosen: Sequence[tuple[int, int]],
    judged: Judged,
    span_I2: Tensor,
    x_NI: Tensor | None,
) -> Iterator[Function]:
    """The functions `chosen`, (output, input), over the range and most of what was observed."""
    wide_I2 = span_I2.clone()
    if x_NI is not None:
        tails_2 = torch.tensor([TAILS, 1 - TAILS], dtype=torch.float64)
        low_I, high_I = quantiles(x_NI, tails_2)
        wide_I2 = torch.stack(
            [torch.minimum(span_I2[:, 0], low_I), torch.maximum(span_I2[:, 1], high_I)], dim=1
        )
    x_SI = even_points(wide_I2, CURVE)
    initial_SI = edges.initial(x_SI)
    for j, i in chosen:
        low, high = span_I2[i].tolist()
        yield Function(
            input=i,
            output=j if edges.outputs > 1 else None,
            r2=float(judged.r2_JI[j, i]),
            amplitude=float(judged.most_JI[j, i]),
            span=(low, high),
            x=tuple(x_SI[:, i].tolist()),
            y=tuple(edges.values(x_SI, slice(j, j + 1))[:, 0, i].tolist()),
            initial=None if initial_SI is None else tuple(initial_SI[:, i].tolist()),
            density=None if x_NI is None else density(x_NI[:, i], wide_I2[i]),
        )


def density(x_N: Tensor, between_2: Tensor) -> Density:
    """The histogram of an input over the part of it that is drawn."""
    counts, bounds = np.histogram(x_N.double().numpy(), BINS, tuple(between_2.tolist()))
    return Density(tuple(bounds.tolist()), tuple(counts.tolist()))


def even_points(between_I2: Tensor, count: int) -> Tensor:
    """[S, I], from one end to the other."""
    ticks_S1 = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    low_I, high_I = between_I2.t()
    return low_I + (high_I - low_I) * ticks_S1


def quantiles(x_NI: Tensor, share_S: Tensor | None = None) -> Tensor:
    """[S, I], observed values of each input below which these shares lie; of equal probability
    if none are given.
    """
    if share_S is None:
        share_S = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    place_S = (share_S * len(x_NI)).long().clamp(max=len(x_NI) - 1)
    return x_NI.sort(0).values[place_S].double()


def observe(
    model: nn.Module,
    maps: Sequence[EdgeMap],
    rows: Iterable[Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """What each map is given while `model` reads `rows` of tokens [B, T]: fp32 [N, I] on the CPU.

    Raises:
        DataError: the model gives a map values that are not finite.
    """
    found: dict[str, list[Tensor]] = {edges.name: [] for edges in maps}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: found[name].append(x.detach().flatten(0, -2).float().cpu())

    stops = [edges.collect(keep(edges.name)) for edges in maps]
    try:
        with torch.no_grad():
            for row in rows:
                model(row.to(device))
    finally:
        for stop in reversed(stops):
            stop()
    inputs = {
        edges.name: torch.cat(found[edges.name])
        if found[edges.name]
        else torch.empty(0, len(edges.span()))
        for edges in maps
    }
    for name, x_NI in inputs.items():
        if not x_NI.isfinite().all():
            raise DataError(f"the inputs of {name} are not all finite on this text")
    return inputs


def token_rows(ids: Sequence[int], length: int) -> Iterator[Tensor]:
    """[1, T] int64: `ids` in rows of `length`, the last one shorter."""
    for start in range(0, len(ids), length):
        yield torch.tensor(ids[start : start + length], dtype=torch.int64)[None]

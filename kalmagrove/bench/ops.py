"""The ops of `kalmagrove bench kernels` as functions: the specification of their implementations.

`ours` and `peers` list these, and peers that compute a function of their own. Letters as in
`cases`; P coefficients of an edge, S = N * K.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.bench.spec import Cost, Draw, Function, Inputs, Shape, first_channel, moved_bytes
from kalmagrove_kernels.edge import Kept, edge_topk
from kalmagrove_kernels.polynomial import polynomial
from kalmagrove_kernels.projection import basis_projection

EDGE: dict[str, Any] = {"basis": "bspline", "degree": 3, "grid": 8, "base": "silu"}
COEFFICIENTS = 3 + 8  # degree + grid
RANGE = (-3.0, 3.0)
POLYNOMIAL: dict[str, Any] = {"basis": "chebyshev1", "squash": "tanh"}


def channels(shape: Shape) -> int:
    return int(shape["C"] if "C" in shape else shape.get("G", 1) * shape["M"])


# Groves: channel number = grove * M + edge; rows are sorted by grove.


def _groups(shape: Shape, device: torch.device) -> Inputs:
    if "rows" not in shape:
        return {}
    start_G1 = torch.tensor([0, *shape["rows"]], device=device).cumsum(0).int()
    groves = torch.arange(shape["G"], dtype=torch.int32, device=device)
    return {"group_N": groves.repeat_interleave(start_G1.diff()), "start_G1": start_G1}


def _by_grove(
    part: Callable[..., Tensor], shape: Shape, per_row: list[Tensor], per_grove: list[Tensor]
) -> Tensor:
    """part(rows, weights) of each grove, one below the other; or of the one layer."""
    if "rows" not in shape:
        return part(*per_row, *per_grove)
    split = [t.split(shape["rows"]) for t in per_row]
    parts = zip(*split, *per_grove, strict=True)
    return torch.cat([part(*own) for own in parts])


# edge_topk: the k largest of phi(h), value and channel.


def edge_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    h = draw.normal(shape["N"], shape["M"])
    wide = Draw(generator, torch.float32)
    dy = wide.normal(shape["N"], shape["K"], grad=False)
    return {"h": h, "dy": dy} | _edge_weights(shape, draw)


def _edge_weights(shape: Shape, draw: Draw) -> Inputs:
    lead = (shape["G"],) if "rows" in shape else ()
    device = draw.generator.device
    return {
        "coef": draw.normal(*lead, shape["M"], COEFFICIENTS, std=0.3),
        "scale": draw.normal(*lead, shape["M"], std=0.3),
        "range": torch.tensor(RANGE, device=device).expand(*lead, 2).contiguous(),
    } | _groups(shape, device)


def route(h_NM: Tensor, inputs: Inputs, shape: Shape) -> Kept:
    """The reference's choice: values in fp32 (fp64 if h is), channels, sums over all edges."""
    return edge_topk(
        h_NM, inputs["coef"], inputs["scale"], inputs["range"], **edge_options(inputs, shape)
    )


def edge_options(inputs: Inputs, shape: Shape) -> dict[str, Any]:
    """What `edge_topk` takes beside tensors of weights, of this benchmark's edges."""
    options = {"k": shape["K"]} | EDGE
    return options | {name: inputs[name] for name in ("group_N", "index_NK") if name in inputs}


def edge_reference(inputs: Inputs, shape: Shape) -> Kept:
    return route(inputs["h"], inputs, shape)


def edge_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    pairs = shape["N"] * shape["K"]
    weights = moved_bytes(inputs["coef"], inputs["scale"])
    h, dy = moved_bytes(inputs["h"]), moved_bytes(inputs["dy"])
    return {
        "fwd": Cost(0, h + weights + pairs * (4 + 8)),  # out: fp32 values, int64 channels
        # Of h only what was kept is needed; its gradient is dense.
        "bwd": Cost(0, pairs * (inputs["h"].element_size() + 8) + dy + h + 2 * weights),
    }


# permute: pairs sorted by channel.


def permute_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    return {"index_NK": Draw(generator, dtype).kept(shape, {})}


def permute_reference(inputs: Inputs, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    channel_S = inputs["index_NK"].flatten()
    sorted_S, order_S = channel_S.sort(stable=True)
    number_S = torch.arange(len(order_S), dtype=torch.int32, device=order_S.device)
    place_S = torch.empty_like(number_S).scatter_(0, order_S, number_S)
    bounds = torch.arange(channels(shape) + 1, device=order_S.device)
    return order_S.int(), place_S, torch.searchsorted(sorted_S, bounds).int()


def permute_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    pairs = shape["N"] * shape["K"]
    return {"fwd": Cost(0, moved_bytes(inputs["index_NK"]) + pairs * (4 + 4))}


# projection: y = sum over the kept of U^T (M * silu(V x)).


def projection_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw, groups = Draw(generator, dtype), _groups(shape, generator.device)
    return {
        "kept": draw.normal(shape["N"], shape["K"]),
        "index_NK": draw.kept(shape, groups),
    } | (_maps(shape, draw) | groups)


def _maps(shape: Shape, draw: Draw) -> Inputs:
    rows, width, rank = shape["N"], shape["D"], shape["R"]
    maps = channels(shape), rank, width
    return {
        "x": draw.normal(rows, width),
        "v": draw.normal(*maps, std=width**-0.5),
        "u": draw.normal(*maps, std=(shape["K"] * rank) ** -0.5),
        "dy": draw.normal(rows, width, grad=False),
    }


def projection_reference(inputs: Inputs, shape: Shape) -> Tensor:
    return project(inputs, inputs["kept"], inputs["index_NK"], shape)


def project(
    inputs: Inputs,
    kept_NK: Tensor,
    index_NK: Tensor,
    shape: Shape,
    part: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The projection by `part(x, kept, index, v, u)` for each grove; None: the reference."""
    edge_NK = index_NK - first_channel(inputs, shape)
    maps = [inputs["v"], inputs["u"]]
    if "rows" in shape:
        maps = [w.unflatten(0, (shape["G"], shape["M"])) for w in maps]
    return _by_grove(part or _reference_part, shape, [inputs["x"], kept_NK, edge_NK], maps)


def _reference_part(x: Tensor, kept: Tensor, index: Tensor, v: Tensor, u: Tensor) -> Tensor:
    return basis_projection(x, kept, index, v, u, inner_silu=True, backend="reference")


def projection_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    flops = 4 * shape["N"] * shape["K"] * shape["R"] * shape["D"]
    x, kept, maps = (moved_bytes(*t) for t in _parts(inputs))
    index = moved_bytes(inputs["index_NK"])
    return {
        "fwd": Cost(flops, 2 * x + kept + index + maps),
        "bwd": Cost(2 * flops, 3 * x + 2 * kept + index + 2 * maps),
    }


def _parts(inputs: Inputs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    kept = [inputs["kept"]] if "kept" in inputs else []
    return [inputs["x"]], kept, [inputs["v"], inputs["u"]]


# kan_layer: h = W_e x, edge_topk, projection.


def layer_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    lead = (shape["G"],) if "rows" in shape else ()
    w = draw.normal(*lead, shape["M"], shape["D"], std=shape["D"] ** -0.5)
    return {"w": w} | _maps(shape, draw) | _edge_weights(shape, draw)


def layer_route(inputs: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    h_NM = _by_grove(F.linear, shape, [inputs["x"]], [inputs["w"]])
    kept = route(h_NM, inputs, shape)
    return kept.value_NK.to(inputs["x"].dtype), kept.index_NK


def layer_reference(inputs: Inputs, shape: Shape) -> Tensor:
    return project(inputs, *layer_route(inputs, shape), shape)


def layer_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    edges = 2 * shape["N"] * shape["M"] * shape["D"]
    flops = edges + 4 * shape["N"] * shape["K"] * shape["R"] * shape["D"]
    x, _, maps = (moved_bytes(*t) for t in _parts(inputs))
    weights = maps + moved_bytes(inputs["w"], inputs["coef"], inputs["scale"])
    # h in the backward pass is recomputed or read, neither of which is compulsory.
    return {
        "fwd": Cost(flops, 2 * x + weights),
        "bwd": Cost(2 * flops, 3 * x + 2 * weights),
    }


# polynomial: y_j = b_j + sum_p sum_i coef_pji T_p(tanh x_i).


def polynomial_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    terms = shape["degree"] + 1
    std = 1 / math.sqrt(terms * shape["I"])
    return {
        "x": draw.normal(shape["N"], shape["I"]),
        "coef": draw.normal(terms, shape["J"], shape["I"], std=std),
        "bias": draw.normal(shape["J"], std=0.1),
        "dy": draw.normal(shape["N"], shape["J"], grad=False),
    }


def polynomial_reference(inputs: Inputs, shape: Shape) -> Tensor:
    return polynomial(inputs["x"], inputs["coef"], inputs["bias"], **POLYNOMIAL)


def polynomial_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    # T_0 = 1 is a bias: degree * I terms need a product.
    flops = 2 * shape["N"] * shape["degree"] * shape["I"] * shape["J"]
    x, coef, y = (moved_bytes(inputs[name]) for name in ("x", "coef", "dy"))
    return {
        "fwd": Cost(flops, x + coef + y),
        "bwd": Cost(2 * flops, 2 * x + 2 * coef + y),
    }


FUNCTIONS: dict[str, Function] = {
    "permute": Function(permute_inputs, permute_reference, permute_costs),
    "edge_topk": Function(
        edge_inputs, edge_reference, edge_costs, lambda i, s: edge_reference(i, s)[1]
    ),
    "projection": Function(projection_inputs, projection_reference, projection_costs),
    "kan_layer": Function(
        layer_inputs, layer_reference, layer_costs, lambda i, s: layer_route(i, s)[1]
    ),
    "polynomial": Function(polynomial_inputs, polynomial_reference, polynomial_costs),
}

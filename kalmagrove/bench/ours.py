"""Our implementations of the ops: `kalmagrove_kernels.<op>` by backend, and fused variants.

Looked up by name when they run, so that a backend that is missing here is only reported.
"""

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor

from kalmagrove.bench import ops
from kalmagrove.bench.spec import Implementation, Inputs, Shape, UnavailableError, kernel

Run = Callable[[Inputs, Shape], Any]


def permute(backend: str) -> Run:
    def run(inputs: Inputs, shape: Shape) -> Any:
        sort = kernel("permute", "sort_pairs")
        return sort(inputs["index_NK"], ops.channels(shape), backend=backend)

    return run


def edge(backend: str) -> Run:
    return lambda inputs, shape: _edge_topk(inputs["h"], inputs, shape, backend)


def _edge_topk(h_NM: Tensor, inputs: Inputs, shape: Shape, backend: str) -> Any:
    weights = inputs["coef"], inputs["scale"], inputs["range"]
    options = ops.edge_options(inputs, shape)
    return kernel("edge", "edge_topk")(h_NM, *weights, backend=backend, **options)


def _edge_topk_linear(inputs: Inputs, shape: Shape) -> Any:
    """h, the edges and the top-k in one kernel."""
    if "rows" in shape:
        raise UnavailableError("the fused kernel of h and the edges takes no groves")
    given = (inputs[name] for name in ("x", "w", "coef", "scale", "range"))
    function = kernel("edge.triton_linear", "edge_topk_linear")
    return function(*given, **ops.edge_options(inputs, shape))


def projection(backend: str) -> Run:
    return lambda inputs, shape: _project(inputs, inputs["kept"], inputs["index_NK"], backend)


def _project(inputs: Inputs, kept_NK: Tensor, index_NK: Tensor, backend: str) -> Any:
    given = inputs["x"], kept_NK, index_NK, inputs["v"], inputs["u"]
    return kernel("projection", "basis_projection")(*given, inner_silu=True, backend=backend)


def fused(run: Run) -> Run:
    """The same with the projection's kernel that makes z and the expanded rows in one."""

    def patched(inputs: Inputs, shape: Shape) -> Any:
        tiles = importlib.import_module("kalmagrove_kernels.projection.tiles")
        with mock.patch.object(tiles, "FUSED", set(tiles.TILES["fused"])):
            return run(inputs, shape)

    return patched


def layer(edge_backend: str, projection_backend: str) -> Run:
    """edge_backend: "linear" for the kernel that makes h too."""

    def run(inputs: Inputs, shape: Shape) -> Any:
        x = inputs["x"]
        if edge_backend == "linear":
            kept = _edge_topk_linear(inputs, shape)
        else:
            h_NM, x = _pre_activations(inputs, shape)
            kept = _edge_topk(h_NM, inputs, shape, edge_backend)
        return _project(
            inputs | {"x": x}, kept.value_NK.to(x.dtype), kept.index_NK, projection_backend
        )

    return run


def _pre_activations(inputs: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    """h, and x for the projection."""
    x, w = inputs["x"], inputs["w"]
    if "rows" not in shape:
        h_NM, beside_ND = kernel("projection", "linear_beside")(x, w)
        return h_NM, beside_ND
    linear = kernel("projection", "grouped_linear")
    return linear(x, w, inputs["start_G1"], backend="triton"), x


def polynomial(backend: str) -> Run:
    def run(inputs: Inputs, shape: Shape) -> Any:
        given = inputs["x"], inputs["coef"], inputs["bias"]
        return kernel("polynomial", "polynomial")(*given, backend=backend, **ops.POLYNOMIAL)

    return run


def _triton(name: str, run: Run) -> Implementation:
    return Implementation(name, run, backend="triton")


def _cuda(name: str, run: Run) -> Implementation:
    return Implementation(name, run, backend="cuda")


OURS: dict[str, list[Implementation]] = {
    "permute": [_triton("ours", permute("triton")), _cuda("ours-cuda", permute("cuda"))],
    "edge_topk": [_triton("ours", edge("triton")), _cuda("ours-cuda", edge("cuda"))],
    "projection": [
        _triton("ours", projection("triton")),
        _triton("ours-fused", fused(projection("triton"))),
        _cuda("ours-cuda", projection("cuda")),
    ],
    "kan_layer": [
        _triton("ours", layer("triton", "triton")),
        _triton("ours-fused", fused(layer("triton", "triton"))),
        _triton("ours-linear", layer("linear", "triton")),
        _cuda("ours-cuda-edge", layer("cuda", "triton")),
        _cuda("ours-cuda", layer("cuda", "cuda")),
    ],
    "polynomial": [_triton("ours", polynomial("triton")), _cuda("ours-cuda", polynomial("cuda"))],
}

"""What our kernels are measured against: PyTorch's ways to do the same, and published MoEs.

Those that compute another function than the op (dense layers, mixtures of experts) bring it along:
they are checked against their own reference, and their floor is their own. Nothing is imported
before it is asked for. Letters as in `cases`; H hidden units, X inner width of an expert.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.bench import ops
from kalmagrove.bench.spec import (
    Cost,
    Draw,
    Function,
    Implementation,
    Inputs,
    Shape,
    moved_bytes,
    package,
)
from kalmagrove_kernels.polynomial import materialised
from kalmagrove_kernels.projection import dense_masked

# PyTorch.


def _dense_masked(x: Tensor, kept: Tensor, index: Tensor, v: Tensor, u: Tensor) -> Tensor:
    m_NM = kept.new_zeros(x.shape[0], v.shape[0]).scatter(1, index, kept)
    return dense_masked(x, m_NM, v, u, inner_silu=True)


def _grouped_mm(inputs: Inputs, kept: Tensor, index: Tensor) -> Tensor:
    """Rows gathered in the order of their channels, two grouped products, rows added up."""
    channel_S, order_S = index.flatten().sort(stable=True)
    token_S = order_S // index.shape[1]
    numbers = torch.arange(inputs["v"].shape[0], device=index.device)
    ends_C = torch.searchsorted(channel_S, numbers, right=True).int()
    x_SD = inputs["x"].index_select(0, token_S)
    z_SR = torch._grouped_mm(x_SD, inputs["v"].transpose(1, 2), offs=ends_C)
    gate_S1 = kept.reshape(-1, 1).index_select(0, order_S)
    y_SD = torch._grouped_mm(gate_S1 * F.silu(z_SR), inputs["u"], offs=ends_C)
    return torch.zeros_like(inputs["x"]).index_add(0, token_S, y_SD)


def _materialised(inputs: Inputs, shape: Shape) -> Tensor:
    """One product with all terms of x, which others write."""
    return materialised(inputs["x"], inputs["coef"], inputs["bias"], **ops.POLYNOMIAL)


def _topk_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    return {"h": draw.normal(shape["N"], shape["M"], grad=False)}


def _topk(inputs: Inputs, shape: Shape) -> Any:
    return inputs["h"].topk(shape["K"], dim=1)


def _topk_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    moved = moved_bytes(inputs["h"])
    size = inputs["h"].element_size() + 8
    return {"fwd": Cost(0, moved + shape["N"] * shape["K"] * size)}


TOPK = Function(_topk_inputs, lambda i, s: _topk(i, s)[0], _topk_costs)


# Dense layers: y = B silu(A x).


def dense(hidden: Callable[[Shape], float]) -> Function:
    """A two-matrix layer of so many hidden units, rounded to a multiple of 8."""

    def inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        draw = Draw(generator, dtype)
        rows, width, units = shape["N"], shape["D"], max(8, 8 * round(hidden(shape) / 8))
        return {
            "x": draw.normal(rows, width),
            "a": draw.normal(units, width, std=width**-0.5),
            "b": draw.normal(width, units, std=units**-0.5),
            "dy": draw.normal(rows, width, grad=False),
        }

    def costs(shape: Shape, given: Inputs) -> dict[str, Cost]:
        flops = 2 * shape["N"] * (given["a"].numel() + given["b"].numel())
        x, weights = moved_bytes(given["x"]), moved_bytes(given["a"], given["b"])
        return {
            "fwd": Cost(flops, 2 * x + weights),
            "bwd": Cost(2 * flops, 3 * x + 2 * weights),
        }

    return Function(inputs, _dense, costs)


def _dense(inputs: Inputs, shape: Shape) -> Tensor:
    return F.linear(F.silu(F.linear(inputs["x"], inputs["a"])), inputs["b"])


def _total(shape: Shape) -> float:
    """Hidden units of equal parameters: M + 2 M R rows of width D, in two matrices."""
    return float(ops.channels(shape) * (1 + 2 * shape["R"]) / 2)


def _active(shape: Shape) -> float:
    """Of equal parameters that a token uses: all its edges, and the maps of the kept."""
    return float((shape["M"] + 2 * shape["K"] * shape["R"]) / 2)


# Mixtures of SwiGLU experts, as published: softmax over the K largest logits of C experts.


def moe(interleaved: bool) -> Function:
    """C experts of the inner width that makes a token's operations those of the op.

    An expert has three matrices of X units, a channel two of R: X = 2 R / 3, to a multiple of 8.
    interleaved: gate and up take turns in the rows of `gate_up`, else one follows the other.
    """

    def inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        draw = Draw(generator, dtype)
        rows, width, experts = shape["N"], shape["D"], ops.channels(shape)
        inner = max(8, 8 * round(shape["R"] / 12))
        return {
            "x": draw.normal(rows, width),
            "router": draw.normal(experts, width, std=width**-0.5),
            "gate_up": draw.normal(experts, 2 * inner, width, std=width**-0.5),
            "down": draw.normal(experts, width, inner, std=inner**-0.5),
            "dy": draw.normal(rows, width, grad=False),
        }

    def reference(given: Inputs, shape: Shape) -> Tensor:
        weight_NK, index_NK = _softmax_topk(given, shape)
        experts = len(given["router"])
        z_NE2X = F.linear(given["x"], given["gate_up"].flatten(0, 1)).unflatten(1, (experts, -1))
        if interleaved:
            gate, up = z_NE2X[..., ::2], z_NE2X[..., 1::2]
        else:
            gate, up = z_NE2X.chunk(2, dim=-1)
        m_NE = weight_NK.new_zeros(len(weight_NK), experts).scatter(1, index_NK, weight_NK)
        act = F.silu(gate) * up * m_NE.to(gate.dtype).unsqueeze(-1)
        return act.flatten(1) @ given["down"].transpose(1, 2).flatten(0, 1)

    def costs(shape: Shape, given: Inputs) -> dict[str, Cost]:
        inner = given["down"].shape[2]
        flops = 2 * shape["N"] * given["router"].numel()
        flops += 6 * shape["N"] * shape["K"] * shape["D"] * inner
        x = moved_bytes(given["x"])
        weights = moved_bytes(given["router"], given["gate_up"], given["down"])
        return {
            "fwd": Cost(flops, 2 * x + weights),
            "bwd": Cost(2 * flops, 3 * x + 2 * weights),
        }

    return Function(inputs, reference, costs, lambda i, s: _softmax_topk(i, s)[1])


def _softmax_topk(given: Inputs, shape: Shape) -> tuple[Tensor, Tensor]:
    logits = F.linear(given["x"], given["router"])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    index_NK = given.get("index_NK")
    if index_NK is None:
        index_NK = logits.topk(shape["K"], dim=1).indices
    return logits.gather(1, index_NK).softmax(dim=1), index_NK


def _liger(inputs: Inputs, shape: Shape) -> Any:
    """liger_kernel 0.8.5: `LigerFusedMoEFunction.apply(x, gate_up, down, index, weights)`."""
    # Its autotuner tries some 240 variants a shape; unless asked for, it keeps to its one default.
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    module = package("liger_kernel.ops.fused_moe", "liger-kernel")
    weight_NK, index_NK = _softmax_topk(inputs, shape)
    weight_NK = weight_NK.to(inputs["x"].dtype)
    return module.LigerFusedMoEFunction.apply(
        inputs["x"], inputs["gate_up"], inputs["down"], index_NK.int(), weight_NK
    )


def _sonicmoe(inputs: Inputs, shape: Shape) -> Any:
    """sonic-moe 0.1.2: experts last in its weights' shapes, gate and up interleaved."""
    module = package("sonicmoe", "sonic-moe")
    return module.moe_TC_softmax_topk_layer(
        inputs["x"],
        inputs["router"],
        inputs["gate_up"].permute(1, 2, 0),
        None,
        inputs["down"].permute(1, 2, 0),
        None,
        shape["K"],
        torch.cuda.current_stream().cuda_stream,
        "swiglu",
    )[0]


def _gemm_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    wide = shape["degree"] * shape["I"]
    return {
        "x": draw.normal(shape["N"], wide),
        "a": draw.normal(shape["J"], wide, std=wide**-0.5),
        "dy": draw.normal(shape["N"], shape["J"], grad=False),
    }


def _gemm(inputs: Inputs, shape: Shape) -> Tensor:
    return F.linear(inputs["x"], inputs["a"])


def _gemm_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    flops = 2 * inputs["x"].numel() * shape["J"]
    x, a, y = (moved_bytes(inputs[name]) for name in ("x", "a", "dy"))
    return {"fwd": Cost(flops, x + a + y), "bwd": Cost(2 * flops, 2 * x + 2 * a + y)}


GEMM = Function(_gemm_inputs, _gemm, _gemm_costs)  # the product alone, its terms given

PEERS: dict[str, list[Implementation]] = {
    "permute": [
        Implementation("torch.sort", ops.permute_reference),
    ],
    "edge_topk": [
        Implementation("torch-reference", ops.edge_reference),
        Implementation("torch.topk", _topk, TOPK),
    ],
    "projection": [
        Implementation("torch-reference", ops.projection_reference),
        Implementation(
            "dense-masked",
            lambda i, s: ops.project(i, i["kept"], i["index_NK"], s, _dense_masked),
        ),
        Implementation("grouped_mm", lambda i, s: _grouped_mm(i, i["kept"], i["index_NK"])),
    ],
    "kan_layer": [
        Implementation("torch-reference", ops.layer_reference),
        Implementation(
            "dense-masked",
            lambda i, s: ops.project(i, *ops.layer_route(i, s), s, _dense_masked),
        ),
        Implementation("grouped_mm", lambda i, s: _grouped_mm(i, *ops.layer_route(i, s))),
        Implementation("dense", _dense, dense(_total)),
        Implementation("dense-active", _dense, dense(_active)),
        Implementation("liger", _liger, moe(interleaved=False)),
        Implementation("sonicmoe", _sonicmoe, moe(interleaved=True)._replace(selects=None)),
    ],
    "polynomial": [
        Implementation("torch-reference", ops.polynomial_reference),
        Implementation("materialised", _materialised),
        Implementation("gemm", _gemm, GEMM),
    ],
}

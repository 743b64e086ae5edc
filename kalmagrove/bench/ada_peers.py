"""What the kernels of ADA are measured against: PyTorch, and flash-linear-attention (fla-core).

Those that compute another function than the op bring it along: they are checked against their own
reference, and their floor is their own. Nothing is imported before it is asked for. Letters as in
`ada`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kalmagrove.bench import ada
from kalmagrove.bench.spec import (
    Cost,
    Function,
    Implementation,
    Inputs,
    Shape,
    UnavailableError,
    moved_bytes,
    package,
)
from kalmagrove.nn.norm import upcast

QUERIES = 1024  # that the softmax reference takes at once
SCORES = 2**33  # that are checked of softmax attention, in whole heads; at least one


# fla-core 0.6.0. Its taps come in the order of a convolution: the token's own is the last.


def _fla(module: str, name: str) -> Any:
    return getattr(package(f"fla.{module}", "fla-core"), name)


def _reversed(function: Function, key: str = "taps") -> Function:
    """The function with taps in fla's order."""

    def reference(inputs: Inputs, shape: Shape) -> Any:
        return function.reference(inputs | {key: inputs[key].flip(1)}, shape)

    def rounded(inputs: Inputs, shape: Shape) -> Any:
        run = function.rounded or function.reference
        return run(inputs | {key: inputs[key].flip(1)}, shape)

    return function._replace(reference=reference, rounded=rounded)


def _fla_attention(inputs: Inputs, shape: Shape) -> Any:
    k = inputs["k"]
    if "taps" in inputs:
        k = _fla("modules.causal_conv1d", "causal_conv1d")(k, inputs["taps"])[0]
    q, k, v = (ada.heads(x, shape) for x in (inputs["q"], k, inputs["v"]))
    attend = _fla("ops.simple_gla", "chunk_simple_gla")
    return attend(q, k, v, g_gamma=inputs["log_decay"], scale=ada.scale(shape))[0]


def _fla_prepare(inputs: Inputs, shape: Shape) -> Any:
    if shape["steps"] != "conv":
        raise UnavailableError("fla-core has kernels for the steps, but none for all of them")
    convolve = _fla("modules.causal_conv1d", "causal_conv1d")
    return ada.heads(convolve(inputs["x"], inputs["taps"])[0], shape)


def _fla_norm_gate(inputs: Inputs, shape: Shape) -> Any:
    gated = _fla("modules.norm.fused_norm_gate", "rms_norm_gated")
    return gated(inputs["o"], inputs["g"], inputs["weight"], None, eps=ada.NORM_EPS)


def _fla_step(inputs: Inputs, shape: Shape) -> Any:
    step = _fla("ops.simple_gla", "fused_recurrent_simple_gla")
    return step(
        *(inputs[name] for name in ("q", "k", "v")),
        g_gamma=inputs["log_decay"],
        scale=ada.scale(shape),
        initial_state=inputs["state"],
        output_final_state=True,
    )


# Softmax attention: another function of the same inputs, quadratic in the tokens.


def _sdpa(inputs: Inputs, shape: Shape) -> Tensor:
    q, k, v = (ada.heads(inputs[name], shape).transpose(1, 2) for name in ("q", "k", "v"))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=ada.scale(shape))
    return out.transpose(1, 2)


def _softmax(inputs: Inputs, shape: Shape) -> Tensor:
    """The formula, in fp32, some queries at a time, whose scores the backward makes again."""
    q, k, v = (ada.heads(inputs[name], shape).transpose(1, 2) for name in ("q", "k", "v"))
    outs = [
        checkpoint(_softmax_of, q[:, :, i : i + QUERIES], k, v, i, shape, use_reentrant=False)
        for i in range(0, shape["T"], QUERIES)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2)


def _softmax_of(q: Tensor, k: Tensor, v: Tensor, begin: int, shape: Shape) -> Tensor:
    end = begin + q.shape[2]
    seen = torch.arange(end, device=q.device) <= torch.arange(begin, end, device=q.device)[:, None]
    scores = upcast(q) * ada.scale(shape) @ upcast(k[:, :, :end]).mT
    weight = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weight @ upcast(v[:, :, :end])).to(v.dtype)


def _softmax_rounded(inputs: Inputs, shape: Shape) -> Tensor:
    q = inputs["q"]
    with torch.autocast(q.device.type, torch.bfloat16, enabled=q.dtype == torch.bfloat16):
        return _softmax(inputs, shape)


def _some_heads(tensors: Inputs, shape: Shape) -> list[Inputs]:
    """One at a time, spread over all; of long rows few."""
    most = min(shape["H"], max(1, SCORES // (shape["B"] * shape["T"] ** 2)))
    chosen = [i * shape["H"] // most for i in range(most)]
    return ada.pieces(tensors, shape, [slice(i, i + 1) for i in chosen])


def _softmax_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    half = shape["B"] * shape["H"] * shape["D"] * shape["T"] ** 2  # one product, causal
    x = moved_bytes(inputs["q"])
    return {"fwd": Cost(2 * half, 4 * x), "bwd": Cost(5 * half, 7 * x)}


SOFTMAX = Function(
    ada.attention_inputs, _softmax, _softmax_costs, rounded=_softmax_rounded, pieces=_some_heads
)

PEERS: dict[str, list[Implementation]] = {
    "ada_decode": [
        Implementation("torch", ada.decode_reference),
        Implementation("fla-recurrent", _fla_step, ada.STEP),
    ],
    "ada_norm_gate": [
        Implementation("torch", ada.gate_reference),
        Implementation("fla", _fla_norm_gate),
    ],
    "ada_prepare": [
        Implementation("torch", ada.prepare_reference),
        Implementation("fla", _fla_prepare, _reversed(ada.FUNCTIONS["ada_prepare"])),
    ],
    "ada": [
        Implementation("torch", ada.attention_reference),
        Implementation("fla", _fla_attention, _reversed(ada.ATTENTION)),
        Implementation("fla-plain", _fla_attention, ada.PLAIN),
        Implementation("sdpa", _sdpa, SOFTMAX),
    ],
}

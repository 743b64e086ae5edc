"""The ops of `kalmagrove bench ada` as functions, and the cases they are measured at.

`ada_ours` and `ada_peers` list implementations. Letters: B rows, T tokens, H heads, D width of a
head (queries, keys, values), P taps, C = H * D channels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kalmagrove.bench.spec import Case, Cost, Draw, Function, Inputs, Shape, moved_bytes
from kalmagrove.nn.attention.key_kernel import convolve
from kalmagrove.nn.norm import upcast
from kalmagrove.nn.rope import rotary_angles, rotate
from kalmagrove_kernels.ada import chunked, recurrent

TIME_CONSTANTS = (4.0, 512.0)  # of the first and the last head, in tokens
NORM_EPS, ROPE_THETA = 1e-5, 10000.0
POSITION = 4000  # of the token that `ada_decode` makes
PIECE = 2**25  # numbers of a tensor that the reference takes at once


def cases(*, tiny: bool) -> list[Case]:
    """All cases, cheap ops first; `tiny` ones are for machines without a GPU."""
    rows: list[Shape]
    if tiny:
        rows = [{"B": 2, "T": 70, "H": 2, "D": 16, "P": 4}]
        prepared, batches = rows, [2]
        token = {"H": 2, "D": 16, "P": 4}
    else:
        rows = [
            {"B": b, "T": t, "H": h, "D": d, "P": 4}
            for b, t, h, d in (
                (1, 16384, 16, 128),
                (4, 4096, 16, 128),
                (8, 2048, 32, 64),
                (32, 1024, 16, 64),
                (1, 65536, 16, 128),
            )
        ]
        prepared, batches = [rows[0], rows[2]], [1, 8, 64, 256]
        token = {"H": 16, "D": 128, "P": 4}
    return [
        *(Case("ada_decode", {"B": batch} | token) for batch in batches),
        *(Case("ada_norm_gate", _without_taps(shape)) for shape in prepared),
        *(Case("ada_prepare", s | {"steps": steps}) for s in prepared for steps in ("conv", "all")),
        *(Case("ada", shape) for shape in rows),
    ]


def _without_taps(shape: Shape) -> Shape:
    return {letter: number for letter, number in shape.items() if letter != "P"}


def heads(x_BTC: Tensor, shape: Shape) -> Tensor:
    """[B, T, H * D] to [B, T, H, D]."""
    return x_BTC.unflatten(-1, (-1, shape["D"]))


def scale(shape: Shape) -> float:
    return float(shape["D"] ** -0.5)


def _log_decay(shape: Shape, device: torch.device) -> Tensor:
    low, high = (math.log(tokens) for tokens in TIME_CONSTANTS)
    return -(-torch.linspace(low, high, shape["H"], device=device)).exp()


def _taps(shape: Shape, generator: torch.Generator, grad: bool = True) -> Tensor:
    """fp32, as the model hands them on, [C, P]."""
    draw = Draw(generator, torch.float32)
    return draw.normal(shape["H"] * shape["D"], shape["P"], std=shape["P"] ** -0.5, grad=grad)


# ada: o = attention(q, k * taps, v), decayed per head.


def attention_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    packed = shape["B"], shape["T"], shape["H"] * shape["D"]
    given = {name: draw.normal(*packed) for name in ("q", "k", "v")}
    dy = draw.normal(shape["B"], shape["T"], shape["H"], shape["D"], grad=False)
    return given | {"log_decay": _log_decay(shape, generator.device), "dy": dy}


def convolved_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    return attention_inputs(shape, generator, dtype) | {"taps": _taps(shape, generator)}


def learned_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """With a gradient of the decays."""
    given = convolved_inputs(shape, generator, dtype)
    return given | {"log_decay": given["log_decay"].requires_grad_()}


def attention_reference(inputs: Inputs, shape: Shape) -> Tensor:
    """[B, T, H, D], with the convolution if there are taps."""
    k = convolve(inputs["k"], inputs["taps"]) if "taps" in inputs else inputs["k"]
    q, k, v = (heads(x, shape).transpose(1, 2) for x in (inputs["q"], k, inputs["v"]))
    out, _ = chunked(q, k, v, scale=scale(shape), log_decay_H=inputs["log_decay"])
    return out.transpose(1, 2)


def attention_rounded(inputs: Inputs, shape: Shape) -> Tensor:
    """The reference, which computes in fp32, with operands of its products in bf16 if q is."""
    q = inputs["q"]
    with torch.autocast(q.device.type, torch.bfloat16, enabled=q.dtype == torch.bfloat16):
        return attention_reference(inputs, shape)


def attention_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    """Products of the recurrence: two a pass forward; backward the state again, and two each."""
    products = 2 * shape["B"] * shape["T"] * shape["H"] * shape["D"] ** 2
    own = [inputs[name] for name in ("taps", "log_decay") if name in inputs]
    taps = 2 * inputs["k"].numel() * shape["P"] if "taps" in inputs else 0
    x, weights = moved_bytes(inputs["q"]), moved_bytes(*own)
    return {
        "fwd": Cost(2 * products + taps, 4 * x + weights),  # q, k, v; o
        "bwd": Cost(5 * products + 2 * taps, 7 * x + 2 * weights),  # q, k, v, do; dq, dk, dv
    }


def by_heads(tensors: Inputs, shape: Shape) -> list[Inputs]:
    """Heads do not meet: some at a time, all of them."""
    at_once = max(1, PIECE // (shape["B"] * shape["T"] * shape["D"]))
    return pieces(tensors, shape, [slice(i, i + at_once) for i in range(0, shape["H"], at_once)])


def pieces(tensors: Inputs, shape: Shape, chosen: list[slice]) -> list[Inputs]:
    """Of inputs, or of outcomes and gradients by name, the heads of each slice."""
    return [
        {name: _of_heads(name, t, own, shape["H"]) for name, t in tensors.items()} for own in chosen
    ]


def _of_heads(name: str, tensor: Tensor, own: slice, count: int) -> Tensor:
    kind = name.removeprefix("d")
    if kind == "log_decay":
        part = tensor[own]
    elif kind == "taps":
        part = tensor.unflatten(0, (count, -1))[own].flatten(0, 1)
    elif kind == "y":
        part = tensor[:, :, own]
    else:
        part = tensor.unflatten(2, (count, -1))[:, :, own].flatten(2)
    return part.detach().requires_grad_(tensor.requires_grad)


ATTENTION = Function(
    convolved_inputs,
    attention_reference,
    attention_costs,
    rounded=attention_rounded,
    pieces=by_heads,
)
LEARNED = ATTENTION._replace(inputs=learned_inputs)
PLAIN = ATTENTION._replace(inputs=attention_inputs)


# ada_prepare: packed keys to heads; convolution alone, or SiLU, norm and rotation too.


def prepare_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    given = {
        "x": draw.normal(shape["B"], shape["T"], shape["H"] * shape["D"]),
        "taps": _taps(shape, generator),
        "dy": draw.normal(shape["B"], shape["T"], shape["H"], shape["D"], grad=False),
    }
    if shape["steps"] == "all":
        given["angles"] = _angles(0, shape["T"], shape, generator.device)
    return given


def _angles(start: int, tokens: int, shape: Shape, device: torch.device) -> Tensor:
    return rotary_angles(start, tokens, shape["D"], ROPE_THETA, device)


def prepare_reference(inputs: Inputs, shape: Shape) -> Tensor:
    x_BTC = convolve(inputs["x"], inputs["taps"])
    if shape["steps"] == "conv":
        return heads(x_BTC, shape)
    return positioned(heads(F.silu(x_BTC), shape), inputs["angles"]).to(x_BTC.dtype)


def positioned(x_BTHD: Tensor, angles_T1d: Tensor) -> Tensor:
    """RMS norm without weights and RoPE, in fp32."""
    return rotate(F.rms_norm(upcast(x_BTHD), x_BTHD.shape[-1:], eps=NORM_EPS), angles_T1d)


def prepare_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    x, taps = moved_bytes(inputs["x"]), moved_bytes(inputs["taps"])
    return {"fwd": Cost(0, 2 * x + taps), "bwd": Cost(0, 3 * x + 2 * taps)}


# ada_norm_gate: RMS norm of each head, with weights, times SiLU of the gate.


def gate_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    size = shape["B"], shape["T"], shape["H"], shape["D"]
    given = {"o": draw.normal(*size), "g": draw.normal(*size)}
    return given | {"weight": draw.normal(shape["D"]), "dy": draw.normal(*size, grad=False)}


def gate_reference(inputs: Inputs, shape: Shape) -> Tensor:
    o, weight = inputs["o"], inputs["weight"]
    normed = F.rms_norm(upcast(o), weight.shape, upcast(weight), NORM_EPS)
    return normed.to(o.dtype) * F.silu(inputs["g"])


def gate_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    x, weight = moved_bytes(inputs["o"]), moved_bytes(inputs["weight"])
    return {"fwd": Cost(0, 3 * x + weight), "bwd": Cost(0, 5 * x + 2 * weight)}


# ada_decode: one token of every row, norm and rotation included; state and tail advance.


def decode_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    batch, channels = shape["B"], shape["H"] * shape["D"]
    return {
        "q": draw.normal(batch, channels, grad=False),
        "k": draw.normal(batch, channels, grad=False),
        "v": draw.normal(batch, shape["H"], shape["D"], grad=False),
        "tail": draw.normal(batch, shape["P"] - 1, channels, grad=False),
        "taps": _taps(shape, generator, grad=False),
        "position": torch.tensor([POSITION], device=generator.device),
    } | _past(shape, generator)


def _past(shape: Shape, generator: torch.Generator) -> Inputs:
    wide = Draw(generator, torch.float32)
    state = wide.normal(shape["B"], shape["H"], shape["D"], shape["D"], grad=False)
    return {"state": state, "log_decay": _log_decay(shape, generator.device)}


def decode_reference(inputs: Inputs, shape: Shape) -> Any:
    """o [B, H, D], the state and the tail after it."""
    k_B1C, tail = inputs["k"].unsqueeze(1), inputs["tail"]
    convolved = convolve(k_B1C, inputs["taps"], tail_BPC=tail)
    angles = _angles(POSITION, 1, shape, tail.device)
    q, k = (
        positioned(heads(x, shape), angles).transpose(1, 2)
        for x in (inputs["q"].unsqueeze(1), convolved)
    )
    v, past = inputs["v"].unsqueeze(2), inputs["state"]
    o_BH1D, state = recurrent(
        q, k, v, scale=scale(shape), log_decay_H=inputs["log_decay"], state_BHRV=past
    )
    return o_BH1D.squeeze(2), state, torch.cat([tail, k_B1C], dim=1)[:, 1:]


def decode_costs(shape: Shape, inputs: Inputs) -> dict[str, Cost]:
    twice = moved_bytes(*(inputs[name] for name in ("state", "tail") if name in inputs))
    once = moved_bytes(*(inputs[name] for name in ("taps", "log_decay") if name in inputs))
    once += 4 * moved_bytes(inputs["q"])  # q, k, v; o
    return {"fwd": Cost(4 * inputs["state"].numel(), 2 * twice + once)}


# The recurrence alone, of queries and keys that others have made.


def step_inputs(shape: Shape, generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    draw = Draw(generator, dtype)
    size = shape["B"], 1, shape["H"], shape["D"]
    given = {name: draw.normal(*size, grad=False) for name in ("q", "k", "v")}
    return given | _past(shape, generator)


def step_reference(inputs: Inputs, shape: Shape) -> Any:
    q, k, v = (inputs[name].transpose(1, 2) for name in ("q", "k", "v"))
    decay, past = inputs["log_decay"], inputs["state"]
    o, state = recurrent(q, k, v, scale=scale(shape), log_decay_H=decay, state_BHRV=past)
    return o.transpose(1, 2), state


STEP = Function(step_inputs, step_reference, decode_costs, outcomes=("y", "state"))

FUNCTIONS: dict[str, Function] = {
    "ada_decode": Function(
        decode_inputs,
        decode_reference,
        decode_costs,
        outcomes=("y", "state", "tail"),
        in_place=True,
    ),
    "ada_norm_gate": Function(gate_inputs, gate_reference, gate_costs),
    "ada_prepare": Function(prepare_inputs, prepare_reference, prepare_costs),
    "ada": ATTENTION,
}

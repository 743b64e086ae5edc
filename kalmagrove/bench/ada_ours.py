"""Our implementations of the ops of `kalmagrove bench ada`: `kalmagrove_kernels.ada` by backend.

Looked up by name when they run, so that a backend that is missing here is only reported.
"""

from collections.abc import Callable
from typing import Any

from kalmagrove.bench import ada
from kalmagrove.bench.spec import Implementation, Inputs, Shape, kernel

Run = Callable[[Inputs, Shape], Any]


def attention(backend: str) -> Run:
    """With the convolution if there are taps, by this backend; the attention is Triton's."""

    def run(inputs: Inputs, shape: Shape) -> Any:
        q, k, v = (ada.heads(inputs[name], shape) for name in ("q", "k", "v"))
        if "taps" in inputs:
            k = _prepare(inputs["k"], inputs, shape, backend)
        attend = kernel("ada", "attention")
        decay = inputs["log_decay"]
        own = "triton" if backend == "cuda" else backend
        return attend(q, k, v, scale=ada.scale(shape), log_decay_H=decay, backend=own)[0]

    return run


def prepare(backend: str) -> Run:
    def run(inputs: Inputs, shape: Shape) -> Any:
        rest: dict[str, Any] = {}
        if shape["steps"] == "all":
            rest = {"silu": True, "norm_eps": ada.NORM_EPS, "angles_THr": inputs["angles"]}
        return _prepare(inputs["x"], inputs, shape, backend, **rest)

    return run


def _prepare(x: Any, inputs: Inputs, shape: Shape, backend: str, **rest: Any) -> Any:
    function = kernel("ada", "prepare")
    size = {"heads": shape["H"], "width": shape["D"]}
    return function(x, taps_CP=inputs["taps"], backend=backend, **size, **rest)


def norm_gate(backend: str) -> Run:
    def run(inputs: Inputs, shape: Shape) -> Any:
        given = inputs["o"], inputs["g"], inputs["weight"]
        return kernel("ada", "norm_gate")(*given, eps=ada.NORM_EPS, backend=backend)

    return run


def decode(backend: str) -> Run:
    def run(inputs: Inputs, shape: Shape) -> Any:
        given = (inputs[name] for name in ("q", "k", "v", "state", "tail"))
        o_BHV = kernel("ada", "decode_step")(
            *given,
            heads=shape["H"],
            width=shape["D"],
            scale=ada.scale(shape),
            log_decay_H=inputs["log_decay"],
            taps_CP=inputs["taps"],
            silu=False,
            norm_eps=ada.NORM_EPS,
            rope_theta=ada.ROPE_THETA,
            position=inputs["position"],
            backend=backend,
        )
        return o_BHV, inputs["state"], inputs["tail"]

    return run


def _triton(name: str, run: Run, **function: Any) -> Implementation:
    return Implementation(name, run, backend="triton", **function)


def _cuda(name: str, run: Run, **function: Any) -> Implementation:
    return Implementation(name, run, backend="cuda", **function)


OURS: dict[str, list[Implementation]] = {
    "ada_decode": [_triton("ours", decode("triton"))],
    "ada_norm_gate": [_triton("ours", norm_gate("triton"))],
    "ada_prepare": [_triton("ours", prepare("triton")), _cuda("ours-cuda", prepare("cuda"))],
    "ada": [
        _triton("ours", attention("triton")),
        _cuda("ours-cuda", attention("cuda")),
        _cuda("ours-learned", attention("cuda"), function=ada.LEARNED),
        _triton("ours-plain", attention("triton"), function=ada.PLAIN),
    ],
}

"""One token of ADA decoding in Triton on a GPU, also replayed from a CUDA graph.

The truth is the reference in fp64; in half precision the error may be twice that of the reference.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels.ada.decode import decode_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FLOOR = {torch.bfloat16: 1e-4, torch.float16: 1e-4, torch.float32: 2e-5}
TAPS, STEPS = 4, 4


class Case(NamedTuple):
    """Tokens [STEPS, B, ...] of one linear output, and what they meet."""

    qkv: Tensor
    state: Tensor
    tail: Tensor
    options: dict[str, Any]

    def to(self, dtype: torch.dtype, state: torch.dtype) -> "Case":
        return Case(self.qkv.to(dtype), self.state.to(state), self.tail.to(dtype), self.options)

    def token(self, step: int) -> list[Tensor]:
        heads, width = self.options["heads"], self.options["width"]
        channels = heads * width
        q, k, v = self.qkv[step].split([channels, channels, self.qkv.shape[2] - 2 * channels], 1)
        return [q, k, v.unflatten(1, (heads, -1))]


def case(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Case:
    batch, heads, width, values = shape
    torch.manual_seed(sum(shape))
    channels = heads * width
    make = {"device": "cuda"}
    options = {
        "heads": heads,
        "width": width,
        "scale": width**-0.5,
        "taps_CP": torch.randn(channels, TAPS, **make),
        "log_decay_H": -torch.rand(heads, **make),
        "silu": True,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
    }
    qkv = torch.randn(STEPS, batch, 2 * channels + heads * values, **make).to(dtype)
    tail = torch.randn(batch, TAPS - 1, channels, **make).to(dtype)
    return Case(qkv, torch.randn(batch, heads, width, values, **make), tail, options)


def decode(given: Case, backend: str) -> list[Tensor]:
    """The outputs of all tokens, then the state and the tail."""
    state, tail = given.state.clone(), given.tail.clone()
    outputs = []
    for step in range(STEPS):
        position = torch.tensor([100 + step], device="cuda")
        outputs.append(
            decode_step(
                *given.token(step), state, tail, position=position, backend=backend, **given.options
            )
        )
    return [torch.stack(outputs), state, tail]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 16, 128, 128),
        (256, 16, 128, 128),
        (8, 16, 64, 256),
        (3, 5, 60, 24),
        (2, 3, 24, 129),
        (2, 4, 256, 256),
        (1, 1, 16, 16),
    ],
)
def test_it_is_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = case(shape, dtype)
    ours, again = decode(given, "triton"), decode(given, "triton")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    theirs = decode(given, "reference")
    truth = decode(given.to(torch.float64, torch.float64), "reference")
    assert torch.equal(ours[2], theirs[2])
    errors = [(relative(a, c), relative(b, c)) for a, b, c in zip(ours, theirs, truth, strict=True)]
    assert all(a <= 2 * b + FLOOR[dtype] for a, b in errors), errors


@pytest.mark.parametrize("batch", [1, 256])
def test_a_graph_replays_as_the_position_advances(batch: int) -> None:
    given = case((batch, 16, 128, 128), torch.bfloat16)
    expected = decode(given, "triton")
    state, tail = given.state.clone(), given.tail.clone()
    token = [x.clone() for x in given.token(0)]
    position = torch.tensor([100], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = decode_step(*token, state, tail, position=position, backend="triton", **given.options)
        position += 1
    outputs = []
    for step in range(STEPS):
        for static, new in zip(token, given.token(step), strict=True):
            static.copy_(new)
        graph.replay()
        outputs.append(o.clone())
    for a, b in zip([torch.stack(outputs), state, tail], expected, strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_device() -> None:
    given = case((2, 4, 64, 64), torch.bfloat16)
    position = torch.tensor([7], device="cuda")
    arguments = [*given.token(0), given.state, given.tail]
    decode_step(*arguments, position=position, backend="triton", **given.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_step(*arguments, position=position, backend="triton", **given.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")

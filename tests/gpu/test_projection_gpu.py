"""The projection on a GPU: against fp64, beside the reference in the same number format.

Letters: N tokens, D model width, C channels, R rank, K kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kalmagrove_kernels import permute, projection

accumulate = pytest.importorskip("kalmagrove_kernels.projection.accumulate")
Block = accumulate.Block
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

N, D, C, K = 16384, 2048, 104, 8
NAMES = ("y", "dx", "dgate", "dv", "du")
Form = Callable[..., Tensor]


@contextmanager
def poisoned() -> Iterator[None]:
    """NaN in all memory that is not yet written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def case(tokens: int, width: int, channels: int, rank: int, kept: int) -> list[Tensor]:
    gate, index = torch.randn(tokens, channels, device="cuda").topk(kept)
    v, u = torch.randn(2, channels, rank, width, device="cuda").unbind()
    x = torch.randn(tokens, width, device="cuda")
    return [x, gate, index, v / width**0.5, u / rank**0.5]


def run(form: Form, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of every floating tensor, for one random cotangent."""
    inputs = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in tensors]
    y = form(*inputs)
    cotangent = torch.randn(
        y.shape, generator=torch.Generator("cuda").manual_seed(0), device="cuda"
    )
    leaves = [t for t in inputs if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(dtype))]


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative RMS; where the exact one is zero, absolute."""
    norm = torch.linalg.vector_norm
    return [
        float(norm(a.double() - b) / (norm(b) if b.any() else 1))
        for a, b in zip(ours, exact, strict=True)
    ]


def check(
    tensors: list[Tensor],
    dtype: torch.dtype,
    floor: float,
    form: Form | None = None,
    **arguments: Any,
) -> None:
    """No further from fp64 than twice the reference is, or than `floor`; two runs are one."""
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in tensors]

    def ours(*args: Tensor) -> Tensor:
        if form:
            return form(*args, **arguments)
        return projection.basis_projection(*args, backend="triton", **arguments)

    def plain(*args: Tensor) -> Tensor:
        return projection.sorted_by_edge(*args, **arguments)

    with poisoned():
        first, again = run(ours, tensors, dtype), run(ours, tensors, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = run(plain, tensors, torch.float64)
    theirs = errors(run(plain, tensors, dtype), exact)
    for name, mine, other in zip(NAMES, errors(first, exact), theirs, strict=True):
        assert mine <= max(2 * other, floor), (name, mine, other)


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("rank", [64, 128, 256])
def test_production_shapes(rank: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = pytest.importorskip("kalmagrove_kernels.projection.tiles")
    monkeypatch.setattr(tiles, "FUSED", {f"r{rank}"} if fused else set())
    check(case(N, D, C, rank, K), torch.bfloat16, 0.0, inner_silu=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_odd_shapes(tokens: int, dtype: torch.dtype) -> None:
    check(case(tokens, 60, C, 24, K), dtype, 1e-6, inner_silu=False)


@pytest.mark.usefixtures("tf32")
def test_tf32() -> None:
    """Triton cuts the operands off where cuBLAS rounds them: still nearer than bf16's 3.5e-3."""
    check(case(512, 256, C, 64, K), torch.float32, 2.5e-3, inner_silu=True)


def test_a_rank_beyond_one_block() -> None:
    check(case(256, 128, 8, 320, 2), torch.bfloat16, 0.0, inner_silu=True)


def test_all_tokens_on_the_same_channels() -> None:
    x, gate, _, v, u = case(4000, D, C, 64, K)
    index = torch.arange(90, 90 + K, device="cuda").expand(len(x), K).contiguous()
    check([x, gate, index, v, u], torch.bfloat16, 0.0, inner_silu=True)


def test_no_tokens() -> None:
    tensors = case(0, 60, C, 24, K)

    def ours(*args: Tensor) -> Tensor:
        return projection.basis_projection(*args, inner_silu=True, backend="triton")

    with poisoned():
        results = run(ours, tensors, torch.bfloat16)
    assert results[0].shape == (0, 60)
    assert not any(t.any() for t in results)


def test_the_host_never_waits() -> None:
    x, gate, index, v, u = (
        t.bfloat16().requires_grad_() if t.is_floating_point() else t
        for t in case(63, 60, C, 24, K)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = projection.basis_projection(x, gate, index, v, u, inner_silu=True, backend="triton")
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def used(backend: str, rank: int) -> dict[str, int]:
    """Bytes of the GPU's memory beyond arguments: see `triton.Bytes`."""
    x, gate, index, v, u = case(N, D, C, rank, K)
    x, v, u = (t.bfloat16().requires_grad_() for t in (x, v, u))
    gate.requires_grad_()
    dy = torch.randn_like(x)
    peak, now = torch.cuda.max_memory_allocated, torch.cuda.memory_allocated
    before = now()
    torch.cuda.reset_peak_memory_stats()
    y = projection.basis_projection(x, gate, index, v, u, inner_silu=True, backend=backend)
    forward, saved = peak() - before, now() - before - y.nbytes
    before = now()
    torch.cuda.reset_peak_memory_stats()
    results = torch.autograd.grad(y, (x, gate, v, u), dy)
    backward = peak() - before
    assert len(results) == 4
    return {"forward": forward, "saved": saved, "backward": backward}


def test_memory_is_what_workspace_bytes_says() -> None:
    stages = pytest.importorskip("kalmagrove_kernels.projection.triton")
    stated = stages.workspace_bytes(N, K, C, 128, D, torch.bfloat16)
    for name, seen in used("triton", 128).items():
        assert seen == pytest.approx(getattr(stated, name), rel=0.02, abs=4 << 20), name


@pytest.mark.parametrize("block", [None, Block()])
def test_memory_of_sums_in_shared_memory(
    block: Block | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(accumulate.BLOCKS, "r64", block)
    cuda = pytest.importorskip("kalmagrove_kernels.projection.cuda")
    stated = cuda.workspace_bytes(N, K, C, 64, D, torch.bfloat16, torch.device("cuda"))
    for name, seen in used("cuda", 64).items():
        assert seen == pytest.approx(getattr(stated, name), rel=0.02, abs=4 << 20), name


def sums(block: Block) -> Form:
    """The CUDA backend that adds up in shared memory, in this way."""
    cuda = pytest.importorskip("kalmagrove_kernels.projection.cuda")
    return partial(cuda.basis_projection, block=block)


@pytest.mark.parametrize("block", [Block(), Block(10, tokens=512)])
def test_sums_in_shared_memory(block: Block) -> None:
    check(case(N, D, C, 64, K), torch.bfloat16, 0.0, sums(block), inner_silu=True)


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize("width", [64, 72, 200])
def test_sums_of_odd_shapes(tokens: int, width: int) -> None:
    tensors = case(tokens, width, C, 64, K)
    check(tensors, torch.bfloat16, 1e-6, sums(Block()), inner_silu=False)


def test_sums_of_all_tokens_on_the_same_channels() -> None:
    x, gate, _, v, u = case(4000, D, C, 64, K)
    index = torch.arange(90, 90 + K, device="cuda").expand(len(x), K).contiguous()
    form = sums(Block())
    check([x, gate, index, v, u], torch.float16, 0.0, form, inner_silu=True)


def test_sums_of_no_tokens_and_what_cannot_be() -> None:
    tensors = case(0, 64, C, 64, K)
    results = run(partial(sums(Block()), inner_silu=True), tensors, torch.bfloat16)
    assert results[0].shape == (0, 64)
    assert not any(t.any() for t in results)
    with pytest.raises(NotImplementedError, match="rank=20 must be 64"):
        run(partial(sums(Block()), inner_silu=True), case(9, 64, C, 20, K), torch.bfloat16)


def test_the_cuda_backend_falls_back_where_rows_are_not_of_16_bytes() -> None:
    form = partial(projection.basis_projection, backend="cuda")
    check(case(300, 60, C, 20, K), torch.bfloat16, 1e-6, form, inner_silu=True)


def test_the_host_does_not_wait_for_sums() -> None:
    x, gate, index, v, u = (
        t.bfloat16().requires_grad_() if t.is_floating_point() else t
        for t in case(63, 64, C, 64, K)
    )
    form = sums(Block())
    form(x, gate, index, v, u, inner_silu=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        form(x, gate, index, v, u, inner_silu=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_linear(dtype: torch.dtype) -> None:
    start = torch.tensor([0, 700, 700, 2000, 2001], device="cuda")
    tensors = [
        torch.randn(2001, 512, device="cuda").to(dtype),
        torch.randn(4, C, 512, device="cuda").to(dtype) / 512**0.5,
    ]

    def form(backend: str) -> Form:
        return lambda x, w: projection.grouped_linear(x, w, start, backend=backend)

    with poisoned():
        first, again = run(form("triton"), tensors, dtype), run(form("triton"), tensors, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    exact = run(form("reference"), tensors, torch.float64)
    theirs = errors(run(form("reference"), tensors, dtype), exact)
    for mine, other in zip(errors(first, exact), theirs, strict=True):
        assert mine <= max(2 * other, 1e-6)


@pytest.mark.parametrize(("tokens", "channels"), [(N, C), (N, 1664), (1, 3), (0, 3), (777, 20000)])
def test_sort(tokens: int, channels: int) -> None:
    index = torch.randint(channels, (tokens, K), device="cuda")
    with poisoned():
        ours = permute.sort_pairs(index, channels, backend="triton")
    theirs = permute.sort_pairs(index.cpu(), channels)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))

"""The CUDA C++ kernels on a GPU against the references: what tests/kernels/test_cuda_emulated.py
runs on the CPU, and the production sizes. Builds with nvcc on the first run."""

import pytest
import torch

from kalmagrove_kernels.edge import edge_topk
from kalmagrove_kernels.projection.accumulate import Block
from tests.kernels.cuda_cases import (
    PERMUTE_CASES,
    SUMS_CASES,
    EdgeCase,
    SumsCase,
    check_edge,
    check_permute,
    check_sums,
    edge_inputs,
    run_sums,
    sums_inputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# Few kinds of build (dtype, degree, ceil(edges / 32)): nvcc takes seconds for each.
EDGE_CASES = [
    EdgeCase(16384, 104, 8, torch.bfloat16),
    EdgeCase(16384, 104, 8, torch.bfloat16, groves=16),
    EdgeCase(4097, 104, 8, torch.bfloat16, kind="ties"),
    EdgeCase(999, 104, 8, torch.bfloat16, kind="near"),
    EdgeCase(63, 97, 32, torch.bfloat16, grid=64),
    EdgeCase(1, 128, 1, torch.bfloat16, base="identity"),
    EdgeCase(50, 104, 8, torch.bfloat16, kind="nan"),
    EdgeCase(0, 104, 8, torch.bfloat16),
    EdgeCase(16384, 104, 8),
    EdgeCase(3000, 104, 8, groves=5, kind="ties"),
    EdgeCase(70, 100, 32, kind="zero"),
    EdgeCase(1000, 512, 16, torch.float16, degree=5, grid=3),
    EdgeCase(63, 13, 13, degree=1, basis="piecewise_linear", base="none"),
]
PRODUCTION = [
    (16384, 8, 104, torch.int64, "even"),
    (16384, 8, 1664, torch.int32, "even"),
    (16384, 8, 4096, torch.int64, "even"),
    (16384, 8, 104, torch.int64, "one"),
]


@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge(case: EdgeCase) -> None:
    torch.manual_seed(0)
    check_edge(case, "cuda")


@pytest.mark.parametrize("case", [*PERMUTE_CASES, *PRODUCTION])
def test_permute(case: tuple[int, int, int, torch.dtype, str]) -> None:
    torch.manual_seed(0)
    check_permute(*case, device="cuda")


SUMS_PRODUCTION = [
    SumsCase(16384, 2048, 104, 64, 8, block)
    for block in (Block(), Block(3), Block(7), Block(10, tokens=512))
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SUMS_CASES)
def test_sums(case: SumsCase, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_sums(case, "cuda", dtype)


@pytest.mark.parametrize("case", SUMS_PRODUCTION)
def test_sums_of_production_size(case: SumsCase) -> None:
    torch.manual_seed(0)
    check_sums(case, "cuda")


@pytest.mark.parametrize("draw", ["one", "few"])
def test_sums_of_uneven_channels(draw: str) -> None:
    torch.manual_seed(0)
    check_sums(SumsCase(5000, 2048, 104, 64, 8, Block(), draw), "cuda")


def test_sums_of_many_channels() -> None:
    torch.manual_seed(0)
    check_sums(SumsCase(3000, 256, 1664, 64, 8, Block()), "cuda")


def test_sums_in_a_graph() -> None:
    case = SumsCase(2000, 2048, 104, 64, 8, Block())
    index_NK, a_SR, w_CRD = sums_inputs(case, "cuda", torch.bfloat16)
    run_sums(case, index_NK, a_SR, w_CRD)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, captured_ND = run_sums(case, index_NK, a_SR, w_CRD)
    a_SR.normal_()
    index_NK.copy_(index_NK.flip(0))
    graph.replay()
    assert torch.equal(captured_ND, run_sums(case, index_NK, a_SR, w_CRD)[1])


def test_edge_runs_on_the_current_stream_and_in_a_graph() -> None:
    case = EdgeCase(500, 104, 8, torch.bfloat16)
    inputs = edge_inputs(case, "cuda")

    def value() -> torch.Tensor:
        kept = edge_topk(*inputs[:4], case.kept, backend="cuda", **case.options)
        return kept.value_NK

    value()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_NK = value()
    inputs.h_NM.normal_()
    graph.replay()
    assert torch.equal(captured_NK, value())

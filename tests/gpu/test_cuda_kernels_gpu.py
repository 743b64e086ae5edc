"""The CUDA C++ kernels on a GPU against the references: what tests/kernels/test_cuda_emulated.py
runs on the CPU, and the production sizes. Builds with nvcc on the first run."""

import pytest
import torch

from kalmagrove_kernels.edge import edge_topk
from tests.kernels.cuda_cases import (
    PERMUTE_CASES,
    EdgeCase,
    check_edge,
    check_permute,
    edge_inputs,
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

"""The CUDA C++ kernels against the references without a GPU: `csrc/emulate.h` runs them on the CPU.

A plain C++ compiler builds the same sources; the Python side is that of the GPU too. Poisoned
outputs, ties, odd and empty shapes. On a GPU see tests/gpu/test_cuda_kernels_gpu.py.
"""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from kalmagrove_kernels import jit
from kalmagrove_kernels.permute import cuda as permute_cuda
from tests.kernels.cuda_cases import (
    PERMUTE_CASES,
    SUMS_CASES,
    EdgeCase,
    SumsCase,
    check_convolution,
    check_edge,
    check_permute,
    check_sums,
    edge_inputs,
    run_edge,
)

COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(COMPILER is None, reason="needs the C++ compiler g++"),
]


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`jit.library` builds for the CPU."""
    folder = tmp_path_factory.mktemp("emulated")

    @cache
    def library(op: str, device: torch.device, **constants: int) -> jit.Library:
        assert device.type == "cpu"
        root = jit.source_folder()
        defines = [f"-D{name}={value}" for name, value in constants.items()]
        place = folder / "-".join([op, *map(str, constants.values())])
        sources = sorted(map(str, (root / op).glob("*.cu")))
        command = [str(COMPILER), "-x", "c++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w"]
        subprocess.run([*command, *defines, f"-I{root}", "-o", place, *sources], check=True)
        return jit.Library(op, Path(place))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "library", library)
        patch.setattr(jit, "multiprocessors", lambda device: 2)
        yield


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("shape", "taps", "dtype"),
    [
        ((2, 75, 16), 4, torch.float32),
        ((1, 70, 40), 4, torch.bfloat16),
        ((1, 2, 8), 4, torch.float32),
        ((1, 33, 4), 1, torch.float32),
        ((3, 64, 12), 8, torch.float32),
        ((1, 0, 8), 4, torch.float32),
    ],
)
def test_convolution(
    shape: tuple[int, int, int], taps: int, dtype: torch.dtype, segmented: bool
) -> None:
    check_convolution(shape, taps, dtype, segmented, "cpu")


EDGE_CASES = [
    EdgeCase(63, 104, 8, torch.bfloat16),
    EdgeCase(40, 104, 8, torch.bfloat16, groves=4),
    EdgeCase(9, 104, 5, torch.bfloat16, kind="ties"),
    EdgeCase(9, 104, 8, torch.bfloat16, kind="near"),
    EdgeCase(5, 100, 32, torch.bfloat16, kind="nan"),
    EdgeCase(5, 13, 13, degree=1, basis="piecewise_linear", base="none"),
    EdgeCase(1, 7, 1, degree=1, grid=2, base="identity"),
    EdgeCase(3, 32, 32, degree=1, kind="zero"),
    EdgeCase(0, 13, 3, degree=1, groves=2),
]


@pytest.mark.parametrize("case", EDGE_CASES)
def test_edge(case: EdgeCase) -> None:
    torch.manual_seed(0)
    check_edge(case, "cpu")


@pytest.mark.parametrize("case", PERMUTE_CASES)
def test_permute(case: tuple[int, int, int, torch.dtype, str]) -> None:
    torch.manual_seed(0)
    check_permute(*case, device="cpu")


@pytest.mark.parametrize("case", SUMS_CASES)
def test_sums(case: SumsCase) -> None:
    torch.manual_seed(0)
    check_sums(case, "cpu")


REFUSED = {
    "basis=legendre": {"basis": "legendre"},
    "degree=6": {"degree": 6},
    "edges=513": {"edges": 513},
    "top_k=33": {"kept": 33, "edges": 40},
    "float64 pre-activations": {"dtype": torch.float64},
    "too large for shared memory": {"edges": 512, "grid": 60},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_edge_kernel_is_not_made_for_is_refused(what: str) -> None:
    case = EdgeCase(2, 13, 3)._replace(**REFUSED[what])
    with pytest.raises(NotImplementedError, match=rf"{what}.*backend='triton'"):
        run_edge(case, edge_inputs(case, "cpu"), "cuda")


def test_more_channels_than_counters_fit_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"no 40000 channels .*backend='triton'"):
        permute_cuda.sort_pairs(torch.zeros(2, 2, dtype=torch.int64), 40000)

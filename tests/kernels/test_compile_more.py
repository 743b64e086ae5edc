"""The Triton kernels compile at awkward and large sizes, in fp32, with fewer options, with every
basis, and for a GPU without a copy engine."""

import pytest

from tests.kernels.test_compile import OPS, check

pytest.importorskip("triton")
pytestmark = pytest.mark.unit


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_at_other_sizes(op: str) -> None:
    check(op, "--more")


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_for_ampere(op: str) -> None:
    check(op, "--arch=80")

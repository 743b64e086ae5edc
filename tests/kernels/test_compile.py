"""Every Triton kernel compiles for a GPU: what Triton's interpreter, which runs them here, cannot
tell.

`compile_ops` compiles them in a process of its own, for every op with all sizes 1 and with ordinary
ones; test_compile_more.py has the rest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kalmagrove_kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.unit

OPS = ("ada", "edge", "permute", "polynomial", "projection")


def compiled(op: str, *words: str) -> dict[str, Any]:
    """The `Report` of compile_ops.py."""
    script = str(Path(__file__).with_name("compile_ops.py"))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, op, *words], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def failures(report: dict[str, Any]) -> list[str]:
    return [
        f"{launch['kernel']}({launch['arguments']}): {launch['error']}"
        for launch in report["launches"]
        if launch["error"]
    ]


def check(op: str, *words: str) -> None:
    """Every kernel of the op was compiled, and with every integer as a constant 1 and as none."""
    report = compiled(op, *words)
    found = failures(report)
    assert not found, "\n\n".join([f"{len(found)} launches do not compile:", *found])
    for kernel in report["kernels"]:
        integers = [x["integers"] for x in report["launches"] if x["kernel"] == kernel]
        assert integers, f"{kernel} is launched by no call in compile_ops.py"
        for name in set().union(*integers):
            values = {given[name] for given in integers if name in given}
            assert 1 in values, f"{kernel}: no call in compile_ops.py has {name}=1"
            assert values != {1}, f"{kernel}: all calls in compile_ops.py have {name}=1"


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles(op: str) -> None:
    check(op)


def test_no_package_with_kernels_is_left_out() -> None:
    root = Path(kalmagrove_kernels.__path__[0])
    having = {p.relative_to(root) for p in root.rglob("*.py") if "@triton.jit" in p.read_text()}
    assert {path.parts[0] for path in having} == set(OPS)


def test_an_argument_that_becomes_a_constant_is_noticed() -> None:
    (failure, *_) = failures(compiled("fault"))
    assert failure.startswith("__main__.one_as_tensor(out=float32, one=1): CompilationError")
    assert "'int' object has no attribute 'to'" in failure


@pytest.mark.parametrize("op", ["edge", "permute", "projection"])
def test_nothing_is_compiled_anew_for_another_number_of_rows(op: str) -> None:
    """With expert parallelism it differs in every layer of every step."""
    new = compiled(op, "--rows")["launches"]
    assert not new, "\n".join(f"{launch['kernel']}({launch['arguments']})" for launch in new)


def test_a_kernel_that_is_compiled_anew_is_noticed() -> None:
    (launch,) = compiled("fault", "--rows")["launches"]
    assert launch["arguments"].startswith("out=float32, one=")  # a multiple of 16; 601 is none

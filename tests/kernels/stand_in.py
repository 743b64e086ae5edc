"""A script in the place of nvcc, for tests on machines without it."""

import stat
from pathlib import Path

from kalmagrove_kernels import jit

# Says its version; else notes the call, waits, fails or writes its last source where -o says.
STAND_IN = """#!/bin/sh
if [ "$1" = --version ]; then echo "release {version}"; exit 0; fi
echo "$@" >> {log}
sleep {seconds}
{failure}
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
cat "$1" > "$out"
"""


def install(home: Path, version: str = "13.0", seconds: float = 0, failure: str = "") -> None:
    """Make `home`, for CUDA_HOME, a toolkit whose nvcc notes its calls in `home`/log."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    text = STAND_IN.format(version=version, log=home / "log", seconds=seconds, failure=failure)
    nvcc.write_text(text)
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    jit.nvcc_version.cache_clear()

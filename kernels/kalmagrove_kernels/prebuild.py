"""Compile ahead of time what a GPU's first step would compile, on a machine without that GPU.

    python -m kalmagrove_kernels.prebuild --arch 90 [--arch 80 ...] [--out DIR]

It makes the libraries that the models of `conf/model` use, under the names that `jit` looks up:
container images and nodes without a compiler's time to lose get them this way. Other sizes are
still compiled on first use. nvcc is needed, and at run time the same version of it.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kalmagrove_kernels import jit
from kalmagrove_kernels.ada import cuda_convolve
from kalmagrove_kernels.edge import cuda as edge
from kalmagrove_kernels.projection import accumulate

DTYPES = (torch.bfloat16, torch.float32)  # of engine.precision
DEGREE, EDGES, TAPS = 3, (32, 64, 128), 4  # edges: one for each build up to the largest


def libraries(capability: tuple[int, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """(op, constants) of every library; a test holds them against `conf/model`."""
    yield "permute", {}
    if capability[0] == 9:  # sums in shared memory, which a slice of a layer may be of a size for
        yield "projection", accumulate.constants(torch.bfloat16)
    for dtype in DTYPES:
        yield "ada", cuda_convolve.constants(TAPS, dtype)
        for edges in EDGES:
            yield "edge", edge.constants(DEGREE, edges, dtype)


def prebuild(capabilities: Sequence[tuple[int, int]], folder: Path | None = None) -> list[Path]:
    """The libraries for GPUs of these compute capabilities, as many at once as there are cores.

    folder: where they are put; None: the folder that `jit` looks in.

    Raises:
        RuntimeError: see `jit.build`.
    """
    jobs = [
        (op, jit.flags_of(capability, constants))
        for capability in capabilities
        for op, constants in libraries(capability)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: jit.build(job[0], job[1], folder), jobs))


def _capability(text: str) -> tuple[int, int]:
    """
    >>> _capability("90"), _capability("12.0")
    ((9, 0), (12, 0))
    """
    found = re.fullmatch(r"(\d+)\.?(\d)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no compute capability; try 90, 80 or 100")
    return int(found[1]), int(found[2])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "kalmagrove_kernels.prebuild", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--arch", action="append", type=_capability, required=True)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args(argv)
    start = time.monotonic()
    try:
        made = prebuild(words.arch, words.out)
    except RuntimeError as error:
        print(f"prebuild: {error}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    print(f"prebuild: {len(made)} libraries in {made[0].parent} ({seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

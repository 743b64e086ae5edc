"""Layouts over two GPUs and NCCL train like one process on the CPU."""

import os

import pytest
import torch

from tests.dist.harness import run_ranks
from tests.dist.matrix import PAIRS, name_of
from tests.dist.test_matrix import check

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_layouts_train_like_one_process() -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    gpus = {"CUDA_VISIBLE_DEVICES": visible, "DS_ACCELERATOR": "cuda"}
    found = run_ranks("matrix", 2, module="tests.dist.matrix", timeout=500, env=gpus, cases=PAIRS)
    for chosen in PAIRS:
        check(chosen, found["cases"][name_of(chosen)], found["reference"], fp32=2e-4)

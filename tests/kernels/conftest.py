"""Without a GPU Triton kernels run in its interpreter; that is read before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

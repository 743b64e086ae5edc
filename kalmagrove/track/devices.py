"""What GPUs can do at most, by the name that CUDA gives them: for MFU and HFU where the price's
`peak_tflops` says nothing. And the memory in use on this one.

Dense bf16 matrix products, without sparsity, TFLOP/s, as NVIDIA's and AMD's data sheets have them
(a PCIe or NVL card has a name of its own); check the one you report with. A device that is not
listed has no peak: null, not a guess.
"""

import re
import resource
import sys

import torch

PEAKS = (  # the first that is found in the name
    (r"GB200", 2500.0),  # GB200 NVL72 data sheet, a GPU: 5 PFLOP/s sparse
    (r"B200", 2250.0),  # HGX B200 data sheet: 4.5 PFLOP/s sparse
    (r"B100", 1750.0),  # the same: 3.5 PFLOP/s sparse
    (r"H200 NVL", 835.5),  # H200 data sheet, NVL: 1,671 sparse
    (r"GH200|H200", 989.5),  # H200 and GH200 data sheets: 1,979 sparse
    (r"H100 NVL", 835.5),  # H100 data sheet, NVL: 1,671 sparse
    (r"H100 PCIe", 756.5),  # H100 PCIe product brief: 1,513 sparse
    (r"H100|H800", 989.5),  # H100 data sheet, SXM: 1,979 sparse
    (r"H20\b", 148.0),  # H20 data sheet
    (r"A100|A800", 312.0),  # A100 data sheet
    (r"A40\b", 149.7),  # A40 data sheet
    (r"A30\b", 165.0),  # A30 data sheet
    (r"A10G\b", 70.0),  # Amazon's variant of the A10
    (r"A10\b", 125.0),  # A10 data sheet
    (r"L40S", 362.05),  # L40S data sheet: 733 sparse, 362 dense
    (r"L40\b", 181.05),  # L40 data sheet
    (r"L4\b", 121.0),  # L4 data sheet: 242 sparse
    (r"RTX 5090", 209.5),  # Blackwell RTX white paper, fp32 accumulation
    (r"RTX 4090", 165.2),  # Ada white paper, fp32 accumulation
    (r"RTX 3090\b(?! Ti)", 71.0),  # GA102 white paper, fp32 accumulation
    (r"MI300X", 1307.4),  # AMD Instinct MI300X data sheet
    (r"MI250X", 383.0),  # AMD Instinct MI250X data sheet, both dies
)


def peak_tflops(name: str | None) -> float | None:
    """Of the GPU of that name; None: unknown, or no GPU.

    >>> peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H100 PCIe"), peak_tflops("TPU v5")
    (989.5, 756.5, None)
    """
    if name is None:
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most torch held on a GPU, or this process of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def reserved_memory(device: torch.device) -> int:
    """Bytes: the most that torch took from a GPU, its cache included; 0 on CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0

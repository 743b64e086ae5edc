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

# Cards with a chip's name and not its speed: slices and virtual GPUs, laptops', export models.
OTHERS = r"\bMIG\b|-\d+[ABCQ]\b|Laptop|Max-Q| D\b"
PEAKS = (  # the first that is found in the name
    (r"\bGB200\b", 2500.0),  # GB200 NVL72 data sheet, a GPU: 5 PFLOP/s sparse
    (r"\bB200\b", 2250.0),  # HGX B200 data sheet: 4.5 PFLOP/s sparse
    (r"\bB100\b", 1750.0),  # the same: 3.5 PFLOP/s sparse
    (r"\bH200 NVL\b", 835.5),  # H200 data sheet, NVL: 1,671 sparse
    (r"\bG?H200\b", 989.5),  # H200 and GH200 data sheets: 1,979 sparse
    (r"\bH100 NVL\b", 835.5),  # H100 data sheet, NVL: 1,671 sparse
    (r"\bH100\b.*\bPCIe\b", 756.5),  # H100 PCIe product brief: 1,513 sparse
    (r"\bH[18]00\b", 989.5),  # H100 data sheet, SXM: 1,979 sparse
    (r"\bH20\b", 148.0),  # H20 data sheet
    (r"\bA[18]00\b", 312.0),  # A100 data sheet
    (r"\bA40\b", 149.7),  # A40 data sheet
    (r"\bA30\b", 165.0),  # A30 data sheet
    (r"\bA10G\b", 70.0),  # Amazon's variant of the A10
    (r"\bA10\b", 125.0),  # A10 data sheet
    (r"\bL40S\b", 362.05),  # L40S data sheet: 733 sparse, 362 dense
    (r"\bL40\b", 181.05),  # L40 data sheet
    (r"\bL4\b", 121.0),  # L4 data sheet: 242 sparse
    (r"\bRTX 5090\b", 209.5),  # Blackwell RTX white paper, fp32 accumulation
    (r"\bRTX 4090\b", 165.2),  # Ada white paper, fp32 accumulation
    (r"\bRTX 3090\b(?! Ti)", 71.0),  # GA102 white paper, fp32 accumulation
    (r"\bMI300X\b", 1307.4),  # AMD Instinct MI300X data sheet
    (r"\bMI250X\b", 191.5),  # AMD Instinct MI250X data sheet: 383 of two dies, each a device
)


def peak_tflops(name: str | None) -> float | None:
    """Of the GPU of that name; None: unknown, part of one, or no GPU.

    >>> peak_tflops("NVIDIA H200"), peak_tflops("NVIDIA H100 PCIe"), peak_tflops("TPU v5")
    (989.5, 756.5, None)
    """
    if name is None or re.search(OTHERS, name, re.IGNORECASE):
        return None
    return next((peak for text, peak in PEAKS if re.search(text, name, re.IGNORECASE)), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most torch held on a GPU, or this process of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def reserved_memory(device: torch.device) -> int:
    """Bytes: the most that torch took from a GPU, its cache included; 0 on CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0

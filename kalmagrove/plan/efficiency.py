"""How much of a GPU's speed this code reaches, measured: the numbers that `time` predicts with.

Most are of one NVIDIA H200 (torch 2.11, Triton 3.6); those from `FITTED` of an H100, and the host's
of machines with either. Other GPUs than the H200 are scaled by the peaks of their data sheets,
which the plan marks as extrapolated. docs/cost.md says how good that is.
"""

import re
from typing import NamedTuple

from kalmagrove.config import Cluster
from kalmagrove.track import peak_tflops

KERNELS = "kernels/bench/results/kernels_h200_2026-11-27.json, commit 1b550a9"
ADA = "kernels/bench/results/ada_h200_2026-11-27b.json, commit 1b550a9"
MODELS = "kernels/bench/results/kan_1b_h200_2026-11-27.json, commit 1b550a9"
BEFORE = "kernels/bench/results/kan_1b_h200_2026-11-22.json, commit 164da1b"
LENGTHS = "kernels/bench/results/lengths_h200_2026-11-27.json, commit 1b550a9"
LAYOUTS = "docs/results/layouts-2xh200.json, commit 7363eac"
HOST = "docs/results/plan-2xh200.json, commit 35ba44d; docs/results/host-h200.json, commit 5f85ca0"
FITTED = "docs/results/host-2xh100.json, commit ab9b59d"
HOSTS = (
    "docs/results/host-2xh200.json, docs/results/host-h100.json, docs/results/host-2xh100.json: "
    "the middle"
)
MEASURED_ON = "H200"


class Measured(NamedTuple):
    value: float
    unit: str
    what: str
    source: str


TABLE = {
    "products": Measured(
        0.70, "of peak FLOP/s", "matrix products in a model; 0.79 alone, at 8192^3",
        f"`dense` and ceilings of {KERNELS}",
    ),
    "kan_products": Measured(
        0.50, "of peak FLOP/s", "what a KAN layer's time grows by with its rank", KERNELS,
    ),
    "scores": Measured(
        0.55, "of peak FLOP/s", "causal SDPA with heads of 128, in long rows", ADA,
    ),
    "scores_row": Measured(
        350.0, "tokens", "rows in which SDPA reaches half of that", ADA,
    ),
    "copy": Measured(
        0.88, "of memory speed", "a copy on the device: 4.23 of 4.8 TB/s", KERNELS,
    ),
    "kan_rows": Measured(
        14.0, "bytes x k x D a token", "KAN layer: rows of pairs, both passes", KERNELS,
    ),
    "kan_masked": Measured(
        38.0, "bytes x M x R a token", "the same without kernels: every edge", BEFORE,
    ),
    "ada": Measured(
        151.0, "bytes x channel a token",
        "ADA's convolution, norms, rotation, sums, gate, both passes", ADA,
    ),
    "ada_reference": Measured(
        1630.0, "bytes x channel a token", "the same without kernels: fitted",
        f"{BEFORE}; {MODELS}",
    ),
    "softmax": Measured(
        211.0, "bytes x channel a token", "norms and rotation of q and k, in PyTorch: fitted",
        FITTED,
    ),
    "stream": Measured(
        59.0, "bytes x D a token", "two norms and two sums of a block, in PyTorch: fitted", FITTED,
    ),
    "hidden": Measured(
        26.0, "bytes x hidden a token", "SwiGLU between its products", MODELS,
    ),
    "logits": Measured(
        60.0, "bytes x word a token", "cross-entropy in fp32, in PyTorch", MODELS,
    ),
    "dispatch": Measured(
        63.0, "bytes x D a choice", "rows to groves or experts and back, on one GPU",
        f"docs/kernels.md (two sums of 0.5 ms), {KERNELS}",
    ),
    "optimizer": Measured(
        60.0, "bytes a parameter held", "AdamW in fp32, norm, clipping: the phase of kan_1b",
        "docs/results/host-2xh200.json (62), docs/results/host-2xh100.json (57)",
    ),
    "sums": Measured(
        10.0, "bytes a parameter", "gradients added in fp32, a micro-batch", MODELS,
    ),
    "gather": Measured(
        0.75, "of link speed", "all-reduce, all-gather, reduce-scatter: 338 of 450 GB/s", LAYOUTS,
    ),
    "exchange": Measured(
        0.62, "of link speed", "all-to-all: 276 to 282 of 450 GB/s", LAYOUTS,
    ),
    "network": Measured(
        0.70, "of network speed", "assumed: no run on several machines was measured", "nowhere",
    ),
    "step": Measured(
        0.007, "seconds a step", "in which a GPU that else never waits has nothing to do", FITTED,
    ),
    "host_ada": Measured(0.0033, "seconds a layer and micro-batch", "the host", HOST),
    "host_softmax": Measured(0.0027, "seconds a layer and micro-batch", "the host", HOST),
    "host_mla": Measured(
        0.0033, "seconds a layer and micro-batch", "the host: assumed to be as much as ADA",
        "nowhere",
    ),
    "host_dense": Measured(0.0020, "seconds a layer and micro-batch", "the host", HOST),
    "host_kan": Measured(0.0026, "seconds a layer and micro-batch", "the host", HOST),
    "host_grove": Measured(
        0.0072, "seconds a layer and micro-batch", "the host, with kernels", HOSTS,
    ),
    "host_ep": Measured(
        0.0068, "seconds a layer and micro-batch", "more where groves are on several ranks", HOSTS,
    ),
    "host_cp": Measured(
        0.0050, "seconds a layer and micro-batch", "more with context parallelism", HOSTS,
    ),
    "host_groves_reference": Measured(
        0.0498, "seconds a layer and micro-batch", "more in grove layers without kernels", LAYOUTS,
    ),
    "host_moe": Measured(
        0.025, "seconds a layer and micro-batch", "the host, in layers of experts", LAYOUTS,
    ),
    "host_expert": Measured(
        0.00025, "seconds an expert and micro-batch", "and for each expert on a rank", LAYOUTS,
    ),
    "host_tp": Measured(
        0.0040, "seconds a layer and micro-batch", "more with tensor parallelism", HOST,
    ),
    "host_zero2": Measured(
        0.00035, "seconds a parameter and micro-batch", "more with ZeRO 2", HOST,
    ),
    "host_zero3": Measured(
        0.0011, "seconds a parameter and micro-batch", "more with ZeRO 3", HOST,
    ),
    "host_rest": Measured(
        0.006, "seconds a micro-batch", "the host, outside of layers", HOST,
    ),
    "host_optimizer": Measured(
        0.00004, "seconds a parameter", "the host, between the passes of two steps", HOSTS,
    ),
}  # fmt: skip


def of(name: str) -> float:
    return TABLE[name].value


# Memory GB and TB/s, GB/s to others of the machine, watts: data sheets (SXM boards).
GPUS = {
    "H200": (141.0, 4.8, 450.0, 700.0),
    "H100": (80.0, 3.35, 450.0, 700.0),
    "A100": (80.0, 2.04, 300.0, 400.0),
    "A100 40GB": (40.0, 1.555, 300.0, 400.0),
}


def machine_of(gpu: str, gpus: int, usd_per_gpu_hour: float | None) -> Cluster | None:
    """`gpus` of the name that CUDA gives, taken to be SXM boards of one machine; None: unknown."""
    known = next((name for name in GPUS if re.search(rf"\b{name}\b", gpu)), "")
    said = re.search(r"\b(\d+)GB\b", gpu)
    if known and said and float(said[1]) != GPUS[known][0]:
        known = f"{known} {said[1]}GB"
    peak = peak_tflops(gpu)
    if known not in GPUS or peak is None or re.search("PCIe|NVL", gpu, re.IGNORECASE):
        return None
    memory, speed, link, watts = GPUS[known]
    return Cluster(
        name=f"{gpu} x {gpus}",
        gpu=gpu,
        gpus=gpus,
        gpus_per_node=gpus,
        memory_gb=memory,
        memory_tbs=speed,
        peak_tflops=peak,
        link_gbs=link,
        network_gbs=link,
        watts=watts,
        usd_per_gpu_hour=usd_per_gpu_hour,
        basis="data sheets, all GPUs in one machine",
    )

"""Which kernels the layers run: `model.backend`, or the best there are.

KAN layers, ADA and retrofitted feed-forwards ask when they are built. cuda: CUDA C++ where it is
faster (edge functions with top-k, sorting, ADA's convolution) and Triton for the rest; triton:
Triton for all; reference: plain PyTorch.
"""

import importlib.util
import logging
import os
from functools import cache

import torch

from kalmagrove.config import KAN, ConfigError
from kalmagrove_kernels import jit
from kalmagrove_kernels.edge import cuda

logger = logging.getLogger(__name__)


def resolve_backend(backend: str, device: torch.device, kan: KAN) -> str:
    """The kernels of a KAN layer on a device; `auto` takes the first of cuda, triton, reference.

    What `auto` chose, and why not the others, is logged once a process.

    Raises:
        ConfigError: kernels asked for by name cannot run.
    """
    missing = {name: _missing(name, device.type, kan) for name in ("cuda", "triton")}
    return _chosen("KAN", backend, missing)


def resolve_attention(backend: str, device: torch.device) -> str:
    """The kernels of ADA on a device, as `resolve_backend`. cuda: the convolution in CUDA C++.

    Raises:
        ConfigError: kernels asked for by name cannot run.
    """
    missing = {name: _missing(name, device.type, None) for name in ("cuda", "triton")}
    return _chosen("ADA", backend, missing)


def resolve_polynomial(backend: str, device: torch.device) -> str:
    """The kernels of polynomial feed-forwards on a device, as `resolve_backend`.

    Raises:
        ConfigError: kernels asked for by name cannot run.
    """
    missing = {"triton": _without_triton(device.type)}
    return _chosen("polynomial", backend, missing, "backend")


def _chosen(
    what: str, backend: str, missing: dict[str, str | None], key: str = "model.backend"
) -> str:
    """missing: why a backend cannot run, or None, best first."""
    if backend == "reference":
        return backend
    if backend == "auto":
        choice = next((name for name, why in missing.items() if why is None), "reference")
        reasons = "".join(f"; {name}: {why}" for name, why in missing.items() if why)
        _log_once(f"{what} kernels: {choice} ({key}=auto{reasons})")
        return choice
    if backend == "triton" and os.environ.get("TRITON_INTERPRET"):
        return backend  # slow, on any device: for those who work on kernels
    if why := missing[backend]:
        raise ConfigError(key, backend, f"is not available: {why}", "use auto")
    return backend


def _without_triton(device: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None if device == "cuda" else f"the device is a {device}, no GPU"


def _missing(backend: str, device: str, kan: KAN | None) -> str | None:
    """Why kernels cannot run there, or None. kan: of KAN layers, which cuda asks more of."""
    why = _without_triton(device)
    if why or backend == "triton":
        return why
    try:
        jit.find_nvcc()
    except RuntimeError as error:
        return str(error)
    if kan is None:
        return None
    edge = kan.edge
    gap = cuda.unsupported(edge.basis, edge.degree, edge.grid, kan.edges, kan.top_k)
    return gap and f"made for no {gap}"


@cache
def _log_once(text: str) -> None:
    logger.info(text)

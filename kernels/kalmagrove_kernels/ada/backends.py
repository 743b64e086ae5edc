"""The modules of ADA's Triton kernels, imported when they are first asked for."""

import importlib
from types import ModuleType

BACKENDS = ("reference", "triton")


def module_of(part: str, backend: str) -> ModuleType:
    """`kalmagrove_kernels.ada.<backend>_<part>`.

    Raises:
        KeyError: there is no such backend.
        RuntimeError: what it needs is not installed.
    """
    if backend not in BACKENDS:
        raise KeyError(f"backend={backend!r} must be one of {BACKENDS}")
    try:
        return importlib.import_module(f"kalmagrove_kernels.ada.{backend}_{part}")
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"ADA's {part} has no backend={backend!r} here ({error}): "
            "install kalmagrove[gpu], or use backend='reference'"
        ) from error

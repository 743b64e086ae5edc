"""The feed-forward of a layer, built from the configuration for `kalmagrove.nn.block`."""

import logging
from collections.abc import Callable
from functools import cache

from torch import nn

from kalmagrove.config import ConfigError, Model
from kalmagrove.nn.baselines import DenseFFN, MoEFFN
from kalmagrove.nn.common import FFNOutput
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove.parallel import Groups
from kalmagrove_kernels import edge, projection

__all__ = ["FFNOutput", "build_ffn", "resolve_backend"]

logger = logging.getLogger(__name__)


def build_ffn(model: Model, layer: int, groups: Groups) -> nn.Module:
    """The feed-forward of layer `layer`; call its `init_weights` before use.

    Raises:
        ConfigError: `model.backend` names kernels that are not built.
    """
    backend = resolve_backend(model.backend)
    width, ffn = model.d_model, model.ffn
    build: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: DenseFFN(width, ffn.dense.hidden, groups),
        "moe": lambda: MoEFFN(width, ffn.moe, groups),
        "kan": lambda: KANLayer(width, ffn.kan, groups, backend),
        "grove": lambda: GroveLayer(width, ffn.grove, groups, backend),
    }
    return build[model.ffn_kind(layer)]()


def resolve_backend(backend: str) -> str:
    """The kernels to run: `auto` takes the best there are and logs the choice once a process.

    Raises:
        ConfigError: kernels asked for by name are not available.
    """
    available = [name for name in edge.BACKENDS if name in projection.BACKENDS]
    if backend == "auto":
        return _automatic_backend(tuple(available))
    if backend not in available:
        raise ConfigError(
            "model.backend",
            backend,
            f"is not available (this version has: {', '.join(available)})",
            "use model.backend=auto",
        )
    return backend


@cache
def _automatic_backend(available: tuple[str, ...]) -> str:
    choice = available[-1]
    logger.info("KAN kernels: %s (model.backend=auto, of %s)", choice, ", ".join(available))
    return choice

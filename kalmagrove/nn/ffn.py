"""The feed-forward of a layer, built from the configuration, and its size without building it.

`build_ffn` serves `kalmagrove.nn.block`; the counts serve tables and plans before any model exists.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import nn

from kalmagrove.config import KAN, ConfigError, Model
from kalmagrove.nn.baselines import DenseFFN, MoEFFN
from kalmagrove.nn.common import FFNOutput
from kalmagrove.nn.edge import make_basis
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove.parallel import Groups
from kalmagrove_kernels import edge, projection

__all__ = ["Count", "FFNOutput", "build_ffn", "count_ffn", "resolve_backend"]

logger = logging.getLogger(__name__)


def build_ffn(model: Model, layer: int, groups: Groups) -> nn.Module:
    """The feed-forward of layer `layer`; call its `init_weights` before use.

    Raises:
        ConfigError: `model.backend` names kernels that are not built.
    """
    backend = resolve_backend(model.backend)
    width, ffn = model.d_model, model.ffn
    build: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: DenseFFN(width, ffn.dense.hidden),
        "moe": lambda: MoEFFN(width, ffn.moe),
        "kan": lambda: KANLayer(width, ffn.kan, backend),
        "grove": lambda: GroveLayer(width, ffn.grove, backend),
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


class Count(NamedTuple):
    """Parameters of a module, and those of them that one token's forward pass uses."""

    total: int
    active: int


def count_ffn(model: Model, layer: int) -> Count:
    """Parameters of the feed-forward of layer `layer`.

    Active: all but the projections of edges not kept, and the groves or experts not chosen.
    """
    width, ffn = model.d_model, model.ffn
    kind = model.ffn_kind(layer)
    if kind == "dense":
        size = 3 * width * ffn.dense.hidden
        return Count(size, size)
    if kind == "kan":
        return _count_kan(width, ffn.kan)
    if kind == "moe":
        moe = ffn.moe
        expert = 3 * width * moe.hidden
        always = width * moe.experts + 3 * width * moe.shared_hidden
        return Count(moe.experts * expert + always, moe.top_k * expert + always)
    grove = ffn.grove
    router = grove.groves * (grove.edge_manifold * width + width + 1)
    one = _count_kan(width, grove.kan)
    shared = one if grove.shared else Count(0, 0)
    return Count(
        grove.groves * one.total + shared.total + router,
        grove.top_g * one.active + shared.active + router,
    )


def _count_kan(width: int, kan: KAN) -> Count:
    scale = 0 if kan.edge.base == "none" else 1
    always = kan.edges * (width + make_basis(kan.edge).size + scale)
    per_edge = 2 * kan.rank * width
    return Count(always + kan.edges * per_edge, always + kan.top_k * per_edge)

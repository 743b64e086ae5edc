"""The feed-forward of a layer, built from the configuration for `kalmagrove.nn.block`."""

from collections.abc import Callable

from torch import nn

from kalmagrove.config import KAN, Model
from kalmagrove.nn.backends import resolve_backend
from kalmagrove.nn.baselines import DenseFFN, MoEFFN
from kalmagrove.nn.common import FFNOutput
from kalmagrove.nn.grove import GroveLayer
from kalmagrove.nn.kan import KANLayer
from kalmagrove.parallel import Groups

__all__ = ["FFNOutput", "build_ffn"]


def build_ffn(model: Model, layer: int, groups: Groups) -> nn.Module:
    """The feed-forward of layer `layer`; call its `init_weights` before use.

    Raises:
        ConfigError: `model.backend` names kernels that are not built.
    """
    width, ffn = model.d_model, model.ffn

    def backend(kan: KAN) -> str:
        return resolve_backend(model.backend, groups.device, kan)

    build: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: DenseFFN(width, ffn.dense.hidden, groups),
        "moe": lambda: MoEFFN(width, ffn.moe, groups),
        "kan": lambda: KANLayer(width, ffn.kan, groups, backend(ffn.kan)),
        "grove": lambda: GroveLayer(width, ffn.grove, groups, backend(ffn.grove.kan)),
    }
    return build[model.ffn_kind(layer)]()

"""Attention kinds behind one constructor; a block holds what `build_attention` returns.

Every kind is `forward(x_BTD, segments_BT=None, cache=None) -> y_BTD` with `init_cache(batch,
max_tokens, device, dtype)`, `init_weights(std, out_std)` and `metrics`. A tensor-parallel rank has
some of the heads, a context-parallel one some of the tokens; x and y are the stream of
`kalmagrove.parallel.tensor`, segments_BT covers the rank's piece of the rows, and caches are for
one process.
"""

from torch import nn

from kalmagrove.config import Model
from kalmagrove.nn.attention.ada import ADA, ADACache
from kalmagrove.nn.attention.mla import MLA, LatentCache
from kalmagrove.nn.attention.softmax import KVCache, Softmax
from kalmagrove.parallel import Groups

Cache = ADACache | KVCache | LatentCache


def build_attention(model: Model, layer: int, groups: Groups) -> nn.Module:
    """The attention of layer `layer` (counted from 0), of the kind its pattern names."""
    kind = model.attention_kind(layer)
    if kind == "ada":
        return ADA(model, layer, groups)
    return Softmax(model, groups) if kind == "softmax" else MLA(model, groups)


__all__ = [
    "ADA",
    "MLA",
    "ADACache",
    "Cache",
    "KVCache",
    "LatentCache",
    "Softmax",
    "build_attention",
]

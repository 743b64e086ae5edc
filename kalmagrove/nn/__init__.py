"""The model, as single-device code: collectives come only through `kalmagrove.parallel`."""

from kalmagrove.nn.model import ModelOutput, Transformer, build_model

__all__ = ["ModelOutput", "Transformer", "build_model"]

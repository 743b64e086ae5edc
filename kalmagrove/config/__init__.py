"""Typed, validated description of a run. Imports nothing of the project; everything imports it."""

from kalmagrove.config.data import Data, Source, Tokenizer
from kalmagrove.config.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    KalmaGroveError,
    NonFiniteError,
)
from kalmagrove.config.load import load, validate
from kalmagrove.config.model import (
    ADA,
    FFN,
    KAN,
    MLA,
    Attention,
    Dense,
    Edge,
    Grove,
    Init,
    Model,
    MoE,
    Softmax,
)
from kalmagrove.config.run import (
    Batch,
    Checkpoint,
    Engine,
    Eval,
    Launch,
    Optim,
    Parallel,
    Price,
    Run,
    Sample,
    Schedule,
    Track,
    Zero,
)
from kalmagrove.config.verbs import Generate, Prepare

__all__ = [
    "ADA", "Attention", "Batch", "Checkpoint", "CheckpointError", "ConfigError", "Data", "DataError",
    "Dense", "Edge", "Engine", "Eval", "FFN", "Generate", "Grove", "Init", "Interrupted", "KAN", "KalmaGroveError",
    "Launch", "MLA", "MoE", "Model", "NonFiniteError", "Optim", "Parallel", "Prepare", "Price", "Run", "Sample",
    "Schedule", "Softmax", "Source", "Tokenizer", "Track", "Zero", "load", "validate",
]  # fmt: skip

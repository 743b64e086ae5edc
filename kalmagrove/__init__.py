"""KalmaGrove: distributed training of language models made of Kolmogorov-Arnold blocks."""

from kalmagrove.auto import register as _register

__version__ = "0.1.0"

_register()

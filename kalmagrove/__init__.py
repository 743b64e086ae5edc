"""KalmaGrove: distributed training of language models made of Kolmogorov-Arnold blocks."""

__version__ = "0.1.0"

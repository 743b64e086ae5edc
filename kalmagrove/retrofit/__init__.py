"""Other feed-forwards in pretrained language models of transformers.

`find` the structure, `swap` feed-forwards, `freeze` the rest, `save` and `load`. Importing this
lets AutoModelForCausalLM read saved models.
"""

from kalmagrove.retrofit.files import load, save
from kalmagrove.retrofit.freeze import Trainable, freeze
from kalmagrove.retrofit.structure import Structure, find
from kalmagrove.retrofit.swap import REBUILDERS, Swapped, swap

__all__ = [
    "REBUILDERS",
    "Structure",
    "Swapped",
    "Trainable",
    "find",
    "freeze",
    "load",
    "save",
    "swap",
]

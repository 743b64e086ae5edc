"""Training itself: DeepSpeed's engine, optimizers, schedule, checkpoints and the loop.

The only home of deepspeed, which is imported when `connect` is called and not before.
"""

from kalmagrove.engine.checkpoint import State, load_weights, resume, save
from kalmagrove.engine.checkpoint_files import find_checkpoints, read_state
from kalmagrove.engine.connect import connect, disconnect
from kalmagrove.engine.engine import Engine, build_engine
from kalmagrove.engine.loop import Outcome, evaluate, fit, mean_nats
from kalmagrove.engine.room import check_room
from kalmagrove.engine.weights import whole_weights

__all__ = [
    "Engine",
    "Outcome",
    "State",
    "build_engine",
    "check_room",
    "connect",
    "disconnect",
    "evaluate",
    "find_checkpoints",
    "fit",
    "load_weights",
    "mean_nats",
    "read_state",
    "resume",
    "save",
    "whole_weights",
]

"""What a run would take on machines that nobody has rented yet: memory, time, dollars, layouts."""

from kalmagrove.plan.host import HostTimes
from kalmagrove.plan.prediction import Prediction, predict, predicted
from kalmagrove.plan.search import Refusal, Search, describe, given, search
from kalmagrove.plan.time import Part, step_time

__all__ = [
    "HostTimes",
    "Part",
    "Prediction",
    "Refusal",
    "Search",
    "describe",
    "given",
    "predict",
    "predicted",
    "search",
    "step_time",
]

"""What a run does and costs: ledger, meters, console, W&B, summary, and estimates."""

from kalmagrove.track.build import build_meters
from kalmagrove.track.communication import communication_estimate
from kalmagrove.track.cost import Cost, Spent, show_usd
from kalmagrove.track.devices import peak_tflops
from kalmagrove.track.energy import Energy
from kalmagrove.track.flops import Flops, dense_twin, flops_per_token, path_of
from kalmagrove.track.ledger import History, Ledger, read_history
from kalmagrove.track.memory import memory_estimate
from kalmagrove.track.meters import Meters
from kalmagrove.track.records import GridRefit, StepRecord
from kalmagrove.track.summary import results_table, summary_of, write_summary

__all__ = [
    "Cost",
    "Energy",
    "Flops",
    "GridRefit",
    "History",
    "Ledger",
    "Meters",
    "Spent",
    "StepRecord",
    "build_meters",
    "communication_estimate",
    "dense_twin",
    "flops_per_token",
    "memory_estimate",
    "path_of",
    "peak_tflops",
    "read_history",
    "results_table",
    "show_usd",
    "summary_of",
    "write_summary",
]

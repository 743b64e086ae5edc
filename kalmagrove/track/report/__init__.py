"""One HTML page about a run, or about several side by side, out of the run folders alone."""

from kalmagrove.track.report.page import Live, render, write
from kalmagrove.track.report.serve import Server
from kalmagrove.track.report.source import (
    EdgeCurve,
    EdgePanel,
    NotBegun,
    RunData,
    read_run,
    run_folders,
)
from kalmagrove.track.report.tables import config_diff
from kalmagrove.track.report.trade import Outcome, as_file, pareto, trade

__all__ = [
    "EdgeCurve",
    "EdgePanel",
    "Live",
    "NotBegun",
    "Outcome",
    "RunData",
    "Server",
    "as_file",
    "config_diff",
    "pareto",
    "read_run",
    "render",
    "run_folders",
    "trade",
    "write",
]

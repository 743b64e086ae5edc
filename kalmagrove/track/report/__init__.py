"""One HTML page about a run, or about several side by side, out of the run folders alone."""

from kalmagrove.track.report.page import render, write
from kalmagrove.track.report.serve import Server
from kalmagrove.track.report.source import EdgeCurve, EdgePanel, RunData, read_run, run_folders

__all__ = [
    "EdgeCurve",
    "EdgePanel",
    "RunData",
    "Server",
    "read_run",
    "render",
    "run_folders",
    "write",
]

"""What is read from a profiler's trace."""

import json
from pathlib import Path
from typing import Any

import pytest

from kalmagrove.bench import trace


def event(name: str, ts: float, dur: float, stream: int = 7, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur,
        "args": {"stream": stream, **args},
    }  # fmt: skip


SEND = {"Collective name": "all_to_allv", "dtype": "BFloat16", "Group size": 2}
REDUCE = {"Collective name": "allreduce", "dtype": "Float", "Group size": 4, "In msg nelems": 100}
EVENTS = [
    event("gemm", 0, 10),
    event("ncclDevKernel_SendRecv(x)", 5, 15, 9, **SEND, **{"In msg nelems": 8}),
    event("spline", 18, 4, 11),
    event("ncclDevKernel_AllReduce_Sum_f32(x)", 30, 10, 9, **REDUCE),
    event("ncclDevKernel_AllReduce_Sum_f32(x)", 45, 4, 9, **REDUCE),
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 100},
]


@pytest.fixture
def kernels(tmp_path: Path) -> list[trace.Kernel]:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": EVENTS}))
    return trace.read_trace(path)


def test_time_is_split_without_rest(kernels: list[trace.Kernel]) -> None:
    split = trace.split(kernels)
    assert split == pytest.approx(
        {
            "span": 49e-6, "compute": 14e-6, "exposed": 22e-6, "hidden": 7e-6, "idle": 13e-6,
            "alltoall": 15e-6, "alltoall_hidden": 7e-6,
        }
    )  # fmt: skip
    assert split["compute"] + split["exposed"] + split["idle"] == pytest.approx(split["span"])


def test_collectives_are_added_up(kernels: list[trace.Kernel]) -> None:
    exchange, reduce = trace.collectives(kernels)
    assert (exchange["operation"], exchange["calls"], exchange["bytes"]) == ("all_to_allv", 1, 16)
    assert exchange["sent"] is None
    assert (reduce["calls"], reduce["bytes"], reduce["sent"]) == (2, 800, 1200)
    assert reduce["seconds"] == pytest.approx(14e-6)


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ([(0, 10)], [(2, 3), (5, 20)], 6),
        ([(0, 1), (2, 9)], [(0, 3), (4, 5), (8, 12)], 4),
        ([(0, 1)], [(1, 2)], 0),
        ([], [(1, 2)], 0),
    ],
)
def test_common_time(first: Any, second: Any, both: float) -> None:
    assert trace.common(first, second) == trace.common(second, first) == both


def test_union_of_nested_and_touching() -> None:
    assert trace.union([(5, 6), (0, 4), (1, 2), (4, 5)]) == [(0, 6)]


def test_window_starts_at_zero(kernels: list[trace.Kernel]) -> None:
    assert [row[2] for row in trace.window(kernels, 1, 1, 2)] == pytest.approx([0, 5e-6, 18e-6])

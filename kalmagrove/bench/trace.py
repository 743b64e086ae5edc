"""What a GPU did in a step, read from torch.profiler's trace: work, communication, idle time.

`kalmagrove.bench.layouts` writes one step's trace and asks. Times are seconds, of one rank.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Interval = tuple[float, float]  # begin and end, microseconds
ALL_TO_ALL = "SendRecv"  # NCCL builds all-to-alls, and exchanges of neighbours, of these
SIZES = {"Float": 4, "BFloat16": 2, "Half": 2, "Int": 4, "Long": 8, "Double": 8, "Byte": 1}


class Kernel(NamedTuple):
    """A kernel, copy or fill on the GPU."""

    name: str
    stream: int
    begin: float
    end: float
    args: dict[str, Any]

    @property
    def communicates(self) -> bool:
        return self.name.startswith("nccl")

    @property
    def interval(self) -> Interval:
        return self.begin, self.end


def read_trace(path: Path) -> list[Kernel]:
    """All GPU kernels of a Chrome trace, by their beginnings."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [
        Kernel(
            e["name"],
            int(e.get("args", {}).get("stream", -1)),
            float(e["ts"]),
            float(e["ts"]) + float(e["dur"]),
            e.get("args", {}),
        )
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda kernel: kernel.begin)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points in time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def common(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """How long both go on; each is disjoint and in order."""
    total, j = 0.0, 0
    for begin, end in first:
        while j < len(second) and second[j][1] <= begin:
            j += 1
        k = j
        while k < len(second) and second[k][0] < end:
            total += min(end, second[k][1]) - max(begin, second[k][0])
            k += 1
    return total


def split(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Seconds from the first to the last kernel, and how they were spent.

    compute: some kernel that computes was running. exposed: only communication was. hidden: both.
    idle: nothing was, so the host was too slow or waited. `span` is compute + exposed + idle.
    `alltoall` is the time of NCCL's send-receive kernels (waiting for the other rank included),
    `alltoall_hidden` the part beside which something was computed.
    """
    compute = union(k.interval for k in kernels if not k.communicates)
    talk = union(k.interval for k in kernels if k.communicates)
    exchange = union(k.interval for k in kernels if k.communicates and ALL_TO_ALL in k.name)
    span = max(k.end for k in kernels) - min(k.begin for k in kernels)
    hidden = common(talk, compute)
    parts = {
        "span": span,
        "compute": length(compute),
        "exposed": length(talk) - hidden,
        "hidden": hidden,
        "idle": span - length(compute) - length(talk) + hidden,
        "alltoall": length(exchange),
        "alltoall_hidden": common(exchange, compute),
    }
    return {name: us / 1e6 for name, us in parts.items()}


def collectives(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """NCCL's kernels added up by operation, type and group size, as the trace names them.

    bytes: of the operation's input (of its output for an all-gather); sent: what a ring algorithm
    sends of it, None for operations whose sizes the trace does not tell.
    """
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for kernel in kernels:
        if not kernel.communicates:
            continue
        args = kernel.args
        name = str(args.get("Collective name", kernel.name.split("(")[0]))
        key = name, str(args.get("dtype", "")), int(args.get("Group size", 0))
        row = rows.setdefault(
            key,
            {"operation": key[0], "dtype": key[1], "ranks": key[2], "calls": 0, "bytes": 0}
            | {"sent": 0.0, "seconds": 0.0},
        )
        gathers = "gather" in name
        count = int(args.get("Out msg nelems" if gathers else "In msg nelems", 0))
        size = count * SIZES.get(key[1], 0)
        factor = sent_share(name, key[2])
        row["calls"] += 1
        row["bytes"] += size
        row["sent"] = None if factor is None or row["sent"] is None else row["sent"] + factor * size
        row["seconds"] += (kernel.end - kernel.begin) / 1e6
    return sorted(rows.values(), key=lambda row: -row["seconds"])


def sent_share(operation: str, ranks: int) -> float | None:
    """What a rank sends of an operation's bytes, by ring algorithms; None where it depends."""
    if ranks < 1:
        return None
    others = (ranks - 1) / ranks
    if "allreduce" in operation:
        return 2 * others
    if "gather" in operation or "reduce_scatter" in operation:
        return others
    return None


def window(kernels: Sequence[Kernel], around: int, before: int, after: int) -> list[list[Any]]:
    """[stream, name, begin, seconds] of kernels near the kernel number `around`, for a drawing."""
    near = kernels[max(0, around - before) : around + after]
    start = near[0].begin
    return [
        [
            k.stream,
            k.name[:80],
            round((k.begin - start) / 1e6, 9),
            round((k.end - k.begin) / 1e6, 9),
        ]
        for k in near
    ]

"""The doctor's look at several processes: what NCCL (or gloo) moves between them, and their clocks.

Bandwidths are those of NCCL's own tests ("bus bandwidth"): what a rank sends a second if a ring
algorithm moves the data.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from kalmagrove.bench.doctor import Finding
from kalmagrove.parallel import Group, all_gather_object, barrier

REPEATS = 5
BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}


class Link(NamedTuple):
    operation: str
    gigabytes_per_s: float  # bus bandwidth
    right: bool  # the result was what it should be


def links(group: Group, device: torch.device) -> list[Finding]:
    """All ranks call it, and get the same."""
    backend = dist.get_backend()
    found = []
    for link in (_all_reduce(group, device), _all_to_all(group, device)):
        size = BYTES[device.type] // 2**20
        text = f"{link.gigabytes_per_s:.2f} GB/s over {group.size} ranks ({backend}, {size} MiB)"
        if not all(all_gather_object(link.right, group)):
            advice = "run nccl-tests; leave out one GPU after another to find the bad one"
            found.append(Finding(link.operation, "problem", "gives wrong sums", advice))
        elif device.type == "cpu":
            text += "; figures of gloo, on the CPU: they say nothing about NCCL"
            found.append(Finding(link.operation, "ok", text))
        elif link.gigabytes_per_s < 10:
            advice = "NVLink gives 100 and more: see nvidia-smi topo -m, NCCL_DEBUG=INFO"
            found.append(Finding(link.operation, "warning", text, advice))
        else:
            found.append(Finding(link.operation, "ok", text))
    return [*found, _clocks(group)]


def _all_reduce(group: Group, device: torch.device) -> Link:
    x = torch.ones(BYTES[device.type] // 4, device=device)
    dist.all_reduce(x, group=group.handle)
    right = bool((x == group.size).all())
    x.zero_()
    seconds = _time(lambda: dist.all_reduce(x, group=group.handle), group, device)
    return Link("all-reduce", 2 * _others(group) * x.nbytes / seconds / 1e9, right)


def _all_to_all(group: Group, device: torch.device) -> Link:
    part = BYTES[device.type] // 4 // group.size
    x = torch.full((group.size * part,), float(group.rank), device=device)
    y = torch.empty_like(x)
    seconds = _time(lambda: dist.all_to_all_single(y, x, group=group.handle), group, device)
    wanted = torch.arange(group.size, device=device, dtype=y.dtype)
    right = bool((y.view(group.size, part) == wanted[:, None]).all())
    return Link("all-to-all", _others(group) * x.nbytes / seconds / 1e9, right)


def _others(group: Group) -> float:
    return (group.size - 1) / group.size


def _time(work: Callable[[], object], group: Group, device: torch.device) -> float:
    """Seconds a call, the mean of some after two that do not count."""
    for call in range(2 + REPEATS):
        if call == 2:
            _wait(device)
            barrier(group)
            start = time.perf_counter()
        work()
    _wait(device)
    return (time.perf_counter() - start) / REPEATS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clocks(group: Group) -> Finding:
    """Read by all ranks right after a barrier, which itself takes some milliseconds."""
    barrier(group)
    read = all_gather_object(time.time(), group)
    skew = max(read) - min(read)
    if skew > 1:
        advice = "set all machines by NTP (chronyc tracking)"
        return Finding("clocks", "warning", f"of the ranks differ by {skew:.2f} s", advice)
    return Finding("clocks", "ok", f"of the ranks agree to {skew:.3f} s")

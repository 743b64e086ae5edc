"""What `kalmagrove doctor` looks at on one machine. Every check says what it found, and what to do.

A problem is what a training will fail of; a warning what will slow it down or may end it later. The
checks change nothing but files of their own, which they remove.
"""

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import kalmagrove
from kalmagrove.bench.doctor_io import clock_offset, disk, network, ports
from kalmagrove.engine.connect import usable_cores

GIB = 2**30


class Finding(NamedTuple):
    topic: str
    level: Literal["ok", "warning", "problem"]
    text: str
    advice: str = ""


def examine(runs: Path, cache: Path) -> list[Finding]:
    """All checks of this machine, in the order in which they are shown.

    Args:
        runs: folder of runs, which need not be there yet.
        cache: folder of the token cache, likewise.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": python,
        "packages": lambda: packages(_lock()),
        "GPUs": lambda: gpus(_nvml()),
        "compilers": compilers,
        "cores": cores,
        "memory": memory,
        "limits": limits,
        "runs": lambda: _disk("runs", runs),
        "cache": lambda: _disk("cache", cache),
        "clock": lambda: clock(runs),
        "ports": _ports,
        "network": _network,
    }
    found: list[Finding] = []
    for topic, check in checks.items():
        try:
            found += check()
        except Exception as error:  # one broken part of a machine must not hide the others
            text = f"cannot be looked at ({type(error).__name__}: {error})"
            found.append(Finding(topic, "warning", text))
    return found


def python() -> Iterator[Finding]:
    text = f"{platform.python_version()}, kalmagrove {kalmagrove.__version__}"
    yield Finding("python", "ok", f"{text} in {sys.prefix}")


def packages(lock: dict[str, str]) -> Iterator[Finding]:
    """What kalmagrove requires, and the tested versions of `lock` (name: version).

    Both are of this installation: a package of an extra that is not installed is no fault.
    """
    from packaging.requirements import Requirement

    needed = [Requirement(text) for text in metadata.requires("kalmagrove") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    good = 0
    for one in needed:
        found = _version(one.name)
        if found is None or not one.specifier.contains(found, prereleases=True):
            text = f"{one.name} {found or 'is missing'}, needed: {one.specifier or 'any'}"
            yield Finding("packages", "problem", text, "pip install -r requirements.lock")
        else:
            good += 1
    yield Finding("packages", "ok", f"{good} of {len(needed)} required packages fit")
    versions = {name: _version(name) for name in lock}
    other = [
        f"{name} {found} (tested: {lock[name]})"
        for name, found in versions.items()
        if found is not None and found.partition("+")[0] != lock[name]
    ]
    if other:
        text = f"other versions than the lock's: {', '.join(other[:4])}"
        text += f" and {len(other) - 4} more" if len(other) > 4 else ""
        yield Finding("packages", "warning", text, "pip install -r requirements.lock")
    elif lock:
        yield Finding("packages", "ok", "all versions are those of requirements.lock")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _lock() -> dict[str, str]:
    """Of a checkout; {} for an installed wheel, which has none."""
    path = Path(kalmagrove.__file__).parent.parent / "requirements.lock"
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(line.split("==") for line in lines if "==" in line)


def _nvml() -> Any:
    """The module pynvml, initialised; None without it or without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


# Reasons of NVML for a slower clock that are no choice of the user's
SLOWED = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


def gpus(nvml: Any) -> Iterator[Finding]:
    """The GPUs that torch sees; with NVML their driver, memory, errors and slowed clocks."""
    devices = Path("/dev/nvidiactl").exists()
    if not torch.cuda.is_available():
        if devices:
            build = torch.version.cuda or "no CUDA"
            text = f"there is an NVIDIA driver, but torch (built for {build}) sees no GPU"
            advice = "check CUDA_VISIBLE_DEVICES and nvidia-smi; install torch's CUDA build"
            yield Finding("GPUs", "problem", text, advice)
        else:
            yield Finding("GPUs", "ok", "none; training runs on the CPU")
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    seen = f"torch sees {torch.cuda.device_count()}, CUDA {torch.version.cuda}, NCCL {nccl}"
    if nvml is None:
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        text = f"{seen}: {', '.join(sorted(names))}; not looked at more closely"
        yield Finding("GPUs", "warning", text, 'pip install "kalmagrove[gpu]" for nvidia-ml-py')
        return
    yield Finding("GPUs", "ok", f"{seen}, driver {_text(nvml.nvmlSystemGetDriverVersion())}")
    for number in range(nvml.nvmlDeviceGetCount()):
        yield from _gpu(nvml, number)


def _gpu(nvml: Any, number: int) -> Iterator[Finding]:
    handle, name = nvml.nvmlDeviceGetHandleByIndex(number), f"GPU {number}"
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    text = f"{_text(nvml.nvmlDeviceGetName(handle))}, {memory.total / GIB:.0f} GiB"
    yield Finding(name, "ok", text)
    if memory.used > 0.05 * memory.total:
        text = f"{memory.used / GIB:.1f} GiB are in use already"
        yield Finding(name, "warning", text, "look with nvidia-smi for other processes")
    try:
        kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        errors = nvml.nvmlDeviceGetTotalEccErrors(handle, *kinds)
    except nvml.NVMLError:  # a GPU without ECC
        errors = 0
    if errors:
        text = f"{errors} uncorrected memory errors since the driver was loaded"
        yield Finding(name, "problem", text, "reset the GPU or do not use it; tell its owner")
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError:
        return
    slowed = [reason for bit, reason in SLOWED.items() if reasons & bit]
    if slowed:
        advice = "look at cooling and power with nvidia-smi -q -d PERFORMANCE"
        yield Finding(name, "warning", f"its clock is slowed by {', '.join(slowed)}", advice)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def compilers() -> Iterator[Finding]:
    """What GPU kernels are compiled with, and where they are kept."""
    from kalmagrove_kernels.jit import cache_folder, find_nvcc, nvcc_version

    needed = torch.cuda.is_available()
    triton = _version("triton")
    if triton is None and needed:
        advice = 'pip install "kalmagrove[gpu]"; until then kernels are plain PyTorch, and slow'
        yield Finding("triton", "warning", "is missing", advice)
    else:
        yield Finding("triton", "ok", triton or "is missing, and not needed on a CPU")
    try:
        release = next(x for x in nvcc_version(find_nvcc()).splitlines() if "release" in x)
        number = release.partition("release ")[2].split(",")[0]
        theirs = torch.version.cuda
        if theirs and number.split(".")[0] != theirs.split(".")[0]:
            text, advice = f"{number}, torch was built with {theirs}", "set CUDA_HOME to a like one"
            yield Finding("nvcc", "warning", text, advice)
        else:
            yield Finding("nvcc", "ok", number)
    except (RuntimeError, StopIteration) as error:
        if needed:
            text, advice = "is missing or broken", "install the CUDA toolkit, or do without cuda"
            yield Finding("nvcc", "warning", f"{text} ({str(error).split(':')[0]})", advice)
        else:
            yield Finding("nvcc", "ok", "is missing, and not needed on a CPU")
    triton_cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton"))
    for folder, variable in (
        (cache_folder(), "KALMAGROVE_KERNEL_CACHE"),
        (triton_cache, "TRITON_CACHE_DIR"),
    ):
        if os.access(existing(folder), os.W_OK):
            yield Finding("kernel cache", "ok", f"{folder} can be written")
        else:
            advice = f"set {variable} to a folder that can"
            level: Literal["ok", "problem"] = "problem" if needed else "ok"
            yield Finding("kernel cache", level, f"{folder} cannot be written", advice)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.expanduser().absolute()
    return folder if folder.exists() else existing(folder.parent)


def cores() -> Iterator[Finding]:
    """Cores by affinity and a container's CPU quota."""
    usable, there = usable_cores(), os.cpu_count() or 1
    text = f"{usable} usable of {there}"
    if usable < there:
        text += " (affinity, or the CPU quota of a container or job)"
    yield Finding("cores", "ok", text)


def memory(cgroup: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """The machine's memory, or a container's smaller limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    text = f"{total / GIB:.1f} GiB"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            cap, held = ((cgroup / name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if cap != "max" and int(cap) < total:
            available = min(available, int(cap) - int(held))
            text = f"{int(cap) / GIB:.1f} GiB by a container's limit, of {text}"
    text += f"; {available / GIB:.1f} GiB free"
    if available < 2 * GIB:
        advice = "end other processes, or give the container more (docker run --memory)"
        yield Finding("memory", "warning", text, advice)
    else:
        yield Finding("memory", "ok", text)


def limits(shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        text, advice = f"{soft} open files (ulimit -n)", "ulimit -n 65536: each rank opens hundreds"
        yield Finding("limits", "warning", text, advice)
    else:
        yield Finding("limits", "ok", f"{soft} open files (ulimit -n)")
    size = shutil.disk_usage(shm).total / GIB
    text = f"{size:.2f} GiB of shared memory ({shm})"
    if size < 1:
        advice = "docker run --shm-size=16g or --ipc=host: NCCL and data workers use it"
        yield Finding("limits", "warning", text, advice)
    else:
        yield Finding("limits", "ok", text)


def _disk(topic: str, folder: Path) -> Iterator[Finding]:
    for level, text, advice in disk(existing(folder)):
        yield Finding(topic, level, f"{folder}: {text}", advice)


def clock(folder: Path) -> Iterator[Finding]:
    """Against the file system's; ranks of several machines compare theirs in `doctor_links`."""
    offset = clock_offset(existing(folder))
    text = f"{abs(offset):.2f} s {'behind' if offset > 0 else 'before'} that of {folder}"
    if abs(offset) > 2:
        advice = "set it by NTP (chronyc tracking): newest checkpoints and caches go by time"
        yield Finding("clock", "warning", text, advice)
    else:
        yield Finding("clock", "ok", f"agrees with that of {folder} ({abs(offset):.2f} s)")


def _ports() -> Iterator[Finding]:
    for level, text, advice in ports():
        yield Finding("ports", level, text, advice)


def _network() -> Iterator[Finding]:
    from kalmagrove.track.wandb_sink import api_key_missing, server

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    reached = network({"W&B": server(), "hub": hub})
    key = "no API key is known" if api_key_missing() else "an API key is known"
    if reached["W&B"]:
        yield Finding("W&B", "ok", f"can be reached; {key}")
    else:
        text = f"cannot be reached; {key}; runs are recorded offline (track.wandb=offline)"
        yield Finding("W&B", "ok", text)
    if reached["hub"]:
        yield Finding("hub", "ok", "can be reached")
    else:
        text = "cannot be reached: datasets and models must be files (data=jsonl, data=stdlib)"
        yield Finding("hub", "ok", f"{text}, or in its cache")

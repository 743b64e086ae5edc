"""CUDA C++ compiled just in time: the sources of one op become one shared library, once a machine.

The `cuda` backends of the ops call `library(op, device, **constants)` and launch by name. Sources
are `csrc/<op>/*.cu` and the headers of `csrc`; they include no torch headers, so nvcc takes seconds
and one library fits every torch. Every launcher is
`extern "C" const char *name(pointers, int64_t, float, ..., cudaStream_t)` and returns null or what
CUDA says is wrong.

Libraries are kept under `~/.cache/kalmagrove/kernels` (`KALMAGROVE_KERNEL_CACHE` overrides) by a
hash of sources, flags and nvcc's version. Of ranks that build at once one compiles and the others
wait; a library appears whole or not at all. `prebuild` fills the folder ahead of time.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the constant DTYPE of a library
ERROR_LINES = 8


class Library:
    """The launchers of one op, built for one device and one set of constants."""

    def __init__(self, op: str, path: Path) -> None:
        self.op, self.path = op, path
        self._loaded = ctypes.CDLL(str(path))

    def launch(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Call a launcher on the current stream of the tensors' device.

        Tensors (contiguous) pass their address, None a null pointer, int an int64_t, float a float.

        Raises:
            RuntimeError: the launch failed.
        """
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        launcher = getattr(self._loaded, name)
        launcher.restype = ctypes.c_char_p
        on_gpu = device.type == "cuda"
        with torch.cuda.device(device) if on_gpu else nullcontext():
            stream = torch.cuda.current_stream().cuda_stream if on_gpu else 0
            failure = launcher(*map(_as_c, arguments), ctypes.c_void_p(stream))
        if failure is not None:
            raise RuntimeError(f"CUDA kernel {self.op}.{name}: {failure.decode()}")


def _as_c(argument: Tensor | int | float | None) -> object:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def library(op: str, device: torch.device, **constants: int) -> Library:
    """The launchers of `op` for a GPU, with macros such as DEGREE=3; built on the first call.

    Raises:
        RuntimeError: the device is no GPU, nvcc is missing, or the sources do not compile.
    """
    if device.type != "cuda":
        raise RuntimeError(
            f"the cuda backend of {op} needs tensors on a GPU and got {device}; "
            "move them, or choose backend='reference'"
        )
    return _library(op, _index(device), tuple(sorted(constants.items())))


def multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _library(op: str, device: int, constants: tuple[tuple[str, int], ...]) -> Library:
    capability = torch.cuda.get_device_capability(device)
    return Library(op, build(op, flags_of(capability, dict(constants))))


def flags_of(capability: tuple[int, int], constants: Mapping[str, int]) -> tuple[str, ...]:
    """nvcc's flags for a compute capability and the macros of a build."""
    macros = (f"-D{name}={value}" for name, value in sorted(constants.items()))
    return (gencode(*capability), *macros)


def gencode(major: int, minor: int) -> str:
    """nvcc's flag for a compute capability; Hopper's own instructions need the target sm_90a."""
    name = f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    return f"-gencode=arch=compute_{name},code=sm_{name}"


def build(op: str, flags: tuple[str, ...], folder: Path | None = None) -> Path:
    """The shared library of `op`, from the cache (or a folder like it) or compiled into it.

    Raises:
        RuntimeError: nvcc is missing, the sources do not compile, or the cache is not writable.
    """
    nvcc, sources = find_nvcc(), read_sources(op)
    key = cache_key(sources, (*FLAGS, *flags), nvcc_version(nvcc))
    place = (folder or cache_folder()) / f"{op}-{key}.so"
    if place.exists():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_suffix(".lock")):
            if not place.exists():
                _compile(nvcc, sources, flags, place)
    except OSError as error:
        raise RuntimeError(
            f"the folder of compiled kernels cannot be used ({error}); "
            "set KALMAGROVE_KERNEL_CACHE to a writable one"
        ) from error
    return place


def cache_folder() -> Path:
    override = os.environ.get("KALMAGROVE_KERNEL_CACHE")
    return Path(override) if override else Path.home() / ".cache" / "kalmagrove" / "kernels"


def cache_key(sources: dict[str, bytes], flags: tuple[str, ...], version: str) -> str:
    """A hash of all that decides what the library holds."""
    digest = hashlib.sha256(repr((sorted(sources.items()), flags, version)).encode())
    return digest.hexdigest()[:24]


def source_folder() -> Path:
    """`csrc`: inside the installed package, or beside it in the repository."""
    with as_file(files("kalmagrove_kernels")) as package:
        inside = package / "csrc"
        return inside if inside.is_dir() else package.parent / "csrc"


def read_sources(op: str) -> dict[str, bytes]:
    """The headers of `csrc` and all files of the op, by their path under `csrc`."""
    root = source_folder()
    found = sorted([*root.glob("*.cuh"), *(root / op).glob("*.cu"), *(root / op).glob("*.cuh")])
    if not any(path.suffix == ".cu" for path in found):
        raise RuntimeError(f"there are no CUDA sources of {op} under {root}; reinstall kalmagrove")
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def find_nvcc() -> str:
    """$CUDA_HOME/bin/nvcc, else nvcc on the PATH, else that of /usr/local/cuda.

    Raises:
        RuntimeError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else [Path("/usr/local/cuda/bin/nvcc")]
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    raise RuntimeError(
        "the cuda backends are compiled with nvcc and none was found: install the CUDA toolkit and "
        f"set CUDA_HOME to it (CUDA_HOME is {home or 'not set'}), or choose backend='triton'"
    )


@cache
def nvcc_version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{nvcc} --version failed; set CUDA_HOME to a working CUDA toolkit")
    return done.stdout


def _compile(nvcc: str, sources: dict[str, bytes], flags: tuple[str, ...], place: Path) -> None:
    """Compile copies of what was hashed, then move the library to its place in one step."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="build-") as folder:
        for name, text in sources.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(text)
        units = [name for name in sources if name.endswith(".cu")]
        command = [nvcc, *FLAGS, *flags, "-I.", "-o", "built.so", *units]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(_compile_error(command, done.stdout + done.stderr))
        os.replace(Path(folder) / "built.so", place)


def _compile_error(command: list[str], output: str) -> str:
    lines = output.strip().splitlines()
    first = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()] or lines
    return "\n".join(
        [
            "nvcc could not compile the CUDA kernels; set CUDA_HOME to a toolkit that matches the "
            "GPU's driver, or choose backend='triton'. The command and its first errors:",
            " ".join(command),
            *first[:ERROR_LINES],
        ]
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

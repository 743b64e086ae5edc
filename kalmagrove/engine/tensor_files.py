"""Files of a checkpoint: written with checksums and forced to the disk, read in ranges.

Tensors are stored as safetensors (github.com/huggingface/safetensors: the header's length in 8
bytes, the header in JSON, then the tensors end to end), written here one tensor at a time, so that
neither a whole file nor its checksum costs memory or a second pass.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kalmagrove.config import CheckpointError
from kalmagrove.config.names import is_file_name

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def inside(folder: Path, name: str) -> Path:
    """A file of a checkpoint, which may be from others.

    Raises:
        CheckpointError: the name leads out of the folder, or the file is a link.
    """
    if not is_file_name(name):
        raise CheckpointError(f"{folder}: {name!r} leads out of the checkpoint; do not use it")
    path = folder / name
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, and a checkpoint holds its own files; copy it")
    return path


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: what the header says, and where the values come from in the end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class ChecksumFile:
    """A file for writing that counts and sums what passes, and is on the disk when closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.size = 0
        self.checksum = 0

    def __enter__(self) -> "ChecksumFile":
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.size += len(view)
        self.checksum = zlib.crc32(view, self.checksum)


def write_tensors(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """Write a safetensors file; returns its bytes and CRC-32.

    Raises:
        OSError: the disk is full, the folder gone, ...
    """
    # The widest types first: every tensor is aligned to its type.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        stored = tensors[name]
        span = [offset, offset + stored.size]
        header[name] = {
            "dtype": DTYPES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with ChecksumFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            tensor = tensors[name].read().detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (
                tensors[name].dtype,
                tensors[name].shape,
            )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    return file.size, file.checksum


@dataclass
class FileWriter:
    """Files that one rank adds to a checkpoint. Never raises: the first error is kept in `error`.

    An exception on one rank would leave the others in a collective. After an error nothing more is
    written; `save` shares it with all ranks.
    """

    folder: Path
    error: Exception | None = None
    written: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: bytes, CRC-32

    def attempt(self, action: Callable[[], object]) -> None:
        if self.error is None:
            try:
                action()
            except (OSError, CheckpointError) as error:
                self.error = error

    def tensors(
        self, name: str, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
    ) -> None:
        def write() -> None:
            self.written[name] = write_tensors(self.folder / name, tensors, metadata)

        self.attempt(write)

    def json(self, name: str, tree: Any) -> None:
        def write() -> None:
            with ChecksumFile(self.folder / name) as file:
                file.write(json.dumps(tree).encode())
            self.written[name] = file.size, file.checksum

        self.attempt(write)


class TensorReader:
    """Reads ranges of tensors from the safetensors files of one folder, which stay open.

    Every method raises CheckpointError for what is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def keys(self, file: str) -> set[str]:
        return set(self._handle(file).keys())

    def metadata(self, file: str) -> dict[str, str]:
        return self._handle(file).metadata() or {}

    def shape(self, file: str, key: str) -> tuple[int, ...]:
        return tuple(self._slice(file, key).get_shape())

    def dtype(self, file: str, key: str) -> torch.dtype:
        name = self._slice(file, key).get_dtype()
        return next(dtype for dtype, known in DTYPES.items() if known == name)

    def read(self, file: str, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a one-dimensional tensor."""
        part: Tensor = self._try(file, key, lambda handle: handle.get_slice(key)[start:stop])
        return part

    def whole(self, file: str, key: str) -> Tensor:
        tensor: Tensor = self._try(file, key, lambda handle: handle.get_tensor(key))
        return tensor

    def _slice(self, file: str, key: str) -> Any:
        return self._try(file, key, lambda handle: handle.get_slice(key))

    def _try(self, file: str, key: str, action: Callable[[Any], Any]) -> Any:
        handle = self._handle(file)
        try:
            return action(handle)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: {key}: {error}") from None

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = inside(self.folder, file)
            try:
                self._open[file] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        return self._open[file]

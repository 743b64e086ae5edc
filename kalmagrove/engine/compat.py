"""What DeepSpeed 0.19 needs to be told, patched or kept quiet about; nothing else touches its
internals.

Used by `connect`, `build_engine` and the checkpoint code. Pinned to deepspeed>=0.19.8,<0.20.
"""

import contextlib
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from kalmagrove.engine.muon import Muon, Shard
from kalmagrove.parallel import Group, Groups


def skip_shm_build() -> None:
    """Keep init_distributed from compiling `deepspeed_shm_comm` on CPU: 40 s, for inference."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop DeepSpeed's notes about choices that are made on purpose here ("untested optimizer")."""
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


class Mpu:
    """`Groups` under the names DeepSpeed asks its `mpu` for."""

    def __init__(self, groups: Groups) -> None:
        self._tp, self._dp = groups.tp, groups.dp
        self.get_tensor_model_parallel_group = self.get_model_parallel_group
        self.get_tensor_model_parallel_rank = self.get_model_parallel_rank
        self.get_tensor_model_parallel_world_size = self.get_model_parallel_world_size

    def get_model_parallel_group(self) -> Any:
        return self._tp.handle

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._tp.ranks[0]

    def get_data_parallel_group(self) -> Any:
        return self._dp.handle

    def get_data_parallel_rank(self) -> int:
        return self._dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp.size

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._dp.ranks)

    def get_pipeline_model_parallel_group(self) -> None:
        return None

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], groups: Groups
) -> Any:
    """`deepspeed.initialize` on existing groups, with `CheckpointFiles` as reader and writer."""
    import deepspeed

    with quiet():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config,
            mpu=Mpu(groups),
            dist_init_required=False,
        )
    engine.checkpoint_engine = CheckpointFiles()
    engine._copy_recovery_script = lambda folder: None  # copies two scripts into every checkpoint
    if isinstance(optimizer, Muon):
        shard_muon(engine, optimizer, groups.dp)
    return engine


def shard_muon(engine: Any, muon: Muon, dp: Group) -> None:
    """Tell `muon` how ZeRO 1 or 2 laid its parameters out (without ZeRO they stay whole)."""
    zero = engine.optimizer
    if zero is muon:
        return
    whole = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    for group, parameters in zip(muon.param_groups, whole, strict=True):
        if group["muon"]:
            shapes = tuple(tuple(p.shape) for p in parameters)
            muon.shard(group["name"], Shard(shapes, group["params"][0].numel(), dp))


def local_weights(engine: Any) -> list[Tensor]:
    """The tensors the optimizer updates on this rank: ZeRO's fp32 partitions, or the parameters."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3
    if flat is not None:
        return list(flat)
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The whole parameter under ZeRO 3 (all ranks enter), the parameter itself otherwise."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def master_weight(parameter: nn.Parameter) -> Tensor:
    """A copy of the whole parameter as the optimizer holds it, fp32. Collective under ZeRO."""
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):
        return parameter.detach().float().clone()
    from deepspeed.utils import safe_get_full_fp32_param

    return cast(Tensor, safe_get_full_fp32_param(parameter))


@torch.no_grad()
def set_weight(parameter: nn.Parameter, value: Tensor, dp: Group) -> None:
    """Make `value` (whole, fp32, the same on all ranks) the parameter and what the optimizer holds.

    Without the second the next step would put the old weight back. Collective under ZeRO.
    """
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        # DeepSpeed's own setter of whole values cannot split what does not divide over the ranks.
        padded = nn.functional.pad(value.flatten(), (0, part * dp.size - value.numel()))
        deepspeed.utils.safe_set_local_fp32_param(parameter, padded[part * dp.rank :][:part])
        return
    parameter.copy_(value)
    if hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)


class CheckpointFiles:
    """DeepSpeed's checkpoint engine: writes with checksums, never raises in the middle of a save.

    An exception on one rank would leave the others in a collective. The first error is kept in
    `error` for `save_checkpoint`'s caller, who shares it with all ranks.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.written: dict[str, tuple[int, int]] = {}  # file name: bytes, CRC-32

    def begin(self) -> None:
        self.error, self.written = None, {}

    def save(self, state_dict: Any, path: str) -> None:
        if self.error is not None:
            return
        try:
            with ChecksumFile(Path(path)) as file:
                try:
                    torch.save(state_dict, cast(IO[bytes], file))
                except RuntimeError as error:  # torch hides why the file took no more
                    raise file.error or error from None
            self.written[Path(path).name] = file.size, file.checksum
        except (OSError, RuntimeError) as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_trusted(Path(path), map_location)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None:
        """Only for decoupled writers."""

    def get_commit_info(self) -> None:
        return None

    def cleanup(self) -> None:
        """Nothing is left open."""


class ChecksumFile:
    """A file for writing that counts and sums what passes, and is on the disk when closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self.size = 0
        self.checksum = 0
        self.error: OSError | None = None  # of a write

    def __enter__(self) -> "ChecksumFile":
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._file.write(view)
        except OSError as error:
            self.error = error
            raise
        self.size += len(view)
        self.checksum = zlib.crc32(view, self.checksum)
        return len(view)

    def flush(self) -> None:
        self._file.flush()


def load_trusted(path: Path, map_location: Any = None) -> Any:
    """`torch.load` restricted to tensors, plain containers and the few classes DeepSpeed stores."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)

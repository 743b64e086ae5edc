"""A cluster: the machines that `kalmagrove plan` reckons with, and how Slurm gives them out."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError

TIME = r"^(\d+-)?\d+(:\d\d){0,2}$"


class Slurm(Section):
    """What `hydra/launcher=slurm` asks for each run. null: what the cluster does by default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None  # GPUs without their number: gpu, gpu:h100; null: none are asked for
    time: str = Field("01:00:00", pattern=TIME)  # limit of one try, as sbatch takes it
    cpus_per_task: PositiveInt = 1  # of a rank
    mem: str | None = None  # of a machine
    restarts: NonNegativeInt = 100  # times that a stopped, hung or killed run is queued again
    start: Literal["srun", "deepspeed"] = "srun"  # one task a rank | one `deepspeed` a machine
    container: str | None = None  # words before the command: apptainer exec --nv image.sif
    python: str | None = None  # null: the one that submits
    modules: tuple[str, ...] = ()  # `module load` of them
    env: dict[str, str] = {}  # noqa: RUF012 - copied by pydantic; variables, NCCL's for instance
    extra: tuple[str, ...] = ()  # further options of sbatch: --exclusive


class Cluster(Section):
    """GPUs that could be rented. Speeds are the data sheets'; what is reached of them was measured
    (`kalmagrove.plan.efficiency`).
    """

    name: str
    gpu: str  # as CUDA names it, or near enough
    gpus: PositiveInt
    gpus_per_node: PositiveInt
    memory_gb: PositiveFloat  # of a GPU, 1e9 bytes
    memory_tbs: PositiveFloat  # TB/s of its memory
    peak_tflops: PositiveFloat  # dense bf16
    link_gbs: PositiveFloat  # GB/s that a GPU sends to others of its machine
    network_gbs: PositiveFloat  # GB/s that a GPU sends to other machines
    watts: PositiveFloat  # of a GPU at full load
    usd_per_gpu_hour: float | None = Field(None, ge=0)  # null: unknown, never free
    basis: str  # where price and speeds are from
    slurm: Slurm | None = None  # null: no jobs can be submitted to it

    @model_validator(mode="after")
    def _machines(self) -> Self:
        node = self.gpus_per_node
        if self.gpus > node and self.gpus % node:
            raise ConfigError(
                "cluster.gpus",
                self.gpus,
                f"must be whole machines of cluster.gpus_per_node={node}",
                f"try {self.gpus // node * node}",
            )
        return self

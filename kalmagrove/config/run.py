"""The run: every section together, the rules that join them, and what follows from them."""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.cluster import Cluster
from kalmagrove.config.data import Data
from kalmagrove.config.errors import ConfigError
from kalmagrove.config.layout import check_layout, check_processes
from kalmagrove.config.model import Model
from kalmagrove.config.names import is_file_name

Beta = Annotated[float, Field(ge=0, lt=1)]
# What decides how and where a run is done, but not its result.
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("name", "dir", "track", "price", "budget", "profile", "launch", "cluster"),
            *("checkpoint", "sample", "eval"),
        ),
        True,
    ),
    "data": {"cache", "workers"},
    "engine": {"threads"},
}


class Batch(Section):
    """`tokens` a step over all ranks; `micro` sequences a rank holds at once, the rest in turn."""

    tokens: PositiveInt
    micro: PositiveInt


class Parallel(Section):
    """Over how many ranks a layer, its groves and a row are split; data parallelism takes the rest.

    processes = tp x cp x dp; ep is laid over all of them.
    """

    tp: PositiveInt = 1  # tensor parallel: heads, hidden widths, the vocabulary
    cp: PositiveInt = 1  # context parallel: the rows, along the sequence
    ep: PositiveInt = 1  # expert parallel: groves and experts
    sequence: bool = False  # also split norms and residuals over the tp ranks, along the sequence


class Zero(Section):
    """DeepSpeed ZeRO (arXiv:1910.02054): 1 shards optimizer states, 2 gradients, 3 parameters."""

    stage: Literal[0, 1, 2, 3] = 1
    bucket: PositiveInt = 50_000_000  # elements of a communication bucket
    overlap_comm: bool = False
    persist: NonNegativeInt = (
        100_000  # stage 3: parameters of fewer elements stay whole on every rank
    )


class Optim(Section):
    """AdamW, Muon (matrices; AdamW for the rest) or SGD (tests)."""

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    decay_splines: bool = False  # also on edge-function coefficients
    momentum: float = Field(0.95, ge=0, lt=1)  # muon, sgd
    muon_lr: PositiveFloat = 0.02  # muon: of the matrices; `lr` serves the rest
    clip: float = Field(1.0, ge=0)  # global gradient norm; 0: off


class Schedule(Section):
    """Linear warm-up, then cosine to `final`, or constant until the last `decay` part (wsd)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: NonNegativeInt = 0  # steps
    decay: float = Field(0.2, gt=0, le=1)  # wsd: part of the run
    final: float = Field(0.1, ge=0, le=1)  # of the peak rate


class Engine(Section):
    """How a step is computed."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPU, fp32 on CPU
    activation_checkpointing: bool = False
    compile: bool = False
    max_nonfinite: PositiveInt = 5  # skipped steps in a row before the run stops
    refit_every: PositiveInt | None = 100
    # ^ steps between looks at the grids' ranges (`edge.refit_above`); null: never
    threads: PositiveInt | None = None  # CPU threads a process; null: cores / local processes


class Checkpoint(Section):
    """Saved every `every` steps, at the end and on SIGINT/SIGTERM; the newest `keep` stay."""

    every: PositiveInt = 100
    keep: PositiveInt = 2
    background: bool = False  # written while training goes on, from a copy in the host's memory
    resume: str = "auto"  # auto | never | a checkpoint's or run's folder


class Eval(Section):
    every: PositiveInt = 100  # steps
    micro: PositiveInt = 8  # sequences a rank evaluates at once
    max_tokens: PositiveInt | None = None  # of the held-out split; null: all of it


class Sample(Section):
    """Text generated at the end of a run."""

    prompts: tuple[str, ...] = ("",)
    max_new_tokens: NonNegativeInt = 120
    temperature: float = Field(0.8, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 0


class Track(Section):
    every: PositiveInt = 20  # steps between ledger and console lines
    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "kalmagrove"
    entity: str | None = None
    tags: tuple[str, ...] = ()  # of the W&B run
    group: str | None = None  # of W&B runs; null: the folder they lie in, unless that is `runs`
    artifacts: Literal["none", "last", "all"] = "none"  # checkpoints that W&B gets too
    tensorboard: bool = False  # event files in RUN/tensorboard
    trackio: bool = False  # trackio's local database
    console: Literal["auto", "live", "plain", "off"] = "auto"


class Price(Section):
    """Dollars an hour, null when unknown: an unknown price is never zero."""

    name: str
    usd_per_gpu_hour: float | None = Field(None, ge=0)
    usd_per_core_hour: float | None = Field(None, ge=0)
    basis: str  # where the figure is from, and its date
    peak_tflops: PositiveFloat | None = (
        None  # of one device, dense bf16: for model-FLOPs utilisation
    )
    usd_per_kwh: float | None = Field(None, ge=0)  # of energy; null: in the other price, or free
    usd_per_gb_month: float | None = Field(None, ge=0)  # of the run's folder; null: not counted


class Budget(Section):
    """Caps of a whole run, all its sessions and lost work together; null: none.

    At a cap the run is saved and ends with exit code 76; it goes on only with a higher one.
    """

    usd: PositiveFloat | None = None  # dollars
    hours: PositiveFloat | None = None  # of wall clock, while processes run
    tokens: PositiveInt | None = None  # trained, of the steps that lasted


class Profile(Section):
    """Steps that torch's profiler looks at: see `kalmagrove.engine.profile`."""

    steps: tuple[PositiveInt, PositiveInt] | None = None  # first and last; null: none
    ranks: Literal["first", "all"] = "first"  # that write a trace

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.steps and self.steps[0] > self.steps[1]:
            steps = list(self.steps)
            rule = "must be the first and the last step"
            raise ConfigError("profile.steps", steps, rule, f"try {steps[::-1]}")
        return self


class Launch(Section):
    """`kalmagrove train` starts `nproc` processes through the DeepSpeed launcher, unless a launcher
    started it. auto: one a GPU; without a GPU `cpu_nproc`."""

    nproc: PositiveInt | Literal["auto"] = 1
    cpu_nproc: PositiveInt = 2
    port: int | None = Field(None, ge=1, le=65535)  # null: a free one
    timeout: PositiveInt = 1800  # seconds a collective may wait
    reserve: PositiveInt = 120  # seconds of a Slurm job's time that are left for saving
    hang_timeout: PositiveInt | None = 600
    # ^ seconds a phase of a step may take before the processes end with exit code 77; null: any
    max_restarts: NonNegativeInt = 0  # times that `kalmagrove` starts processes that died again


class Training(Section):
    """What every training has, whatever the model is: `Run`, and `Retrofit` of pretrained ones."""

    name: str | None = None  # folder under `dir`; null: from model, data and the configuration
    dir: str = "runs"
    steps: PositiveInt
    seed: int = 0
    data: Data
    batch: Batch
    parallel: Parallel = Parallel()
    zero: Zero = Zero()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    sample: Sample = Sample()
    track: Track = Track()
    price: Price
    budget: Budget = Budget()
    profile: Profile = Profile()
    launch: Launch = Launch()
    cluster: Cluster | None = None  # where Slurm starts it: `-m hydra/launcher=slurm`

    @property
    def model_name(self) -> str:
        """What names of folders begin with."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        names = {"name": self.name, "model.name": self.model_name, "data.name": self.data.name}
        for key, name in names.items():
            if name is not None and (name == "latest" or not is_file_name(name)):
                raise ConfigError(
                    key,
                    repr(name),
                    "cannot name a folder of runs ('latest' is a link to the newest)",
                    f"use another name; `dir` says where runs are, now {self.dir}",
                )
        rows = self.batch.tokens / self.data.seq_len
        if rows != int(rows) or rows % self.batch.micro:
            unit = self.data.seq_len * self.batch.micro
            raise ConfigError(
                "batch.tokens",
                self.batch.tokens,
                f"must be a multiple of data.seq_len={self.data.seq_len} x "
                f"batch.micro={self.batch.micro} = {unit}",
                _nearest_multiples(self.batch.tokens, unit),
            )
        rates = (self.price.usd_per_gpu_hour, self.price.usd_per_core_hour)
        if self.budget.usd is not None and rates == (None, None):
            raise ConfigError(
                "budget.usd",
                self.budget.usd,
                f"needs a price, and price={self.price.name} has none",
                "try price=cpu or price=h100, or set price.usd_per_gpu_hour to what you pay",
            )
        if self.schedule.warmup > self.steps:
            raise ConfigError(
                "schedule.warmup",
                self.schedule.warmup,
                f"must be at most steps={self.steps}",
                f"try {self.steps // 10}",
            )
        if self.profile.steps and self.profile.steps[0] > self.steps:
            raise ConfigError(
                "profile.steps",
                list(self.profile.steps),
                f"must begin by the last step, steps={self.steps}",
                f"try [{max(1, self.steps - 1)}, {self.steps}]",
            )
        if self.zero.stage == 0 and self.engine.precision == "bf16":
            raise ConfigError(
                "zero.stage",
                0,
                "gives a wrong gradient norm with engine.precision=bf16 in DeepSpeed",
                "use zero.stage=1",
            )
        if self.zero.stage == 3 and self.optim.kind == "muon":
            raise ConfigError(
                "zero.stage",
                3,
                "shards the matrices that optim.kind=muon must see whole",
                "use zero.stage=2",
            )
        return self

    def check_world(self, world_size: int) -> Self:
        """Check what depends on the number of processes.

        Raises:
            ConfigError: if the step's tokens do not split over the data-parallel ranks.
        """
        dp = self.data_parallel(world_size)
        unit = self.data.seq_len * self.batch.micro * dp
        if self.batch.tokens % unit:
            raise ConfigError(
                "batch.tokens",
                self.batch.tokens,
                f"must be a multiple of data.seq_len={self.data.seq_len} x batch.micro="
                f"{self.batch.micro} x data-parallel ranks={dp} = {unit}",
                _nearest_multiples(self.batch.tokens, unit),
            )
        return self

    def data_parallel(self, world_size: int) -> int:
        """Ranks that read different rows."""
        return world_size // (self.parallel.tp * self.parallel.cp)

    def accumulation(self, dp: int) -> int:
        """Micro-batches a rank accumulates in one step."""
        return self.batch.tokens // (self.data.seq_len * self.batch.micro * dp)

    @property
    def rows_per_step(self) -> int:
        return self.batch.tokens // self.data.seq_len

    @property
    def result_settings(self) -> dict[str, Any]:
        """The settings that decide the result: all that are not neutral, as plain data."""
        return self.model_dump(mode="json", exclude=NEUTRAL)

    @property
    def run_name(self) -> str:
        """`name`, or a name that is the same exactly when the result would be the same."""
        if self.name:
            return self.name
        body = json.dumps(self.result_settings, sort_keys=True)
        digest = hashlib.sha256(body.encode()).hexdigest()[:6]
        return f"{self.model_name}-{self.data.name}-{digest}"


class Run(Training):
    """A validated run of `kalmagrove train`. Built by `kalmagrove.config.load`."""

    model: Model

    @property
    def model_name(self) -> str:
        return self.model.name

    @model_validator(mode="after")
    def _layout(self) -> Self:
        check_layout(self)
        return self

    def check_world(self, world_size: int) -> Self:
        """See `Training.check_world`; the layout must go over the processes too."""
        check_processes(self, world_size)
        return super().check_world(world_size)

    def with_vocab(self, tokenizer_size: int) -> Self:
        """This run with the vocabulary the tokenizer needs.

        Raises:
            ConfigError: if `model.vocab_size` was given and is too small.
        """
        given = self.model.vocab_size
        if given is not None and given < tokenizer_size:
            raise ConfigError(
                "model.vocab_size",
                given,
                f"must hold the tokenizer's {tokenizer_size} tokens",
                f"try {self.model.padded_vocab(tokenizer_size)} or null",
            )
        size = given or self.model.padded_vocab(tokenizer_size)
        model = self.model.model_copy(update={"vocab_size": size})
        return self.model_copy(update={"model": model})


def _nearest_multiples(value: int, unit: int) -> str:
    low = value // unit * unit
    return f"try {low} or {low + unit}" if low else f"try {unit}"

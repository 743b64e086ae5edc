"""What the verbs beside `train` are given."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from kalmagrove.config.base import Section
from kalmagrove.config.data import Data
from kalmagrove.config.run import Price, Track

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"  # auto: cuda if there is one, else cpu


class Prepare(Section):
    """`kalmagrove prepare`: a corpus to tokenize."""

    data: Data
    verify: bool = False  # read all of a cache that is there, whatever was verified before


class Generate(Section):
    """`kalmagrove generate`: text from a run's newest checkpoint, or from the one given."""

    run: str = "runs/latest"  # folder of a run or of a checkpoint
    prompts: tuple[str, ...] = ("",)
    max_new_tokens: NonNegativeInt = 200
    temperature: float = Field(0.8, ge=0)  # 0: always the likeliest token
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 0
    device: str = Field("auto", pattern=DEVICE)


class Inspect(Section):
    """`kalmagrove inspect`: what a model's edge functions look like."""

    run: str = "runs/latest"  # folder of a run, checkpoint or retrofitted model
    edges: PositiveInt = Field(16, le=64)  # drawn of each layer
    layers: tuple[int, ...] | None = None  # blocks, negative ones from the end; null: all
    select: Literal["norm", "used", "random"] = "norm"
    # ^ norm: edges that vary most. used: those that most tokens of the text use
    text: str | None = None  # file that the model reads, for the inputs that edges really get
    tokens: PositiveInt = 4096  # of the text, at most
    out: str | None = None  # folder; null: edges/MODEL
    figures: bool = True  # needs matplotlib
    seed: int = Field(0, ge=0)  # of select=random
    device: str = Field("auto", pattern=DEVICE)


class Suite(Section):
    """Tasks that are evaluated together: files of kalmagrove/evaluate/tasks by name (bbh, or one of
    its tasks as bbh/snarks), names of lm-eval's own tasks, or paths of task files.
    """

    name: str
    tasks: tuple[str, ...] = Field(min_length=1)
    shots: NonNegativeInt | None = None  # examples before a question; null: as each task says


class Evaluate(Section):
    """`kalmagrove evaluate`: a model's scores on a suite."""

    run: str = "runs/latest"  # folder of a run, checkpoint or Hugging Face model; or a hub name
    suite: Suite
    files: str | None = None  # folder with the tasks' files; null: datasets of the hub
    out: str | None = None  # folder of the results; null: evaluations/MODEL-SUITE
    shots: NonNegativeInt | None = None  # instead of the suite's
    limit: PositiveInt | None = None  # only the first items of every task
    chat: bool | Literal["auto"] = "auto"  # chat template; auto: if the model has one
    corpus: str | None = None  # text or JSON lines for bits per byte; val: the run's held-out split
    corpus_documents: PositiveInt | None = None  # only the first ones of the corpus
    batch_tokens: PositiveInt | None = None  # in one forward pass; null: by the device
    max_length: PositiveInt | None = None  # tokens a model sees; null: as many as it was made for
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPU, fp32 on CPU
    device: str = Field("auto", pattern=DEVICE)
    nproc: PositiveInt | Literal["auto"] = 1  # processes that share the work; auto: one a GPU
    track: Track = Track()
    price: Price

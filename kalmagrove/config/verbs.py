"""What the verbs beside `train` are given."""

from pydantic import Field, NonNegativeInt

from kalmagrove.config.base import Section
from kalmagrove.config.data import Data


class Prepare(Section):
    """`kalmagrove prepare`: a corpus to tokenize."""

    data: Data


class Generate(Section):
    """`kalmagrove generate`: text from a run's newest checkpoint, or from the one given."""

    run: str = "runs/latest"  # folder of a run or of a checkpoint
    prompts: tuple[str, ...] = ("",)
    max_new_tokens: NonNegativeInt = 200
    temperature: float = Field(0.8, ge=0)  # 0: always the likeliest token
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = 0
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    # ^ auto: cuda if there is one, else cpu

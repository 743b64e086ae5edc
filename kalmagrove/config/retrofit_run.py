"""A run of `kalmagrove retrofit`: which model, what takes the place of what, and what trains."""

from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError
from kalmagrove.config.load import validate
from kalmagrove.config.retrofit import KANFeedForward, feedforward_of
from kalmagrove.config.run import NEUTRAL, Parallel, Training

NAMES = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class WarmStart(Section):
    """Fit the new feed-forwards to what the old ones do, before training."""

    tokens: PositiveInt | None = None  # of the training data; null: no warm start
    ridge: PositiveFloat = 1e-6


class Evaluation(Section):
    """What is evaluated after training, into the run's folder."""

    suites: tuple[str, ...] = ()  # names in conf/suite
    tasks: tuple[str, ...] = ()  # single tasks, as in a suite; evaluated as the suite `tasks`
    files: str | None = None  # folder with the tasks' files; null: datasets of the hub
    limit: PositiveInt | None = None  # items of a task
    limits: dict[str, PositiveInt] | None = None  # by suite, instead of `limit`
    shots: NonNegativeInt | None = None
    chat: bool | Literal["auto"] = "auto"
    batch_tokens: PositiveInt | None = None


class Retrofit(Training):
    """A validated run of `kalmagrove retrofit`. Built by `retrofit_of`."""

    base: str | None = None  # folder or hub name of a Hugging Face causal LM
    scratch: dict[str, Any] | None = None  # instead: configuration of one, with fresh weights
    arm: str = Field("kan", pattern=NAMES)  # of conf/arm
    label: str | None = Field(None, pattern=NAMES)  # name of the results; null: the arm's
    study: str | None = Field(None, pattern=NAMES)  # runs that are compared: a folder under `dir`
    last: PositiveInt | None = 5  # blocks, from the end
    blocks: tuple[int, ...] | None = None  # instead: their numbers, negative ones from the end
    replace: Literal["kan", "mlp", "restart", "none"] = "kan"
    # ^ their feed-forwards by: KAN | a SwiGLU | themselves with fresh weights | nothing
    ffn: KANFeedForward | None = None  # replace=kan; replace=mlp: whose parameters `match` matches
    hidden: PositiveInt | Literal["match"] = "match"  # replace=mlp: inner width
    train: Literal["blocks", "all", "none"] = "blocks"  # the blocks | everything | nothing
    embeddings: Literal["frozen", "tied", "head_only"] = "tied"
    norms: Literal["blocks", "all", "frozen"] = "blocks"
    warm_start: WarmStart = WarmStart()
    backend: Literal["auto", "reference", "triton"] = "auto"  # of polynomial feed-forwards
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _model(self) -> Self:
        check_source(self.base, self.scratch)
        if (self.last is None) == (self.blocks is None):
            remedy = "give last=5, or last=null and blocks=[0,1]"
            raise ConfigError("last", self.last, "or blocks must be given, and not both", remedy)
        if self.scratch is not None and "model_type" not in self.scratch:
            remedy = "try scratch.model_type=llama"
            raise ConfigError("scratch.model_type", None, "is required", remedy)
        matching = self.replace == "mlp" and self.hidden == "match"
        if (self.replace == "kan" or matching) and self.ffn is None:
            what = "replace=kan" if self.replace == "kan" else "hidden=match"
            raise ConfigError("ffn", None, f"is required by {what}", "try ffn.basis=chebyshev2")
        tokens = self.warm_start.tokens
        if tokens and (self.replace != "kan" or self.scratch is not None):
            rule = "fits KAN feed-forwards to ones that were trained"
            why = (
                f"replace={self.replace} makes none" if self.scratch is None else "scratch has none"
            )
            raise ConfigError("warm_start.tokens", tokens, f"{rule}, and {why}", "use null")
        if self.parallel != Parallel():
            rule = "must keep their defaults: pretrained models are trained data-parallel"
            remedy = "use zero.stage=3 for models that do not fit"
            raise ConfigError("parallel", self.parallel.model_dump(), rule, remedy)
        return self

    @property
    def arm_name(self) -> str:
        """Under which results are compared."""
        return self.label or self.arm

    @property
    def model_name(self) -> str:
        """The base's last name, and the arm."""
        base = (
            PurePath(self.base).name
            if self.base
            else (self.scratch or {}).get("model_type", "scratch")
        )
        return f"{base}-{self.arm_name}"

    @property
    def run_name(self) -> str:
        """`name`; in a study STUDY/ARM-seedSEED, and STUDY/ARM where nothing trains."""
        if self.name or self.study is None:
            return super().run_name
        return f"{self.study}/{self.arm_name}" + (
            "" if self.train == "none" else f"-seed{self.seed}"
        )

    @property
    def result_settings(self) -> dict[str, Any]:
        """See `Training.result_settings`."""
        labels: dict[str, Any] = dict.fromkeys(
            ("arm", "label", "study", "evaluation", "backend"), True
        )
        own = {"seed": True} if self.train == "none" else {}
        return self.model_dump(mode="json", exclude=NEUTRAL | labels | own)


def check_source(base: Any, scratch: Any) -> None:
    """ConfigError unless one of them is given."""
    if (base is None) == (scratch is None):
        rule = "or scratch must be given, and only one of them"
        raise ConfigError("base", base, rule, "try base=HuggingFaceTB/SmolLM2-135M")


def retrofit_of(tree: dict[str, Any]) -> Retrofit:
    """Validate a composed configuration.

    Raises:
        ConfigError: naming the first key that is unknown, of the wrong type or in conflict.
    """
    check_source(tree.get("base"), tree.get("scratch"))  # before a tokenizer is asked for
    if isinstance(tree.get("ffn"), dict):
        tree = tree | {"ffn": feedforward_of(tree["ffn"])}
    return validate(Retrofit, tree)

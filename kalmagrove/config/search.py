"""What `kalmagrove sweep` is given beside the settings of its runs."""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from kalmagrove.config.base import Section
from kalmagrove.config.errors import ConfigError
from kalmagrove.config.names import is_file_name


class Cap(Section):
    """Of all trials together, lost work included; once it is reached no other begins."""

    usd: PositiveFloat | None = None  # dollars
    hours: PositiveFloat | None = None  # of wall clock, summed over the runs


class Search(Section):
    """A study of Optuna's whose trials are runs of `kalmagrove train`."""

    study: str  # folder of the trials under `dir`, and W&B's group
    trials: PositiveInt = 20  # in all; a grid ends with its last point
    objective: Literal["loss", "bits", "loss_usd", "bits_usd"] = "loss"
    # ^ held-out loss at the end in nats a token, or bits a byte; usd: and the run's dollars
    sampler: Literal["tpe", "random", "grid", "nsga2"] = "tpe"
    pruner: Literal["none", "median", "asha", "hyperband"] = "none"
    startup: NonNegativeInt = 5  # trials before sampler and pruner learn from earlier ones
    prune_from: NonNegativeInt = 0  # step; no run is pruned earlier
    search_seed: NonNegativeInt = 0  # of the sampler; `seed` is that of the runs
    at_once: PositiveInt | None = None
    # ^ runs at a time; null: as many as there are GPUs for, without GPUs one; of jobs as many as
    # the cluster has GPUs for
    retry: bool = False  # begin failed trials again, where they stopped
    cap: Cap = Cap()
    poll: PositiveFloat | None = None  # seconds between looks at the runs; null: 1, at jobs 5

    @property
    def measures(self) -> tuple[str, ...]:
        """What is minimised: loss or bits, and perhaps usd."""
        return tuple(self.objective.split("_"))

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.study in ("latest", "jobs") or not is_file_name(self.study):
            remedy = "try study=lr"
            raise ConfigError("study", repr(self.study), "cannot name a folder of trials", remedy)
        if self.pruner != "none" and len(self.measures) > 1:
            rule = f"goes with one objective, and objective={self.objective} has two"
            raise ConfigError("pruner", self.pruner, rule, "use pruner=none or objective=loss")
        return self

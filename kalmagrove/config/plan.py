"""What `kalmagrove plan` is given: a run, and the machines that it might go on."""

from typing import Self

from pydantic import PositiveInt, model_validator

from kalmagrove.config.cluster import Cluster
from kalmagrove.config.errors import ConfigError
from kalmagrove.config.run import Run


class Plan(Run):
    """`kalmagrove plan`: what a run would take on a cluster, and in which layout."""

    steps: PositiveInt = 1  # not used: `tokens` says how long
    cluster: Cluster
    tokens: PositiveInt | None = None  # trained in all; null: 20 for each parameter
    search: bool = True  # false: only the layout that is given
    compare: tuple[str, ...] = ()  # other options of `model`, planned beside this one
    host: str | None = None  # file of `kalmagrove bench host`; null: the middle of those measured
    show: PositiveInt = 8  # layouts listed
    out: str | None = None  # file of the whole plan, JSON; null: none

    @model_validator(mode="after")
    def _one_price(self) -> Self:
        price = self.price.model_dump(exclude={"name", "basis"})
        if any(value is not None for value in price.values()):
            usd = self.price.usd_per_gpu_hour
            raise ConfigError(
                "price",
                self.price.name,
                "is not planned with: the price and the peak are those of the cluster",
                f"use cluster.usd_per_gpu_hour={'PRICE' if usd is None else usd}",
            )
        return self
